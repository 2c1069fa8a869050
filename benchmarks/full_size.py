"""Make a data folder of TAU22's size with TAU22's lists, file names and format, but made-up sound.

    python benchmarks/full_size.py --lists ../shared/tau22 --out DIR

It is for measuring at TAU22's real scale without its 30 GB of recordings. The sound is noise and has nothing to do with
scenes or devices. meta.csv is as long as TAU22's; the clips that no list names have no sound.
"""

import itertools
import os
import re
import signal
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcase import cli
from dcase.data.synth import MARK, SAMPLE_RATE, WAV_BYTES, generator, steady
from dcase.data.tau22 import SPLITS, read_split
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress

META_ROWS = 230_350  # of TAU22's meta.csv
PEAKS = (-50, -1)  # dBFS; TAU22's recordings, too, are often quiet
NAME = re.compile(r"audio/([^-/]+)-([^-/]+-[^-/]+)-(\d+)-(\d+)-([^-/]+)\.wav")  # scene, place, segment, piece, device


@dataclass(frozen=True)
class FullSize:
    lists: Path
    """Folder with TAU22's split25.csv and test.csv, and any other of its split lists."""
    out: Path
    """Data folder to make, 8.7 GB. The same command continues after an interruption."""
    fraction: float = 1.0
    """Part of the clips to make, 0 to 1."""


def make_full_size(lists: Path, out: Path, fraction: float = 1.0) -> Path:
    """Make the data folder, or what is missing of it, and return it.

    Raises `UserError` for bad lists or a bad fraction, a folder that holds something else, and a disk too full.
    """
    splits, kept = {}, {}
    for path in (lists / f"{split}.csv" for split in SPLITS):
        if not path.is_file() and path.stem in ("split25", "test"):
            raise UserError(f"{path} is missing: --lists is a folder with TAU22's split lists")
        names = splits[path.stem] = read_split(path)["filename"].tolist() if path.is_file() else []
        if odd := [name for name in names if not NAME.fullmatch(name)]:
            raise UserError(f"{path}: {odd[0]!r} is not named as TAU22's clips are: get TAU22's own list")
        kept[path.stem] = {name for name in names if zlib.crc32(name.encode()) < fraction * 2**32}
        if not 0 < fraction <= 1 or (names and not kept[path.stem]):
            raise UserError(f"--fraction {fraction} leaves no clip of {path.stem}: give more, and at most 1")
    listed = list(dict.fromkeys(itertools.chain(*splits.values())))
    made = [name for name in listed if name in set.union(*kept.values())]
    try:
        write_sound(out, made, fraction)
        # The lists last: a folder whose sound is not complete cannot be loaded.
        for split in (split for split, names in splits.items() if names):
            lines = (lists / f"{split}.csv").read_bytes().splitlines(keepends=True)
            lines[1:] = [line for line in lines[1:] if line.partition(b"\t")[0].decode() in kept[split]]
            replace(out / "split_setup" / f"{split}.csv", b"".join(lines))
        # The rows of meta.csv beyond the clips that are made are the listed clips in new segments.
        rows, copies = ([NAME.fullmatch(name).groups() for name in names] for names in (made, listed))
        more = ((*row[:2], int(row[2]) + turn * 10**9, *row[3:]) for turn in itertools.count(1) for row in copies)
        lines = ["filename\tscene_label\tidentifier\tsource_label"]
        for scene, place, segment, piece, device in itertools.islice(itertools.chain(rows, more), META_ROWS):
            lines.append(f"audio/{scene}-{place}-{segment}-{piece}-{device}.wav\t{scene}\t{place}\t{device}")
        replace(out / "meta.csv", "\n".join([*lines, ""]).encode())
    except (OSError, soundfile.LibsndfileError, BrokenProcessPool) as error:
        raise UserError(f"{out} cannot be written ({error}): check rights, disk space and memory") from error
    return out


def replace(path: Path, content: bytes) -> None:
    replace_file(path, lambda beside: beside.write_bytes(content))


def write_sound(out: Path, names: list[str], fraction: float) -> None:
    """Write the clips that are missing or cut short, over all cores.

    The mark is written first: the folder never passes for TAU22, and TAU22 is never written to.
    """
    text = (
        "The sound in this folder is made up, by `python benchmarks/full_size.py --lists LISTS --out DIR --fraction "
        f"{fraction}`: it is noise under TAU22's file names.\n"
        "It is for measuring time and memory. Any other figure from it (a score, a loss) means nothing.\n"
    )
    mark = out / MARK
    if out.exists() and any(out.iterdir()) and not (mark.is_file() and mark.read_text() == text):
        raise UserError(f"--out {out} holds something else, or was made with other flags: name a new folder")
    replace(mark, text.encode())
    (out / "audio").mkdir(exist_ok=True)
    with os.scandir(out / "audio") as entries:
        whole = {f"audio/{entry.name}" for entry in entries if entry.stat().st_size == WAV_BYTES}
    names = [name for name in names if name not in whole]
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is for this process
    with ProcessPoolExecutor(**ignore) as pool:
        written = pool.map(partial(write_clip, out), names, chunksize=64)
        for _ in progress(written, total=len(names), desc="full size", unit=" files"):
            pass


def write_clip(out: Path, name: str) -> None:
    """Write a second of noise. Its slope, hump and level depend on the name only."""
    rng = generator("full size", name)
    wave = steady(rng, tilt=rng.uniform(-6, 0), centre=rng.uniform(200, 5000), peak=6.0)
    wave *= 10 ** (rng.uniform(*PEAKS) / 20) / np.abs(wave).max()
    soundfile.write(out / name, wave, SAMPLE_RATE, subtype="PCM_24")


def main() -> None:
    folder = make_full_size(**vars(cli.parse(FullSize, __doc__)))
    print(f"{folder} is ready: TAU22's names, made-up sound (see {MARK})")


if __name__ == "__main__":
    run(main)
