"""Make a data folder of TAU22's size: its own lists of clips, its file names and format, but made-up sound.

    python benchmarks/full_size.py --lists ../shared/tau22 --out DIR

What depends on the number of clips (loading, checking, packing) can then be measured at TAU22's real scale, without its
30 GB of recordings. Unlike SynthTAU's, the sound has nothing to do with scenes or devices: it is noise, made fast.
The rows of meta.csv beyond the lists' name clips without sound, which `python -m dcase.prepare` finds missing: before
it, make the folder with --meta_rows 0.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import wave
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcase.data.tau22 import DEVICES, SPLITS, read_split
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress

MARK = "SYNTHETIC.md"  # the file by which `dcase.data.tau22.is_tau22` knows the folder from TAU22
META_ROWS = 230_350  # of TAU22's meta.csv
SAMPLE_RATE = 44100  # Hz; a clip is SAMPLE_RATE samples = 1 s
WAV_BYTES = 44 + 3 * SAMPLE_RATE  # of a clip's file
DISK_BYTES = WAV_BYTES + 4096  # what a file takes at most, in blocks of 4 KiB
SPARE_BYTES = 100_000_000  # for the lists and the folder itself
CHUNK = 64  # files a worker takes at a time

TILTS = (0, -3, -4.5, -6)  # dB an octave, of the noises that a clip is mixed of
NOISE_SAMPLES = 2**21  # of each: 48 s
LOWEST_HZ = 50  # below it, the noises fall no further: else the steep ones would be rumble alone
PEAKS = (-50, -1)  # dBFS; TAU22's recordings, too, are 24 bits and often quiet

NAME = r"^audio/(?P<scene>[^-/]+)-(?P<place>[^-/]+-[^-/]+)-(?P<segment>\d+)-(?P<piece>\d+)-(?P<device>[^-/]+)\.wav$"


def make_full_size(
    lists: Path,
    out: Path,
    fraction: float = 1.0,
    meta_rows: int = META_ROWS,
    num_workers: int | None = None,
    seed: int = 0,
) -> Path:
    """Make the data folder ``out``, or what is missing of it, and return it.

    Args:
        lists: folder of TAU22's lists: split25.csv, test.csv and any other of its split lists.
        fraction: part of the clips to make (0 to 1), evenly spread over the lists.
        meta_rows: rows of meta.csv, whatever the fraction; those that no list names have no sound.
        num_workers: processes; without it, one per core. The files do not depend on it.
        seed: of the sound.

    Raises `UserError` for bad lists or arguments, a folder with something else in it, and a disk too full.
    """
    lists, out = Path(lists), Path(out)
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction is more than 0 and at most 1; got {fraction}")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num_workers is 1 or more; got {num_workers}")
    splits = read_lists(lists)
    kept = names_to_keep(splits, fraction)
    try:
        claim(out, f"--fraction {fraction} --meta_rows {meta_rows} --seed {seed}")
        present = sound_files(out)
        write_sound(out, [name for name in kept if name not in present], num_workers, seed)
        # The lists last: a folder whose sound is not complete cannot be loaded.
        write_lists(lists, out, splits, kept)
        write_meta(out / "meta.csv", pd.concat(splits.values()), kept, meta_rows)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): check rights and space there") from error
    return out


# Lists of clips


def read_lists(folder: Path) -> dict[str, pd.Series]:
    """Filenames of each split list in the folder."""
    for split in ("split25", "test"):
        if not (folder / f"{split}.csv").is_file():
            raise UserError(f"{folder / f'{split}.csv'} is missing: --lists is a folder with TAU22's split lists")
    paths = {split: folder / f"{split}.csv" for split in SPLITS}
    splits = {split: read_split(path)["filename"] for split, path in paths.items() if path.is_file()}
    for split, names in splits.items():
        device = names.str.extract(NAME)["device"]
        if not device.isin(DEVICES).all():
            odd = names[~device.isin(DEVICES)].iloc[0]
            raise UserError(f"{paths[split]}: {odd!r} is not named as TAU22's clips are: get TAU22's own list")
    return splits


def names_to_keep(splits: dict[str, pd.Series], fraction: float) -> dict[str, None]:
    """Filenames of the clips to make, in a dict for its order.

    They are chosen from the test list and the largest training list: smaller ones, as TAU22's, are parts of that.
    """
    train = max((split for split in splits if split != "test"), key=lambda split: len(splits[split]))
    kept = dict.fromkeys(name for split in (train, "test") for name in evenly(splits[split], fraction))
    for split, names in splits.items():
        if not names.isin(kept).any():
            raise UserError(f"--fraction {fraction} leaves no clip of {split}: use more")
    return kept


def evenly(names: pd.Series, fraction: float) -> pd.Series:
    """That fraction of the names, at even distances: the lists are in order of scene, location and device."""
    number = np.floor(np.arange(len(names) + 1) * fraction)
    return names[np.diff(number) > 0]


def write_lists(lists: Path, out: Path, splits: dict[str, pd.Series], kept: dict[str, None]) -> None:
    """The split lists less the clips that are not made; what stays, to the byte, as it was, line ends too."""
    for split, names in splits.items():
        dropped = {name.encode() for name in names if name not in kept}
        lines = (lists / f"{split}.csv").read_bytes().splitlines(keepends=True)
        content = b"".join(line for line in lines if line.partition(b"\t")[0] not in dropped)
        replace_file(out / "split_setup" / f"{split}.csv", lambda beside, content=content: beside.write_bytes(content))


def write_meta(path: Path, listed: pd.Series, kept: dict[str, None], n_rows: int) -> None:
    """meta.csv: the clips that are made, then up to ``n_rows`` made-up ones, which are the listed in new segments."""
    names, listed = pd.Series(list(kept)).str.extract(NAME), listed.drop_duplicates().str.extract(NAME)
    names["segment"], listed["segment"] = names["segment"].astype(int), listed["segment"].astype(int)
    turn, row = np.divmod(np.arange(max(0, n_rows - len(kept))), len(listed))
    made_up = listed.iloc[row]
    made_up = made_up.assign(segment=made_up["segment"] + (turn + 1) * (listed["segment"].max() + 1))
    lines = [
        f"audio/{scene}-{place}-{segment}-{piece}-{device}.wav\t{scene}\t{place}\t{device}\n"
        for scene, place, segment, piece, device in pd.concat([names, made_up]).itertuples(index=False)
    ]
    content = "".join(["filename\tscene_label\tidentifier\tsource_label\n", *lines])
    replace_file(path, lambda beside: beside.write_bytes(content.encode()))


# Sound


def claim(out: Path, flags: str) -> None:
    """Make the folder and its mark, before anything else: it never passes for TAU22, and TAU22 is never written to."""
    text = (
        f"The sound in this folder is made up, by `python benchmarks/full_size.py --lists LISTS --out DIR {flags}`: "
        "it is noise under TAU22's file names.\n"
        "It is for measuring time and memory, and any other figure from it (a score, a loss) means nothing.\n"
    )
    mark = out / MARK
    if out.exists() and any(out.iterdir()) and not (mark.is_file() and mark.read_text() == text):
        raise UserError(f"--out {out} holds something else, or was made with other flags: name a new folder")
    replace_file(mark, lambda beside: beside.write_text(text))
    (out / "audio").mkdir(exist_ok=True)


def sound_files(out: Path) -> set[str]:
    """Filenames of the clips that are there. One whose writing was cut off is shorter, and so is made again."""
    with os.scandir(out / "audio") as entries:
        return {f"audio/{entry.name}" for entry in entries if entry.stat().st_size == WAV_BYTES}


def write_sound(out: Path, names: list[str], num_workers: int | None, seed: int) -> None:
    """Write these clips, over all cores, with a progress bar."""
    needed, free = len(names) * DISK_BYTES + SPARE_BYTES, shutil.disk_usage(out).free
    if not names:
        return
    if free < needed:
        room = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise UserError(f"the disk of {out} is too full ({room}): make room, or use a smaller --fraction")
    # Ctrl-C is for this process, which then ends the others.
    pool = ProcessPoolExecutor(
        num_workers or os.cpu_count(), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        written = pool.map(partial(write_clip, out, seed=seed), names, chunksize=CHUNK)
        for _ in progress(written, total=len(names), desc="full size", unit=" files"):
            pass
    except BrokenProcessPool as error:
        raise UserError("a process was killed (short of memory?): try a lower --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_clip(out: Path, name: str, seed: int) -> None:
    with open(out / name, "wb", buffering=0) as file:
        file.write(wav_header() + pcm_24(sound(name, seed)))


def sound(name: str, seed: int) -> np.ndarray:
    """(SAMPLE_RATE,) float32, full scale 1: two cuts from the noises, its level drawn from PEAKS. By name and seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    tilts = rng.integers(len(TILTS), size=2)
    starts = rng.integers(NOISE_SAMPLES - SAMPLE_RATE, size=2)
    first, second = (noises(seed)[tilt, start : start + SAMPLE_RATE] for tilt, start in zip(tilts, starts, strict=True))
    mix = first + np.float32(rng.uniform(0.1, 1)) * second
    peak = 10 ** (rng.uniform(*PEAKS) / 20)
    return mix * np.float32(peak / max(mix.max(), -mix.min()))


