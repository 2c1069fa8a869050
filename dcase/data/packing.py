"""Packing a data folder's clips into one file: read, resampled, made int16 and written over all cores."""

import hashlib
import multiprocessing
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcase.data.cores import over_all_cores
from dcase.data.pack import (
    Block,
    Pack,
    Packing,
    Rates,
    exists,
    not_written,
    only_one,
    quantise,
    refuse_full_disk,
    remove_remains,
    stamp,
)
from dcase.data.sound import read_wav, resampler
from dcase.data.tau22 import Clips, DataConfig, check_files, load_splits
from dcase.errors import UserError, one_line
from dcase.progress import progress

_CHUNK = 32  # clips a process packs at a time, and of a block


def pack_clips(folder: Path, config) -> None:
    """Make the pack of a data folder; ``config`` is `prepare.PrepareConfig`.

    A pack that is there already, fits and is undamaged stays. Raises `UserError` where a clip cannot be read, or
    the pack cannot be written; what is packed by then is kept for the next time.
    """
    clips = load_splits(folder, f"split{config.subset}", "test")
    target = DataConfig(pack_dir=config.pack_dir).pack_folder(folder)
    rates = Rates(config.orig_sample_rate, config.sample_rate)
    for part in clips:
        check_files(part)
    filenames = sorted({name.decode() for part in clips for name in part.filenames.tolist()})
    try:
        with only_one(target):
            if exists(target) and _is_up_to_date(target, rates, clips):
                remove_remains(target)  # of a run that was killed in its last moment
                return
            _pack(folder, target, filenames, rates, config.num_workers)
    except OSError as error:
        raise UserError(
            f"{target}: {one_line(error)}: check rights and space there, or give another folder as --pack_dir"
        ) from error


def _is_up_to_date(target: Path, rates: Rates, clips: list[Clips]) -> bool:
    """Whether the pack that is there needs nothing done; says what it needs otherwise."""
    try:
        pack = Pack(target)
        if pack.rates != rates:
            raise UserError(f"{target} was made from {pack.rates.orig_sample_rate} to {pack.rates.sample_rate} Hz")
        for part in clips:
            changed = pack.changed_sources(part.folder, pack.rows(part.filenames))
            if changed:
                raise UserError(f"{len(changed)} recordings have changed since {target} was made ({changed[0]})")
        damaged = pack.damaged_blocks()
        if damaged:
            raise UserError(f"{len(damaged)} blocks of {pack.path} are damaged")
    except (UserError, OSError) as error:
        print(f"{str(error).partition(': make it again')[0]}: making it anew")
        return False
    print(f"{target} is whole: {len(pack)} clips at {rates.sample_rate} Hz, every checksum right, no recording changed")
    return True


def _pack(folder: Path, target: Path, filenames: list[str], rates: Rates, num_workers: int | None) -> None:
    packing = Packing(target, rates)
    todo = packing.todo(folder, filenames)
    if len(todo) < len(filenames):
        print(f"{len(filenames) - len(todo)} of {len(filenames)} clips are packed already: going on behind them")
    if todo:
        n_samples = read_wav(folder / todo[0], rates.orig_sample_rate).shape[-1] * rates.sample_rate
        refuse_full_disk(target, 2 * len(todo) * n_samples // rates.orig_sample_rate)
    chunks = [todo[i : i + _CHUNK] for i in range(0, len(todo), _CHUNK)]
    n_bytes = multiprocessing.Value("q", packing.n_bytes)  # so far: every process takes its places behind it
    prepare = partial(_open_samples, packing.samples, n_bytes)
    blocks = over_all_cores(partial(pack_block, folder, rates), chunks, num_workers, prepare)
    bar = progress(total=len(filenames), initial=len(filenames) - len(todo), desc="packing", unit=" clips")
    try:
        with bar, closing(blocks):
            for block in blocks:
                packing.add(block)
                bar.update(len(block.filename))
        packing.finish(filenames)
    finally:
        packing.close()
    size = sum(block["n_bytes"] for block in packing.blocks) / 1e9
    print(f"{target}: {len(filenames)} clips at {rates.sample_rate} Hz, {size:.2f} GB; training reads it now")


_samples: tuple[Path, int, Any] | None = None  # of a packing process: the file, its descriptor, and its bytes so far


def _open_samples(path: Path, n_bytes: Any) -> None:
    global _samples
    _samples = path, os.open(path, os.O_WRONLY), n_bytes


def _write_samples(samples: np.ndarray) -> int:
    """Write samples behind all that is written; where they begin in the file, bytes."""
    path, file, n_bytes = _samples
    with n_bytes.get_lock():
        start = n_bytes.value
        n_bytes.value += samples.nbytes
    content, done = memoryview(samples).cast("B"), 0
    try:
        while done < len(content):
            done += os.pwrite(file, content[done:], start + done)
    except OSError as error:
        raise not_written(path, error) from error
    return start


def pack_block(folder: Path, rates: Rates, filenames: list[str]) -> Block:
    """Write some clips' samples one behind the other. Raises `UserError` naming a file at fault."""
    sources, waveforms = [], []
    for name in filenames:
        sources.append(stamp(folder / name))
        waveforms.append(read_wav(folder / name, rates.orig_sample_rate))
    samples, scales = [], []
    for waveform in _resampled(waveforms, rates):
        ints, scale = quantise(waveform.numpy())
        samples.append(ints[0])
        scales.append(float(scale[0]))
    for name, source in zip(filenames, sources, strict=True):
        if stamp(folder / name) != source:
            raise UserError(f"{folder / name} changed while it was read: run the same command again")
    joined = np.concatenate(samples)
    sizes, times = zip(*sources, strict=True)
    return Block(
        start=_write_samples(joined),
        filename=filenames,
        length=[len(ints) for ints in samples],
        scale=scales,
        source_size=list(sizes),
        source_mtime_ns=list(times),
        sha256=hashlib.sha256(joined).hexdigest(),
    )


def _resampled(waveforms: list[torch.Tensor], rates: Rates) -> list[torch.Tensor]:
    """Each (1, samples) at the pack's rate; together where all are as long: a quarter less time."""
    resample = resampler(rates.orig_sample_rate, rates.sample_rate)
    if len({waveform.shape for waveform in waveforms}) == 1:
        return list(resample(torch.stack(waveforms)))
    return [resample(waveform) for waveform in waveforms]
