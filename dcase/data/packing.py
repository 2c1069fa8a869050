"""Packing a data folder's clips into one file (`pack.py`): several processes read and resample, this one writes.

Clips are packed in blocks. A block that is written gets a line in the journal, so a killed packing goes on behind the
blocks that are whole. An older pack stays readable until the new one is finished.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dcase.data.cores import over_all_cores
from dcase.data.loading import rates_in, usual_rate
from dcase.data.pack import COLUMNS, VERSION, Pack, Rates, checksum, exists, read_manifest, stamp
from dcase.data.sound import read_wav, resampler
from dcase.data.tau22 import Clips, DataConfig, check_files, load_splits
from dcase.errors import UserError, one_line
from dcase.files import only_one, replace_file
from dcase.progress import progress

_CHUNK = 32  # clips of a block


@dataclass(frozen=True)
class Block:
    """Some clips, one behind the other in the samples file; the fields are lists with an entry per clip."""

    filename: list[str]
    length: list[int]  # samples
    scale: list[float]
    source_size: list[int]  # of the WAV file, bytes
    source_mtime_ns: list[int]
    sha256: str  # of the block's int16 samples

    @property
    def n_bytes(self) -> int:
        return 2 * sum(self.length)

    def line(self) -> str:
        """Return the block's line in the journal."""
        return json.dumps(asdict(self)) + "\n"

    def fits(self, folder: Path, wanted: set[str]) -> bool:
        """Whether all its clips are wanted and their WAV files have not changed."""
        stamps = list(zip(self.source_size, self.source_mtime_ns, strict=True))
        return wanted.issuperset(self.filename) and stamps == [stamp(folder / name) for name in self.filename]


def pack_clips(folder: Path, config) -> None:
    """Make the pack of a data folder; ``config`` is a `prepare.PrepareConfig`.

    A pack that is there already stays if it fits and is undamaged. Raises `UserError` where a clip cannot be read or
    the pack cannot be written; the blocks that are written by then are kept for the next time.
    """
    clips = load_splits(folder, f"split{config.subset}", "test")
    target = DataConfig(pack_dir=config.pack_dir).pack_folder(folder)
    rates = Rates(config.orig_sample_rate or usual_rate(rates_in(folder)), config.sample_rate)
    for part in clips:
        check_files(part)
    names = sorted({name.decode() for part in clips for name in part.filenames.tolist()})
    try:
        target.mkdir(parents=True, exist_ok=True)
        with only_one(target, str(target)):
            if exists(target) and _is_up_to_date(target, rates, clips):
                _remove_remains(target)  # of a packing that was killed in its last moment
                return
            _pack(folder, target, names, rates, config.num_workers)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or one_line(error)}): check rights and space there, or give "
            "another folder as --pack_dir; what is packed is kept, and the same command goes on behind it"
        ) from error


def _is_up_to_date(target: Path, rates: Rates, clips: list[Clips]) -> bool:
    """Whether the pack can stay as it is; prints why, or why not."""
    try:
        pack = Pack(target)
        pack.check_rates(rates)
        for part in clips:
            pack.check_sources(part.folder, part.filenames)
        damaged = pack.damaged_blocks()
        if damaged:
            raise UserError(f"{damaged} blocks of {pack.path} are damaged")
    except (UserError, OSError) as error:
        print(f"{str(error).partition(': make it again')[0]}: making it anew")
        return False
    print(f"{target} is whole: {len(pack)} clips at {rates.sample_rate} Hz, every checksum right, no recording changed")
    return True


