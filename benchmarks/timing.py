"""Time calls in turn and print tables. It imports torch and aum only: scan.py runs where dcase's needs are missing.

In every repetition all calls take turns, so that what else the machine does affects them alike.
"""

import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch

from aum.scan import build

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SAMPLE = 0.005  # seconds; shorter calls are repeated within a sample

Sample = tuple[float, float]  # seconds per call: wall time (on a GPU between events), CPU time of the process
Samples = dict[Hashable, list[Sample | None]]  # one per repetition; None where a slow call was left out
WALL, CPU = 0, 1


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(call: Callable[[], object], device: str = "cpu", n: int = 1) -> Sample:
    """Return the seconds per call of ``n`` calls in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if device == "cuda":
        end.record()
        torch.cuda.synchronize()
        wall = start.elapsed_time(end) / 1000
    return wall / n, cpu / n


def race(
    calls: dict[Hashable, Callable],
    repeats: int,
    device: str = "cpu",
    limit: float = math.inf,
    always: Callable[[Hashable], bool] = lambda key: False,
) -> Samples:
    """Time all calls in turn, ``repeats`` times. Each repetition begins with another call.

    A call that would take more than ``limit`` seconds in total runs in fewer repetitions, evenly spread and at least
    three, unless ``always(key)``. On the CPU a call whose first run takes that long is not repeated: that run is its
    figure (on a GPU the first run may include compilation).
    """
    samples: Samples = {key: [None] * repeats for key in calls}
    counts, inner = {}, {}
    for key, call in calls.items():
        progress(f"  warm-up: {key}")
        try:
            first = timed(call, device)
        except torch.OutOfMemoryError as error:
            progress(f"  out of memory: {error}")
            continue
        if first[WALL] > limit and device == "cpu":
            samples[key][0] = first
            continue
        again = min(timed(call, device)[WALL] for _ in range(2))  # compilation, caches and the allocator are warm
        inner[key] = max(1, math.ceil(SAMPLE / again))
        counts[key] = repeats if always(key) else int(min(repeats, max(3, limit / (again * inner[key]))))
    keys = list(counts)
    for r in range(repeats):
        progress(f"  repetition {r + 1} of {repeats}")
        turn = r % max(1, len(keys))
        for key in keys[turn:] + keys[:turn]:
            if counts[key] * (r + 1) // repeats > counts[key] * r // repeats:
                samples[key][r] = timed(calls[key], device, inner[key])
    return samples


def median(samples: list[Sample | None], which: int = WALL) -> float:
    """Return the median time in seconds; NaN where nothing could be timed."""
    return statistics.median([x[which] for x in samples if x] or [math.nan])


def milliseconds(samples: list[Sample | None], which: int = WALL, per: int = 1) -> str:
    """Return the median time in ms, divided by ``per``."""
    ms = 1000 * median(samples, which) / per
    return f"{ms:.4g}" if ms < 10_000 else f"{ms:.0f}"


def ratio(samples: list[Sample | None], base: list[Sample | None], which: int = WALL) -> str:
    """Return the ratio to ``base``, taken within each repetition that has both, as `spread` shows it."""
    return spread([x[which] / y[which] for x, y in zip(samples, base, strict=True) if x and y])


def spread(values: Sequence[float]) -> str:
    """Return the median with the quartiles in brackets."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one run)" if values else "-"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def table(header: list, rows: list[list]) -> str:
    """Return a Markdown table. Short rows are filled with empty cells."""
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *rows])


def publish(text: str, append: bool) -> None:
    """Print a text, and with --append add it to RESULTS.md."""
    print(text, flush=True)
    if append:
        with RESULTS.open("a") as file:
            file.write(f"\n{text.strip()}\n")


def machine(device: str = "cpu", threads: Sequence[int] = (1,)) -> str:
    """Return a heading and a table that name the machine, its load, the software, the commit and the command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    try:
        kernels = f"the compiled kernels use vectors of {build.library().aum_vector_lanes()} floats"
    except build.NotAvailable as error:
        kernels = f"no compiled kernels: {error}"
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [["CPU", f"{name}, {os.cpu_count()} cores; torch's kernels use {capability}, {kernels}"]]
    if device == "cuda":
        name = torch.cuda.get_device_name()
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        rows.append(["GPU", f"{name}, CUDA {torch.version.cuda}, driver {driver}"])
    else:
        load = " ".join(f"{x:.2f}" for x in os.getloadavg())
        rows.append(["threads; load before", f"{', '.join(map(str, threads))}; {load} (1, 5, 15 minutes)"])
    changed = output_of("git", "status", "--porcelain", "--", "aum", "dcase", "benchmarks", ":!benchmarks/RESULTS.md")
    matters = ("OMP_", "MKL_", "AUM_", "TRITON_", "MALLOC_", "GLIBC_")
    environment = sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith(matters))
    rows += [
        ["software", f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"],
        ["commit", commit() + (", with uncommitted changes" if changed else "")],
        ["command", f"`{' '.join([*environment, 'python', shlex.join(sys.argv)])}`"],
    ]
    return f"## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {name}\n\n{table(['', ''], rows)}"


def commit() -> str:
    return output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown"


def output_of(*command: str) -> str:
    """Return what a command prints; "" where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
