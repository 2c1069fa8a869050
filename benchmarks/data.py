"""Measure what stands between the recordings and a training step, at TAU22's full size: packing, loading, log-mel.

    python benchmarks/data.py --lists ../shared/tau22

A data folder of 64,580 clips of made-up sound under TAU22's names (full_size.py; 8.6 GB) and its pack (4.1 GB) are made
in a temporary folder, or in --folder and --pack_dir, which stay. What is compared takes turns within one run: each
ratio is taken within one repetition, and its median is shown with the quartiles. All files are in the page cache: they
are read once before anything is timed. The table goes to stdout, progress to stderr.
"""

import argparse
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aum.allocator import keep_freed_memory
from benchmarks.full_size import SAMPLE_RATE, make_full_size
from benchmarks.scan import RESULTS, ROOT, machine, milliseconds, output_of, table
from benchmarks.timing import CPU, WALL, Samples, median, progress, race, ratios, spread
from dcase.data.augment import freq_mixstyle, roll
from dcase.data.dataset import TAU22, Batch, Sound
from dcase.data.loading import Batches, loader, shuffled
from dcase.data.logmel import LOG_OFFSET, LogMel, LogMelConfig, frames_of
from dcase.data.pack import Pack, exists
from dcase.data.tau22 import Clips, load_clips
from dcase.errors import UserError, run
from dcase.machine import MachineConfig
from dcase.model.named import ModelConfig
from dcase.runs.config import TrainConfig
from dcase.training.lit import SceneClassifier

BATCH = 64  # clips
AT_A_TIME = 32  # batches that are timed together where they come from the pack
STEP_BATCHES = 10  # of an epoch of the training step
LONG_REPEATS = 2  # of what takes minutes
START_REPEATS = 5
SPLITS = ("split25", "test")

FAILED = "FAILED"  # in place of a figure

Row = list[str]  # what, goal, measured (mostly a ratio), in absolute figures


# ---- programs that run in a fresh process ----------------------------------------------------------------------------

# ``report`` prints, as one line: the clock, user and system time of the process and its workers, its peak memory
# (VmHWM: getrusage's would be that of the process it was forked from), that part of its memory which is no file's now,
# and the peak of its largest worker, which ``atexit`` knows: the workers have ended by then. Bytes and seconds.
REPORT = """
import atexit, json, resource, runpy, sys, time
from pathlib import Path

def report():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    own, workers = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({
        "clock": time.monotonic(),
        "cpu": own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime,
        "peak": 1024 * int(status["VmHWM"].split()[0]),
        "anonymous": 1024 * int(status["RssAnon"].split()[0]),
        "worker_peak": 1024 * workers.ru_maxrss,
    }))
"""

IMPORT_TORCH = """
import torch
report()
"""

# Arguments: data folder, pack. As dcase.data.loading makes the data sets, which imports Lightning beside.
DATA_SETS = """
import numpy as np
from dcase.data.dataset import TAU22, Sound
from dcase.data.pack import Pack
from dcase.data.tau22 import load_splits

folder, pack = Path(sys.argv[1]), Pack(Path(sys.argv[2]))
sound = Sound(pack.rates.sample_rate, pack=pack)
data_sets = [TAU22(clips, sound) for clips in load_splits(folder, "split25", "test")]
assert not any(pack.changed_sources(folder, data.rows) for data in data_sets)
"""

FIRST_BATCH = f"""
{DATA_SETS}
data_sets[0].__getitems__(np.random.default_rng(0).permutation(len(data_sets[0]))[:64].tolist())
report()
"""

EVERY_CLIP = f"""
{DATA_SETS}
for data in data_sets:
    for i in range(0, len(data), 64):
        data.__getitems__(range(i, min(i + 64, len(data))))
report()
"""