@lru_cache
def noises(seed: int) -> np.ndarray:
    """(len(TILTS), NOISE_SAMPLES) float32, mean square 1; made once in a process, as noise costs more than a file."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal((len(TILTS), NOISE_SAMPLES), dtype=np.float32))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(NOISE_SAMPLES, 1 / SAMPLE_RATE), LOWEST_HZ))
    noise = np.fft.irfft(spectrum * 10 ** (np.array(TILTS)[:, None] * octaves / 20), NOISE_SAMPLES)
    return (noise / noise.std(axis=1, keepdims=True)).astype(np.float32)


def pcm_24(samples: np.ndarray) -> bytes:
    """Little-endian 24-bit samples of float32 ones below full scale 1."""
    whole = (samples * np.float32(2**23)).astype("<i4").view(np.uint8).reshape(-1, 4)
    packed = np.empty((len(samples), 3), dtype=np.uint8)
    for byte in range(3):  # three strided copies: several times as fast as copying three bytes at a time
        packed[:, byte] = whole[:, byte]
    return packed.tobytes()


@lru_cache
def wav_header() -> bytes:
    """The first 44 bytes of every clip."""
    content = BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 3, SAMPLE_RATE, SAMPLE_RATE, "NONE", ""))
        file.writeframes(bytes(3 * SAMPLE_RATE))
    return content.getvalue()[: WAV_BYTES - 3 * SAMPLE_RATE]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lists", type=Path, required=True, help="folder with TAU22's split25.csv and test.csv; other splits as well")
    add("--out", type=Path, required=True, help="data folder to make, 8.7 GB; a run that was stopped goes on there")
    add("--fraction", type=float, default=1.0, help="part of the clips, evenly spread over the lists (0 to 1; 1)")
    add("--meta_rows", type=int, default=META_ROWS, help=f"rows of meta.csv, of clips without sound too ({META_ROWS})")
    add("--num_workers", type=int, help="processes; the files do not depend on it (one per core)")
    add("--seed", type=int, default=0, help="seed of the sound (0)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    folder = make_full_size(**vars(args))
    print(f"{folder} is there: TAU22's names, made-up sound (see {MARK})")


if __name__ == "__main__":
    run(main)
