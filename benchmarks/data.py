"""Measure the way from the recordings to a training step at TAU22's full size: packing, loading, log-mel.

    python benchmarks/data.py --lists ../shared/tau22

The data folder has 64,580 clips of made-up sound under TAU22's names (full_size.py; 8.6 GB), its pack 4.1 GB. Both are
made in a temporary folder, or in --folder and --pack_dir, where they stay; packing is measured in a temporary folder.
Contenders take turns; ratios are taken within each repetition and shown as the median with the quartiles. Every file is
read once before anything is timed, for the page cache. The table goes to stdout, progress to stderr.
"""

import ctypes
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aum.allocator import keep_freed_memory
from benchmarks import timing
from benchmarks.full_size import SAMPLE_RATE, make_full_size
from benchmarks.timing import CPU, median, milliseconds, progress, race, ratio, spread
from dcase import cli
from dcase.data.dataset import TAU22, Batch, Sound
from dcase.data.loading import Batches, loader, shuffled
from dcase.data.logmel import LOG_OFFSET, LogMel, LogMelConfig, frames_of
from dcase.data.pack import Pack, exists
from dcase.data.tau22 import Clips, load_splits
from dcase.errors import UserError, run
from dcase.model.named import ModelConfig
from dcase.runs.config import MachineConfig, TrainConfig
from dcase.training.lit import SceneClassifier

BATCH = 64  # clips
AT_A_TIME = 16  # batches that are loaded in one timed call
STEP_BATCHES = 10  # in an epoch of training steps
LONG_REPEATS, START_REPEATS = 2, 5  # of what takes minutes, seconds
THREADS = (1, 2)
FAILED = "FAILED"  # in place of a figure

Row = list[str]  # what, goal, measured (mostly a ratio), absolute figures


@dataclass(frozen=True)
class DataBenchmark:
    lists: Path = timing.ROOT.parent / "shared" / "tau22"
    """Folder with TAU22's split25.csv and test.csv."""
    folder: Path | None = None
    """Data folder to make and keep, or one that was made already; None: a temporary one."""
    pack_dir: Path | None = None
    """Folder of the pack to make and keep, or of one that was made already; None: a temporary one."""
    fraction: float = 1.0
    """Part of the clips to use, 0 to 1. Figures are for 1."""
    repeats: int = 15
    """Repetitions of what takes less than a second."""
    only: str = "loading,logmel,step,start,packing,memory"
    """Measure only these, with commas between them."""
    append: bool = False
    """Append the table to benchmarks/RESULTS.md."""


@dataclass(frozen=True)
class Data:
    folder: Path
    pack: Pack
    clips: Clips  # of both splits
    scratch: Path  # for temporary files
    config: DataBenchmark


def make_data(config: DataBenchmark, scratch: Path) -> Data:
    folder = make_full_size(config.lists, config.folder or scratch / "full_size", config.fraction)
    parts = load_splits(folder, "split25", "test")
    columns = ("filenames", "scene", "device", "location")
    clips = replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns})
    progress(f"reading {len(clips):,} files once, so that they are in the page cache")
    for i in range(len(clips)):
        clips.path(i).read_bytes()
    pack_dir = config.pack_dir or scratch / "pack"
    if not exists(pack_dir):
        progress("packing")
        fresh("pack", folder, pack_dir)
    return Data(folder, Pack(pack_dir), clips, scratch, config)


