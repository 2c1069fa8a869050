"""Taking times: all calls in turn within every repetition, so that they share whatever the machine does meanwhile."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Hashable

import torch

SAMPLE = 0.005  # seconds; shorter calls are repeated within a sample
FIRST_RUNS = 2  # before a figure counts: compilation, caches, the allocator

Sample = tuple[float, float]  # seconds of a call: wall (on a GPU: between events), CPU time of the process
Samples = dict[Hashable, list[Sample | None]]  # one per repetition; None where a slow contender sat it out
WALL, CPU = 0, 1


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def timed(call: Callable[[], object], device: str, n: int = 1) -> Sample:
    """Seconds per call, of ``n`` calls in a row."""
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


def race(calls: dict[Hashable, Callable], args: argparse.Namespace, always: Callable = lambda key: False) -> Samples:
    """Time all calls in turn, ``args.repeats`` times over, each repetition from another one on.

    A call that would take more than ``args.budget`` seconds in all sits out evenly spread repetitions, unless
    ``always(key)``, but is timed three times; on the CPU, one whose first run takes more than ``args.limit`` seconds
    keeps that figure (on a GPU the first run may be compilation).
    """
    samples: Samples = {key: [None] * args.repeats for key in calls}
    counts, inner = {}, {}
    for key, call in calls.items():
        progress(f"  warm-up: {key}")
        try:
            first = timed(call, args.device)
        except torch.OutOfMemoryError as error:
            progress(f"  out of memory: {error}")
            continue
        if first[WALL] > args.limit and args.device == "cpu":
            samples[key][0] = first
            continue
        again = [timed(call, args.device)[WALL] for _ in range(FIRST_RUNS)]
        inner[key] = max(1, math.ceil(SAMPLE / min(again)))
        fit = int(args.budget / (min(again) * inner[key]))
        counts[key] = args.repeats if always(key) else min(args.repeats, max(3, fit))
    keys = list(counts)
    for r in range(args.repeats):
        progress(f"  repetition {r + 1} of {args.repeats}")
        turn = r % max(1, len(keys))
        for key in keys[turn:] + keys[:turn]:
            if counts[key] * (r + 1) // args.repeats > counts[key] * r // args.repeats:
                samples[key][r] = timed(calls[key], args.device, inner[key])
    return samples


def median(samples: list[Sample | None], which: int = WALL) -> float:
    """NaN where nothing could be timed."""
    return statistics.median([x[which] for x in samples if x] or [math.nan])


def ratios(samples: list[Sample | None], base: list[Sample | None], which: int = WALL) -> list[float]:
    """Of each repetition that has both."""
    return [x[which] / y[which] for x, y in zip(samples, base, strict=True) if x and y]


def spread(values: list[float]) -> str:
    """Median and, in brackets, the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one run)" if values else "-"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"