# Argument: data folder. The clips, chunks, processes and threads of packing.
READ_AND_RESAMPLE = """
from functools import partial

from dcase.data import packing
from dcase.data.cores import over_all_cores
from dcase.data.pack import Rates
from dcase.prepare import PrepareConfig
from dcase.data.sound import read_wav
from dcase.data.tau22 import check_files, load_splits

def read(folder, rates, names):
    packing._resampled([read_wav(folder / name, rates.orig_sample_rate) for name in names], rates)

folder, config = Path(sys.argv[1]), PrepareConfig()
rates = Rates(config.orig_sample_rate, config.sample_rate)
clips = load_splits(folder, "split25", "test")
for part in clips:
    check_files(part)
names = sorted({name.decode() for part in clips for name in part.filenames.tolist()})
chunks = [names[i : i + packing._CHUNK] for i in range(0, len(names), packing._CHUNK)]
atexit.register(report)
for _ in over_all_cores(partial(read, folder, rates), chunks, None):
    pass
"""

# Arguments: those of `python -m dcase.prepare`.
PREPARE = """
atexit.register(report)
runpy.run_module("dcase.prepare", run_name="__main__")
"""


def in_fresh_process(program: str, *arguments) -> SimpleNamespace:
    """What the program reports, and ``wall``: seconds from the start of its process until it did."""
    command = [sys.executable, "-c", REPORT + program, *map(str, arguments)]
    start = time.monotonic()  # one clock for all processes
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a program failed: {done.stderr.strip()[-500:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    return SimpleNamespace(wall=report["clock"] - start, **report)


def pack_anew(folder: Path, place: Path) -> SimpleNamespace:
    """`python -m dcase.prepare --pack` into ``place``; the pack that was there is removed first."""
    for pattern in ("manifest.json", "samples-*.i16", "index-*.npz", "journal-*.jsonl"):
        for path in place.glob(pattern):
            path.unlink()
    os.sync()  # what was written before is not to be waited for
    return in_fresh_process(PREPARE, "--pack", "--dataset_dir", folder, "--pack_dir", place)


# ---- the measures, each of them the rows of the table ----------------------------------------------------------------


def measure_packing(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """``prepare --pack`` against a program that reads and resamples the same clips over all cores, and no more."""
    alone, packing = [], []
    for r in range(LONG_REPEATS):
        progress(f"packing, repetition {r + 1} of {LONG_REPEATS}: reading and resampling alone")
        os.sync()
        alone.append(in_fresh_process(READ_AND_RESAMPLE, data.folder))
        progress(f"packing, repetition {r + 1} of {LONG_REPEATS}: prepare --pack")
        packing.append(pack_anew(data.folder, data.pack_dir))
    data.packing = packing[-1]
    what = f"prepare --pack of {data.n:,} clips over reading and resampling alone, all cores"
    rate = data.n / statistics.mean(x.wall for x in packing)
    rows = []
    for field, name, goal, more in (
        ("wall", "wall time", "1.3 x", f"; {rate:,.0f} clips/s"),
        ("cpu", "CPU time", "", ""),
    ):
        of_both = [[getattr(x, field) for x in runs] for runs in (packing, alone)]
        found = " and ".join(f"{x / y:.2f}" for x, y in zip(*of_both, strict=True))
        seconds = " against ".join(" and ".join(f"{x:.1f}" for x in values) + " s" for values in of_both)
        rows.append([f"{what}, {name}", goal, found, seconds + more])
    return rows


def measure_memory(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """Peak memory of packing, and of a process that reads every clip of the data sets once, against a tenth of them."""
    progress("memory of packing")
    tenth = make_full_size(args.lists, data.scratch / "tenth", args.fraction / 10)
    small = pack_anew(tenth, data.scratch / "tenth_pack")
    large = data.packing or pack_anew(data.folder, data.pack_dir)
    n_small, n_large = len(Pack(data.scratch / "tenth_pack")), data.n
    progress("memory of reading every clip")
    read_small = in_fresh_process(EVERY_CLIP, tenth, data.scratch / "tenth_pack")
    read_large = in_fresh_process(EVERY_CLIP, data.folder, data.pack_dir)
    index = sum(path.stat().st_size for path in data.pack_dir.glob("index-*.npz"))
    small_index = sum(path.stat().st_size for path in (data.scratch / "tenth_pack").glob("index-*.npz"))
    rows = []
    for what, before, after in (
        ("packing, the process that hands out the work", small.peak, large.peak),
        ("packing, the largest of those that read and write", small.worker_peak, large.worker_peak),
        ("a data set, every clip read once", read_small.peak, read_large.peak),
    ):
        rows.append([
            f"peak memory of {what}: growth from {n_small:,} to {n_large:,} clips",
            "the index",
            f"{(after - before) / 1e6:+.1f} MB ({(after - before) / (n_large - n_small):.0f} bytes a clip)",
            f"{before / 1e6:.0f} and {after / 1e6:.0f} MB; the index grows by {(index - small_index) / 1e6:.1f} MB",
        ])  # fmt: skip
    return rows


def measure_loading(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """Batches of 64 from the pack, in shuffled order over all clips, one thread: against reading and resampling file by
    file, and against copying the same bytes, from a memory map whose pages were all touched, to one array."""
    torch.set_num_threads(1)
    clips, pack = data.clips(), Pack(data.pack_dir)
    packed = TAU22(clips, Sound(pack.rates.sample_rate, pack=pack))
    order = shuffled(len(clips), 0, 0)
    batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    copy = Copy(packed)
    sources = [copy.addresses(batch) for batch in batches]
    if not np.array_equal(copy(sources[-1]), packed.__getitems__(batches[-1]).waveform[:, 0].numpy()):
        raise RuntimeError("what is copied is not what the data set gives")
    paths = [[str(clips.path(i)) for i in batch] for batch in batches[: args.repeats + 3]]  # 3 in the warm-up
    resample = torchaudio.transforms.Resample(SAMPLE_RATE, pack.rates.sample_rate)

    def read(batch: list[str]) -> None:
        for path in batch:
            resample(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))

    calls = {
        "pack": one_by_one(packed.__getitems__, batches, AT_A_TIME),
        "memcpy": one_by_one(copy, sources, AT_A_TIME),
        "files": one_by_one(read, paths, 1),
    }
    progress("loading")
    taken = race(calls, args, always=lambda key: True)
    clips_of = {"pack": AT_A_TIME * BATCH, "memcpy": AT_A_TIME * BATCH, "files": BATCH}
    samples = {key: [(x[WALL] / clips_of[key], x[CPU] / clips_of[key]) for x in taken[key]] for key in calls}
    rate = {key: f"{1 / median(samples[key]):,.0f}" for key in samples}
    speed = {key: f"{2 * packed.n_samples / median(samples[key]) / 1e9:.2f}" for key in ("pack", "memcpy")}
    return [
        [
            "clips/s from the pack into batches of 64, one process, over soundfile + resample per file",
            "30 x",
            wall_and_cpu(samples, "files", "pack"),
            f"{rate['pack']} and {rate['files']} clips/s",
        ],
        [
            "time of the same over a plain memcpy of the mapped rows",
            "within 2 x",
            wall_and_cpu(samples, "pack", "memcpy"),
            f"{speed['pack']} and {speed['memcpy']} GB/s",
        ],
    ]


def one_by_one(call: Callable, arguments: list, n: int) -> Callable[[], None]:
    """``n`` calls, each with the next one of the arguments; what they return is dropped at once, as in training."""
    left = itertools.cycle(arguments)

    def calls() -> None:
        for argument in itertools.islice(left, n):
            call(argument)

    return calls


class Copy:
    """Copies clips of a data set from a memory map of its pack to one array (64, samples), with memcpy alone."""

    def __init__(self, packed: TAU22):
        self.packed = packed
        self.samples = np.memmap(packed.sound.pack.path, np.int16, mode="r")
        self.samples[:: 4096 // 2].sum()  # touches every page
        self.batch = np.ones((BATCH, packed.n_samples), np.int16)
        self.places = [row.ctypes.data for row in self.batch]

    def addresses(self, indices: list[int]) -> list[int]:
        start = self.packed.sound.pack.start[self.packed.rows[indices]]
        return (self.samples.ctypes.data + 2 * start).tolist()

    def __call__(self, addresses: list[int]) -> np.ndarray:
        n_bytes = self.batch.strides[0]
        for place, address in zip(self.places, addresses, strict=True):
            ctypes.memmove(place, address, n_bytes)
        return self.batch


def measure_logmel(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """A batch of the pack, int16, to its log-mel, against torchaudio's clip by clip from the recordings' samples."""
    clips, pack, config = data.clips(), Pack(data.pack_dir), LogMelConfig()
    order = shuffled(len(clips), 0, 0)[:BATCH]
    batch = TAU22(clips, Sound(config.sample_rate, pack=pack)).__getitems__(order)
    recordings = [torch.from_numpy(soundfile.read(clips.path(i), dtype="float32")[0]) for i in order]
    logmel = LogMel(config, SAMPLE_RATE)
    resample = torchaudio.transforms.Resample(SAMPLE_RATE, config.sample_rate)
    mel = torchaudio.transforms.MelSpectrogram(
        config.sample_rate, config.n_fft, config.window_length, config.hop_length, n_mels=config.n_mels
    )

    def ours(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return logmel(*logmel.resampled(batch.waveform, batch.length, batch.scale, batch.sample_rate))

    def torchaudio_s(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return torch.stack([(mel(resample(recording)) + LOG_OFFSET).log() for recording in recordings])

    off = (ours(1)[:, 0] - torchaudio_s(1)).abs().max().item()
    if off > 0.01:  # the pack's int16 is in it
        raise RuntimeError(f"the two log-mels differ by {off:.3g}")
    progress("log-mel")
    calls = {(name, n): functools.partial(call, n) for name, call in (("ours", ours), ("torchaudio", torchaudio_s))
             for n in args.threads}  # fmt: skip
    samples = race(calls, args, always=lambda key: True)
    rows = []
    for n in args.threads:
        keys = ("torchaudio", n), ("ours", n)
        found = wall_and_cpu(samples, *keys) if n == 1 else spread(ratios(*(samples[key] for key in keys)))
        times = " and ".join(milliseconds(median(samples[key])) for key in reversed(keys))
        rows.append([f"packed batch to log-mel over torchaudio's clip by clip, {n} thread{'s' * (n > 1)}", "3 x", found,
                     f"{times} ms a batch; they differ by {off:.1g} at most"])  # fmt: skip
    return rows


def measure_step(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """Share of aum_nano's training step on the CPU that goes by in waiting for the next batch, after the first epoch:
    asking the loader for it, its start of an epoch included, over everything. On all cores."""
    torch.set_num_threads(max(args.threads))
    clips, pack = data.clips(), Pack(data.pack_dir)
    clips = clips.select(np.linspace(0, len(clips) - 1, STEP_BATCHES * BATCH).astype(int))
    packed, files = (TAU22(clips, x) for x in (Sound(pack.rates.sample_rate, pack=pack), Sound(SAMPLE_RATE)))
    sources = {
        "the pack": (packed, 0),
        "WAV files, num_workers 0": (files, 0),
        "WAV files, num_workers 2": (files, 2),
    }
    config = TrainConfig(model=ModelConfig("aum_nano"), machine=MachineConfig(accelerator="cpu"))
    module = SceneClassifier(config, frames_of(config.logmel, packed.n_samples, packed.sound.sample_rate))
    module.logmel.fit([module.sound(packed.__getitems__(range(BATCH)))])
    module.total_steps = 10**6
    step = training_step(module.train())
    loaders = {}
    for name, (dataset, num_workers) in sources.items():
        order = (shuffled(len(dataset), 0, epoch) for epoch in itertools.count())
        batches = Batches(len(dataset), BATCH, functools.partial(next, order))
        loaders[name] = loader(dataset, dataclasses.replace(config.machine, num_workers=num_workers), batches)
    taken = {name: [] for name in loaders}
    for r in range(1 + START_REPEATS):
        progress(f"training step, epoch {r + 1} of {1 + START_REPEATS}")
        for name, batches in loaders.items():
            taken[name].append(waited_and_all(batches, step))
    rows = []
    for name, epochs in taken.items():
        share = spread([100 * waited / whole for waited, whole in epochs[1:]]) + " %"
        figures = (statistics.median(column) / STEP_BATCHES for column in zip(*epochs[1:], strict=True))
        rows.append([f"share of aum_nano's training step (CPU, 64 clips) spent waiting for data: {name}",
                     "under 2 %" if name == "the pack" else "",
                     share, "{} of {} ms a step".format(*map(milliseconds, figures))])  # fmt: skip
    return rows


def training_step(module: SceneClassifier) -> Callable[[Batch], None]:
    """What `SceneClassifier.training_step` and the Trainer do with a batch, without Lightning's own time."""
    augment, rate = module.config.augment, module.config.logmel.sample_rate
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def step(batch: Batch) -> None:
        waveform, length = module.sound(batch)
        x = module.logmel(roll(waveform, round(augment.roll_sec * rate), length), length)
        x = freq_mixstyle(x, augment.mixstyle_p, augment.mixstyle_alpha)
        F.cross_entropy(module.model(module.masking(x)), batch.scene).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def waited_and_all(batches: torch.utils.data.DataLoader, step: Callable[[Batch], None]) -> tuple[float, float]:
    """Seconds of an epoch: waiting for batches, and all of them."""
    waited, start = 0.0, time.perf_counter()
    asked, left = start, iter(batches)
    while (batch := next(left, None)) is not None:
        waited += time.perf_counter() - asked
        step(batch)
        asked = time.perf_counter()
    end = time.perf_counter()
    return waited + end - asked, end - start


def measure_start(data: "FullSize", args: argparse.Namespace) -> list[Row]:
    """A fresh process: both splits' lists, the pack, the check that no recording has changed, and a first batch; and
    one that only imports torch."""
    programs = {"`import torch` alone": (IMPORT_TORCH,), "all": (FIRST_BATCH, data.folder, data.pack_dir)}
    found = {name: [] for name in programs}
    for r in range(-1, START_REPEATS):  # the first is the warm-up
        progress(f"start-up, {r + 1} of {START_REPEATS}")
        for name, program in programs.items():
            found[name].append(in_fresh_process(*program))
    fields = ("wall", "peak", "anonymous")
    values = {name: {x: [getattr(run, x) for run in runs[1:]] for x in fields} for name, runs in found.items()}
    torch_alone, everything = values.values()
    values["the difference"] = {x: np.subtract(everything[x], torch_alone[x]).tolist() for x in fields}
    rows = []
    for name, of in values.items():
        peak, anonymous = (statistics.median(of[x]) / 1e6 for x in ("peak", "anonymous"))
        rows.append(
            [
                f"start-up of a data set of {data.n:,} clips, process start to first batch: {name}",
                "under 3 s, under 300 MB" if name == "all" else "",
                f"{spread(of['wall'])} s, {peak:.0f} MB",
                f"peak of what is resident, pages of libraries' files included; {anonymous:.0f} MB without any file's",
            ]
        )
    return rows


def wall_and_cpu(samples: Samples, slower: object, faster: object) -> str:
    """A ratio by wall and by CPU time, each a median with its quartiles."""
    wall, cpu = (spread(ratios(samples[slower], samples[faster], which)) for which in (WALL, CPU))
    return f"{wall}; CPU time {cpu}"


# ---- the data --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FullSize:
    """The data folder, where its pack is, and a folder for what a measure needs beside."""

    folder: Path
    pack_dir: Path
    scratch: Path
    n: int  # clips of both splits
    packing: SimpleNamespace | None = None  # the last report of a packing process

    def clips(self) -> Clips:
        """Those of both splits."""
        parts = [load_clips(self.folder, split) for split in SPLITS]
        columns = ("filenames", "scene", "device", "location")
        joined = {column: np.concatenate([getattr(part, column) for part in parts]) for column in columns}
        return dataclasses.replace(parts[0], **joined)


def make_data(args: argparse.Namespace, scratch: Path) -> FullSize:
    """Make the folder, and read every file of it once, for the page cache."""
    folder = make_full_size(args.lists, args.folder or scratch / "full_size", args.fraction)
    data = FullSize(folder, args.pack_dir or scratch / "pack", scratch, 0)
    clips = data.clips()
    data.n = len(clips)
    progress(f"reading {data.n:,} files once, so that they are in the page cache")
    for i in range(data.n):
        clips.path(i).read_bytes()
    if not (exists(data.pack_dir) or "packing" in args.only):
        progress("packing")
        data.packing = pack_anew(data.folder, data.pack_dir)
    return data


def page_cache(data: FullSize) -> str:
    """Whether the machine can hold the files in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    needed = data.n * data.clips().path(0).stat().st_size
    return f"{data.n:,} clips in {needed / 1e9:.1f} GB of WAV files; {available / 1e9:.1f} GB of memory for files"


# ---- the command -----------------------------------------------------------------------------------------------------

# In the order of the table. Packing is measured first: the others read its pack.
MEASURES = {
    "loading": measure_loading,
    "logmel": measure_logmel,
    "step": measure_step,
    "start": measure_start,
    "packing": measure_packing,
    "memory": measure_memory,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lists", type=Path, default=ROOT.parent / "shared" / "tau22", help="folder of TAU22's split25.csv, test.csv")
    add("--folder", type=Path, help="data folder to make, or made already; it is kept (default: a temporary one)")
    add("--pack_dir", type=Path, help="folder for the pack; a pack in it is made anew (default: a temporary one)")
    add("--fraction", type=float, default=1.0, help="part of the clips (0 to 1; 1: what figures are for)")
    add("--repeats", type=int, default=15, help="repetitions of what takes less than a second (15)")
    add("--only", type=lambda x: x.split(","), default=list(MEASURES), help=f"of {','.join(MEASURES)} (all of them)")
    add("--append", action="store_true", help=f"append the table to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args(arguments)
    if set(args.only) - set(MEASURES):
        parser.error(f"--only is of {','.join(MEASURES)}")
    args.device, args.threads, args.budget, args.limit = "cpu", [1, 2], 60, 60  # as scan.machine and timing.race ask
    return args


def rows_of(data: FullSize, args: argparse.Namespace) -> list[Row]:
    """The table's, in its order. A measure that fails says so in a row: the others may work."""
    found = {}
    for name in sorted(args.only, key=lambda name: name != "packing"):
        try:
            found[name] = MEASURES[name](data, args)
        except Exception as error:
            traceback.print_exc()
            found[name] = [[name, "", f"{FAILED}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]]
        for row in found[name]:
            progress(" | ".join(row))
    return [row for name in MEASURES if name in found for row in found[name]]


def main() -> None:
    args = parse()
    head = machine(args)  # before anything else, for its load
    if output_of("git", "status", "--porcelain", "--", "dcase"):
        head += "\n\ndcase/ has uncommitted changes."
    keep_freed_memory()  # as the training scripts do
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_data_") as scratch:
            data = make_data(args, Path(scratch))
            size = page_cache(data)
            rows = rows_of(data, args)
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} cannot be written or read ({error.strerror})") from error
    text = f"{head}\n\n### Data, {size}\n\n{table(['what', 'goal', 'measured', 'in figures'], rows)}\n"
    print(text)
    if args.append:
        with RESULTS.open("a") as file:
            file.write("\n" + text)
    sys.exit(int(any(FAILED in row[2] for row in rows)))


if __name__ == "__main__":
    run(main)