def fresh(program: str, folder: Path, pack_dir: Path) -> dict[str, float]:
    """Run a program of data_programs.py; return its report and "wall", the seconds from the start of its process."""
    command = [sys.executable, Path(__file__).with_name("data_programs.py"), program, folder, pack_dir]
    os.sync()  # what was written before must not be waited for
    start = time.monotonic()  # the same clock in all processes
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr.strip()[-500:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    return {"wall": report["clock"] - start, **report}


def pack_anew(folder: Path, place: Path) -> dict[str, float]:
    shutil.rmtree(place, ignore_errors=True)
    return fresh("pack", folder, place)


def measure_loading(data: Data) -> list[Row]:
    """Compare batches from the pack, in shuffled order on one thread, with reading and resampling each file, and with
    copying the same bytes from a memory map whose pages were all touched."""
    torch.set_num_threads(1)
    packed = TAU22(data.clips, Sound(data.pack.rates.sample_rate, pack=data.pack))
    order = np.array(shuffled(len(packed), 0, 0))
    batches = [order[i : i + BATCH].tolist() for i in range(0, len(order) - BATCH + 1, BATCH)]
    mapped = np.memmap(data.pack.path, np.int16, mode="r")
    mapped[:: 4096 // 2].sum()  # touches every page
    copied = np.ones((BATCH, packed.n_samples), np.int16)
    places = [row.ctypes.data for row in copied]
    addresses = [(mapped.ctypes.data + 2 * data.pack.start[packed.rows[batch]]).tolist() for batch in batches]
    resample = torchaudio.transforms.Resample(SAMPLE_RATE, data.pack.rates.sample_rate)

    def copy(sources: list[int]) -> None:
        for place, source in zip(places, sources, strict=True):
            ctypes.memmove(place, source, copied.strides[0])

    def read(batch: list[int]) -> None:
        for i in batch:
            resample(torch.from_numpy(soundfile.read(data.clips.path(i), dtype="float32")[0]))

    def several(call: Callable, arguments: itertools.cycle) -> None:
        for argument in itertools.islice(arguments, AT_A_TIME):
            call(argument)  # the result is dropped at once, as in training

    copy(addresses[-1])
    if not np.array_equal(copied, packed.__getitems__(batches[-1]).waveform[:, 0].numpy()):
        raise RuntimeError("the copy is not what the data set returns")
    calls = {"pack": (packed.__getitems__, batches), "memcpy": (copy, addresses), "files": (read, batches)}
    timed = {name: partial(several, call, itertools.cycle(arguments)) for name, (call, arguments) in calls.items()}
    samples = race(timed, data.config.repeats)
    rate = {name: AT_A_TIME * BATCH / median(samples[name]) for name in calls}  # clips/s
    speed = {name: f"{2 * packed.n_samples * rate[name] / 1e9:.2f}" for name in ("pack", "memcpy")}
    what = "clips/s from the pack into batches of 64, one process, over soundfile + resample per file"
    return [
        [what, "30 x", wall_and_cpu(samples, "files", "pack"), f"{rate['pack']:,.0f} and {rate['files']:,.0f} clips/s"],
        ["time of the same over a plain memcpy of the mapped rows", "within 2 x",
         wall_and_cpu(samples, "pack", "memcpy"), f"{speed['pack']} and {speed['memcpy']} GB/s"],
    ]  # fmt: skip


def measure_logmel(data: Data) -> list[Row]:
    """Compare the log-mel of a packed batch with torchaudio's, clip by clip from the recordings' samples."""
    config = LogMelConfig()
    order = shuffled(len(data.clips), 0, 0)[:BATCH]
    batch = TAU22(data.clips, Sound(config.sample_rate, pack=data.pack)).__getitems__(order)
    recordings = [torch.from_numpy(soundfile.read(data.clips.path(i), dtype="float32")[0]) for i in order]
    logmel = LogMel(config, SAMPLE_RATE)
    resample = torchaudio.transforms.Resample(SAMPLE_RATE, config.sample_rate)
    mel = torchaudio.transforms.MelSpectrogram(
        config.sample_rate, config.n_fft, config.window_length, config.hop_length, n_mels=config.n_mels
    )

    def ours(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return logmel(*logmel.resampled(batch.waveform, batch.length, batch.scale, batch.sample_rate))

    def theirs(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return torch.stack([(mel(resample(recording)) + LOG_OFFSET).log() for recording in recordings])

    off = (ours(1)[:, 0] - theirs(1)).abs().max().item()
    if off > 0.01:  # includes the rounding to the pack's int16
        raise RuntimeError(f"the two log-mels differ by {off:.3g}")
    samples = race(
        {(call.__name__, n): partial(call, n) for n in THREADS for call in (ours, theirs)}, data.config.repeats
    )
    rows = []
    for n in THREADS:
        slower, faster = samples["theirs", n], samples["ours", n]
        found = ratio(slower, faster) + (f"; CPU time {ratio(slower, faster, CPU)}" if n == 1 else "")
        times = f"{milliseconds(faster)} and {milliseconds(slower)} ms a batch; they differ by {off:.1g} at most"
        what = f"packed batch to log-mel over torchaudio's clip by clip, {n} thread{'s' * (n > 1)}"
        rows.append([what, "3 x", found, times])
    return rows


def measure_step(data: Data) -> list[Row]:
    """Return the share of aum_nano's training step that is spent waiting for the next batch, the loader's start of an
    epoch included, after the first epoch, with two threads on the CPU."""
    torch.set_num_threads(max(THREADS))
    clips = data.clips.select(np.linspace(0, len(data.clips) - 1, STEP_BATCHES * BATCH).astype(int))
    packed, files = (TAU22(clips, x) for x in (Sound(data.pack.rates.sample_rate, pack=data.pack), Sound(SAMPLE_RATE)))
    config = TrainConfig(model=ModelConfig("aum_nano"), machine=MachineConfig(accelerator="cpu"))
    module = SceneClassifier(config, frames_of(config.logmel, packed.n_samples, packed.sound.sample_rate)).train()
    module.logmel.fit([module.sound(packed.__getitems__(range(BATCH)))])
    module.total_steps = 10**6
    made = module.configure_optimizers()

    def step(batch: Batch) -> None:
        """Do what `SceneClassifier.training_step` and the Trainer do, without Lightning's own time."""
        waveform, length = module.sound(batch)
        x, _ = module.augment.log_mel(module.logmel(module.augment.waveform(waveform, batch.device, length), length))
        F.cross_entropy(module.model(x), batch.scene).backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        made["optimizer"].zero_grad()

    def epoch(batches: torch.utils.data.DataLoader) -> tuple[float, float]:
        """Return seconds: of the steps, and in total."""
        in_steps, start = 0.0, time.perf_counter()
        for batch in batches:
            begin = time.perf_counter()
            step(batch)
            in_steps += time.perf_counter() - begin
        return in_steps, time.perf_counter() - start

    sources = {"the pack": (packed, 0), "WAV files, num_workers 0": (files, 0), "WAV files, num_workers 2": (files, 2)}
    loaders = {}
    for name, (dataset, num_workers) in sources.items():
        orders = (shuffled(len(dataset), 0, epoch) for epoch in itertools.count())
        batches = Batches(len(dataset), BATCH, partial(next, orders))
        loaders[name] = loader(dataset, replace(config.machine, num_workers=num_workers), batches)
    found = []
    for _ in range(1 + START_REPEATS):
        found.append([epoch(batches) for batches in loaders.values()])
    rows = []
    for name, measured in zip(loaders, np.array(found[1:]).swapaxes(0, 1), strict=True):
        in_steps, whole = measured.T
        waited, ms = (1000 * np.median(x) / STEP_BATCHES for x in (whole - in_steps, whole))
        what = f"share of aum_nano's training step (CPU, 64 clips) spent waiting for data: {name}"
        share = spread(100 * (1 - in_steps / whole)) + " %"
        rows.append([what, "under 2 %" if name == "the pack" else "", share, f"{waited:.4g} of {ms:.4g} ms a step"])
    return rows


def measure_start(data: Data) -> list[Row]:
    """Compare a fresh process that opens both splits and reads a first batch with one that only imports torch."""
    found = []
    for _ in range(1 + START_REPEATS):  # the first is the warm-up
        reports = [fresh(program, data.folder, data.pack.folder) for program in ("import_torch", "first_batch")]
        found.append([[x["wall"], x["peak"] / 1e6, x["anonymous"] / 1e6] for x in reports])
    torch_only, everything = np.array(found[1:]).transpose(1, 2, 0)
    rows = []
    named = {"`import torch` alone": torch_only, "all": everything, "the difference": everything - torch_only}
    for name, (wall, peak, anonymous) in named.items():
        rows.append([
            f"start-up of a data set of {len(data.clips):,} clips, process start to first batch: {name}",
            "under 3 s, under 300 MB" if name == "all" else "",
            f"{spread(wall)} s, {np.median(peak):.0f} MB",
            f"resident at the peak, pages of libraries' files included; {np.median(anonymous):.0f} MB without files",
        ])  # fmt: skip
    return rows


def measure_packing(data: Data) -> list[Row]:
    """Compare ``prepare --pack`` with a program that only reads and resamples the same clips, over all cores."""
    reading, packing = [], []
    for _ in range(LONG_REPEATS):
        reading.append(fresh("read_and_resample", data.folder, data.pack.folder))
        packing.append(pack_anew(data.folder, data.scratch / "anew"))
    rate = f"; {len(data.clips) / statistics.mean(x['wall'] for x in packing):,.0f} clips/s"
    rows = []
    for key, name, goal, more in (("wall", "wall time", "1.3 x", rate), ("cpu", "CPU time", "", "")):
        what = f"prepare --pack of {len(data.clips):,} clips over reading and resampling alone, all cores, {name}"
        found = " and ".join(f"{x[key] / y[key]:.2f}" for x, y in zip(packing, reading, strict=True))
        seconds = (" and ".join(f"{x[key]:.1f}" for x in runs) + " s" for runs in (packing, reading))
        rows.append([what, goal, found, " against ".join(seconds) + more])
    return rows


def measure_memory(data: Data) -> list[Row]:
    """Compare the peak memory of packing, and of reading every clip once, with those for a tenth of the clips."""
    tenth = make_full_size(data.config.lists, data.scratch / "tenth", data.config.fraction / 10)
    found = []
    for folder, place in ((tenth, data.scratch / "tenth_pack"), (data.folder, data.scratch / "anew")):
        packing, reading = pack_anew(folder, place), fresh("every_clip", folder, place)
        index = sum(path.stat().st_size for path in place.glob("index-*.npz"))
        found.append((len(Pack(place)), index, packing["peak"], packing["worker_peak"], reading["peak"]))
    clips, index, *peaks = zip(*found, strict=True)
    names = ("packing, the process that hands out the work", "packing, the largest of those that read and write",
             "a data set, every clip read once")  # fmt: skip
    rows = []
    for name, (before, after) in zip(names, peaks, strict=True):
        what = f"peak memory of {name}: growth from {clips[0]:,} to {clips[1]:,} clips"
        growth = f"{(after - before) / 1e6:+.1f} MB ({(after - before) / (clips[1] - clips[0]):.0f} bytes a clip)"
        figures = (
            f"{before / 1e6:.0f} and {after / 1e6:.0f} MB; the index grows by {(index[1] - index[0]) / 1e6:.1f} MB"
        )
        rows.append([what, "the index", growth, figures])
    return rows


def wall_and_cpu(samples: timing.Samples, slower: str, faster: str) -> str:
    pair = samples[slower], samples[faster]
    return f"{ratio(*pair)}; CPU time {ratio(*pair, CPU)}"


MEASURES = {x.__name__.removeprefix("measure_"): x for x in (
    measure_loading, measure_logmel, measure_step, measure_start, measure_packing, measure_memory
)}  # fmt: skip


def main() -> None:
    config = cli.parse(DataBenchmark, __doc__)
    if unknown := set(config.only.split(",")) - set(MEASURES):
        raise UserError(f"--only {','.join(sorted(unknown))}: there is {','.join(MEASURES)}")
    head = timing.machine(threads=THREADS)  # before anything else, for its load
    keep_freed_memory()  # as the training scripts do
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_data_") as scratch:
            data = make_data(config, Path(scratch))
            n_bytes = len(data.clips) * data.clips.path(0).stat().st_size
            for name in (name for name in MEASURES if name in config.only.split(",")):
                progress(name)
                try:
                    rows += MEASURES[name](data)
                except Exception as error:  # the others may work
                    traceback.print_exc()
                    reason = " ".join(str(error).split())[:200]
                    rows.append([name, "", f"{FAILED}: {type(error).__name__}: {reason}"])
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} cannot be written or read ({error.strerror})") from error
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = f"{len(data.clips):,} clips in {n_bytes / 1e9:.1f} GB of WAV files; {memory / 1e9:.1f} GB of memory"
    text = f"{head}\n\n### Data, {size}\n\n{timing.table(['what', 'goal', 'measured', 'in figures'], rows)}\n"
    timing.publish(text, config.append)
    sys.exit(int(any(FAILED in row[2] for row in rows)))


if __name__ == "__main__":
    run(main)