def _pack(folder: Path, target: Path, names: list[str], rates: Rates, num_workers: int | None) -> None:
    journals = {path.name[8:16] for path in target.glob("journal-????????.jsonl")} - {_finished(target)}
    id = min(journals, default=secrets.token_hex(4))
    _remove_remains(target, id)
    samples, journal = target / f"samples-{id}.i16", target / f"journal-{id}.jsonl"
    head = json.dumps({"version": VERSION, **asdict(rates)}) + "\n"
    blocks = list(_whole_blocks(samples, journal, head, folder, set(names)))
    replace_file(journal, lambda beside: beside.write_text(head + "".join(block.line() for block in blocks)))
    todo = sorted(set(names).difference(*(block.filename for block in blocks)))
    n_packed = len(names) - len(todo)
    if n_packed:
        print(f"{n_packed} of {len(names)} clips are packed already: going on behind them")
    if todo:
        n_samples = read_wav(folder / todo[0], rates.orig_sample_rate).shape[-1] * rates.sample_rate
        _refuse_full_disk(target, 2 * len(todo) * n_samples // rates.orig_sample_rate)
    chunks = [todo[i : i + _CHUNK] for i in range(0, len(todo), _CHUNK)]
    with (
        open(samples, "ab") as file,
        open(journal, "a") as log,
        closing(over_all_cores(partial(_read_block, folder, rates), chunks, num_workers)) as found,
        progress(total=len(names), initial=n_packed, desc="packing", unit=" clips") as bar,
    ):
        file.truncate(sum(block.n_bytes for block in blocks))
        for block, content in found:
            file.write(content)
            file.flush()
            log.write(block.line())
            log.flush()
            blocks.append(block)
            bar.update(len(block.filename))
        os.fsync(file.fileno())
    _finish(target, id, rates, blocks)
    size = sum(block.n_bytes for block in blocks) / 1e9
    print(f"{target}: {len(names)} clips at {rates.sample_rate} Hz, {size:.2f} GB; training reads it now")


def _whole_blocks(samples: Path, journal: Path, head: str, folder: Path, wanted: set[str]) -> Iterator[Block]:
    """Yield an interrupted packing's blocks up to the first that is damaged, not wanted or of changed WAV files."""
    try:
        with open(journal) as lines, open(samples, "rb") as file:
            if next(lines, "") != head:  # of other rates
                return
            for line in progress(lines, desc="checking what is packed", unit=" blocks", leave=False):
                block = Block(**json.loads(line))
                whole = hashlib.sha256(file.read(block.n_bytes)).hexdigest() == block.sha256
                if not (whole and block.fits(folder, wanted)):
                    return
                yield block
    except (OSError, ValueError, TypeError):  # no journal, or a line that was cut
        return


def _read_block(folder: Path, rates: Rates, names: list[str]) -> tuple[Block, bytes]:
    """Read and resample some clips: their block and its samples. Raises `UserError` naming a faulty file."""
    stamps, waveforms = [], []
    for name in names:
        stamps.append(stamp(folder / name))
        waveforms.append(read_wav(folder / name, rates.orig_sample_rate))
    samples, scales = zip(*(quantise(waveform[0].numpy()) for waveform in _resampled(waveforms, rates)), strict=True)
    for name, before in zip(names, stamps, strict=True):
        if stamp(folder / name) != before:
            raise UserError(f"{folder / name} changed while it was read: run the same command again")
    sizes, times = zip(*stamps, strict=True)
    content = np.concatenate(samples).tobytes()
    lengths = [len(clip) for clip in samples]
    digest = hashlib.sha256(content).hexdigest()
    return Block(names, lengths, list(scales), list(sizes), list(times), digest), content


def _resampled(waveforms: list[torch.Tensor], rates: Rates) -> list[torch.Tensor]:
    """Resample waveforms (1, samples): together where they have one length, which takes a quarter less time."""
    resample = resampler(rates.orig_sample_rate, rates.sample_rate)
    if len({waveform.shape for waveform in waveforms}) == 1:
        return list(resample(torch.stack(waveforms)))
    return [resample(waveform) for waveform in waveforms]


def quantise(waveform: np.ndarray) -> tuple[np.ndarray, float]:
    """Turn a waveform (samples,), float32, into int16 samples and the clip's scale, a float32 number."""
    peak = np.abs(waveform).max(initial=0)
    scale = peak / np.float32(32767) if peak > 0 else np.float32(1)
    scale = max(scale, np.finfo(np.float32).tiny)  # for a peak among the denormals
    return np.rint(waveform / scale).clip(-32767, 32767).astype(np.int16), float(scale)


def _finish(target: Path, id: str, rates: Rates, blocks: list[Block]) -> None:
    """Make the blocks the folder's pack; the one that was there before is removed."""
    starts = np.cumsum([0, *(block.n_bytes for block in blocks)]).tolist()
    numbers = ("length", "scale", "source_size", "source_mtime_ns")
    columns = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in numbers}
    columns["filename"] = np.array([name.encode() for block in blocks for name in block.filename])
    columns["scale"] = columns["scale"].astype(np.float32)
    columns["start"] = np.cumsum(columns["length"]) - columns["length"]  # samples
    order = columns["filename"].argsort()
    index = target / f"index-{id}.npz"
    replace_file(index, lambda beside: _save_arrays(beside, {name: columns[name][order] for name in COLUMNS}))
    manifest = {
        "version": VERSION,
        "id": id,
        **asdict(rates),
        "n_clips": len(order),
        "n_bytes": starts[-1],
        "source_bytes": int(columns["source_size"].sum()),
        "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
        "blocks": [
            {"start": start, "n_bytes": block.n_bytes, "sha256": block.sha256}
            for start, block in zip(starts, blocks, strict=False)
        ],
    }
    text = json.dumps({**manifest, "manifest_sha256": checksum(manifest)}, indent=1)
    replace_file(target / "manifest.json", lambda beside: beside.write_text(text))
    _remove_remains(target)


def _save_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **columns)


def _finished(target: Path) -> str | None:
    """Return the ID of the folder's finished pack; None where there is none that can be read."""
    try:
        return read_manifest(target)["id"]
    except UserError:
        return None


def _remove_remains(target: Path, unfinished: str | None = None) -> None:
    """Remove the files of all packs but the finished and the unfinished one (IDs), and the finished one's journal."""
    finished = _finished(target)
    for path in target.iterdir():
        found = re.fullmatch(r"\.?(samples|index|journal)-([0-9a-f]{8})\.(i16|npz|jsonl)((\.[\w-]*)?\.\d+)?", path.name)
        if found and (found[2] not in (finished, unfinished) or found.group(1, 2) == ("journal", finished)):
            path.unlink()


def _refuse_full_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder} needs {n_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: make room, or give "
            "another folder as --pack_dir"
        )
