"""Measure the selective scan: the mixer block, its memory, a training step, and the growth of the cost with length.

Tables go to stdout, progress to stderr. contenders.py lists what is compared. The top of RESULTS.md says how.
Axes: b clips, l tokens.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aum
from aum.allocator import keep_freed_memory
from benchmarks import timing
from benchmarks.contenders import BOTH, FLOOR, FORWARD, Case, backends, published_kernels
from benchmarks.memory import bytes_saved, bytes_to_keep, peak, peak_on_gpu
from benchmarks.timing import CPU, WALL, median, milliseconds, ratio, table
from dcase.model.cp_mobile import CPMobile

LIMIT = 30  # seconds: a slower call is left out, and a contender repeats less where its figure would take longer
NONE = "-"


def race(calls: dict, args: argparse.Namespace, always: Callable = lambda key: True) -> timing.Samples:
    return timing.race(calls, args.repeats, args.device, LIMIT, always)


def too_slow(case: Case, name: str, b: int, l: int) -> str | None:
    """Return why not to run a contender at this size, judged by one clip of an eighth and a quarter; None to run it."""
    try:
        taken = []
        for length in (max(1, l // 8), max(2, l // 4)):
            call = case.calls(name, 1, length)[BOTH]
            taken.append(min(timing.timed(call, case.device)[WALL] for _ in range(2)))  # the first run may compile
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    growth = max(2.0, taken[1] / taken[0])  # for a doubled length: 2 or, with a quadratic backward, 4
    seconds = b * taken[1] * growth**2
    return None if seconds <= LIMIT else f"not run: about {seconds:.3g} s per call"


def measure_block(case: Case, args: argparse.Namespace) -> str:
    """Return tables of the block's time against the floor's."""
    measures = [("", WALL)] + [("CPU ", CPU)] * case.by_cpu
    columns = [f"{kind} {of}{x}" for kind in (FORWARD, BOTH) for of, _ in measures for x in ("ms", "x floor")]
    parts = []
    for b, l in args.shapes:
        reasons = {FLOOR: None} | {name: too_slow(case, name, b, l) for name in case.blocks}
        fitting = [name for name, reason in reasons.items() if not reason]
        calls = {(name, kind): call for name in fitting for kind, call in case.calls(name, b, l).items()}
        samples = race(calls, args, always=lambda key: key[0] == FLOOR)
        rows = []
        for name, reason in reasons.items():
            cells = [reason] if reason else []
            for kind, (_, which) in itertools.product((FORWARD, BOTH), () if reason else measures):
                taken, floor = samples[name, kind], samples[FLOOR, kind]
                cells += [milliseconds(taken, which), ratio(taken, floor, which) if name != FLOOR else "1"]
            runs = [] if reason else [sum(x is not None for x in samples[name, BOTH])]
            rows.append([name, *cells, *runs])
        title = f"### Block, (b, l) = ({b}, {l}), {case.where}"
        parts.append(f"{title}\n\n{table(['contender', *columns, 'runs'], rows)}")
    return "\n\n".join(parts)


def measure_threads(case: Case, args: argparse.Namespace) -> str:
    """Return a table of what a second thread gives backend cpu and the floor."""
    b, l = 4 if args.quick else 64, 65

    def with_threads(n: int, call: Callable) -> None:
        torch.set_num_threads(n)
        call()

    pairs = {
        (name, kind): call for name in ("aum, backend cpu", FLOOR) for kind, call in case.calls(name, b, l).items()
    }
    samples = race({(*key, n): partial(with_threads, n, call) for key, call in pairs.items() for n in (1, 2)}, args)
    rows = []
    for key in pairs:
        one, two = (samples[*key, n] for n in (1, 2))
        rows.append([*key, milliseconds(one), milliseconds(two), ratio(one, two)])
    header = ["contender", "what", "ms, 1 thread", "ms, 2 threads", "times as fast"]
    return f"### Two threads over one, (b, l) = ({b}, {l}), {case.precision}, wall time\n\n{table(header, rows)}"


def measure_memory(case: Case, args: argparse.Namespace) -> str:
    """Return a table of what the block keeps for its backward, and of what it needs at its peak."""
    rows = []
    for b, l in args.shapes:
        to_keep = bytes_to_keep(case, b, l)
        rows.append([f"({b}, {l})", "activations that anyone must keep", mib(to_keep), "1", NONE, NONE])
        for name in case.blocks:
            cells = [reason] if (reason := too_slow(case, name, b, l)) else []
            try:
                for n_bytes in () if reason else (bytes_saved(case, name, b, l), peak(case, name, b, l)):
                    cells += [mib(n_bytes), f"{n_bytes / to_keep:.2f}"] if n_bytes else [NONE, NONE]
            except torch.OutOfMemoryError:
                cells = ["out of memory"]
            rows.append([f"({b}, {l})", name, *cells])
    header = ["(b, l)", "contender", "saved, MiB", "x must keep", "peak, MiB", "peak x must keep"]
    how = "torch.cuda.max_memory_allocated" if args.device == "cuda" else "resident memory of a fresh process (VmHWM)"
    return (
        f"### Memory of the block, {case.precision}\n\n{table(header, rows)}\n\n"
        "*Saved*: storages that autograd saves in the forward, each once and whole, without parameters but with copies "
        "of them. *Must keep*: the inputs of the products and of the nonlinear operations, 5,872 values per token. "
        f"*Peak*: the most that forward + backward adds, with all gradients and the saved activations; {how}."
    )


def measure_step(case: Case, args: argparse.Namespace) -> str:
    """Return a table of the time of a whole training step of AuM-Small."""
    clips = 2 if args.quick else {"cpu": 8, "cuda": 64}[args.device]
    names = backends(args.device, case.dtype)
    steps = {f"aum, backend {name}": make_step(case, args, name, clips) for name in names}
    base, absent = "aum, backend torch", ""
    try:
        steps["the published construction"] = make_step(case, args, "mamba_ssm", clips, as_published=True)
        base = "the published construction"
    except ImportError as error:
        absent = f"\n\nNot installed: the published construction ({error})."
    if args.compile:  # only one: torch.compile would reuse one backend's code for another
        steps[f"aum, backend {names[0]}, compiled"] = make_step(case, args, names[0], clips, compiled=True)
    samples = race(steps, args, always=lambda key: False)
    rows = []
    for name, step in steps.items():
        taken, seconds = samples[name], median(samples[name])
        last = milliseconds(taken, CPU) if case.by_cpu else NONE  # of several threads it would include their waiting
        if args.device == "cuda" and not math.isnan(seconds):
            last = mib(peak_on_gpu(step))
        runs = sum(x is not None for x in taken)
        rows.append([name, milliseconds(taken), f"{clips / seconds:.1f}", ratio(taken, samples[base]), last, runs])
    last = "peak over parameters and moments, MiB" if args.device == "cuda" else "CPU ms"
    text = table(["contender", "ms per step", "clips/s", f"x {base}", last, "runs"], rows)
    title = f"### Training step of AuM-Small, {clips} clips of 256 x 65, {case.where}"
    return f"{title}\n\nForward, cross-entropy, backward and AdamW.\n\n{text}{absent}"


def measure_models(case: Case, args: argparse.Namespace) -> str:
    """Return a table of the named models' training steps beside CP-Mobile's, compiled with --compile too."""
    clips = 2 if args.quick else 64
    backend, names = backends(args.device, case.dtype)[0], ("cp_mobile", "aum_nano", "aum_small")
    how = ("", "compiled") if args.compile else ("",)
    steps = {
        (name, x): make_step(case, args, backend, clips, compiled=bool(x), name=name) for x in how for name in names
    }
    samples = race(steps, args, always=lambda key: False)
    rows = []
    for (name, x), step in steps.items():
        taken = samples[name, x]
        seconds = median(taken)
        last = mib(peak_on_gpu(step)) if args.device == "cuda" and not math.isnan(seconds) else NONE
        over = (ratio(samples[names[0], x], taken), ratio(samples[name, ""], taken))
        rows.append([name, x, milliseconds(taken), f"{clips / seconds:.1f}", *over, last])
    header = ["model", "", "ms per step", "clips/s", "x cp_mobile's clips/s", "x not compiled", "peak, MiB"]
    title = f"### Training steps, {clips} clips of 256 x 65, {case.where}, scan by {backend}"
    return f"{title}\n\nForward, cross-entropy, backward and AdamW.\n\n{table(header, rows)}"


def make_step(
    case: Case, args: argparse.Namespace, backend: str, clips: int, as_published=False, compiled=False, name="aum_small"
) -> Callable[[], None]:
    torch.manual_seed(0)
    shape = {"depth": 1} if args.quick else {}
    model = (CPMobile(10) if name == "cp_mobile" else aum.create_model(name, **shape)).to(case.device)
    if as_published:
        for layer in model.layers:
            layer.mixer.forward = published_kernels(case, layer.mixer)
    if compiled:  # as fit.py does
        model.compile(mode="reduce-overhead" if case.device == "cuda" else "default")
    optimizer = torch.optim.AdamW(aum.parameter_groups(model, 0.05), lr=1e-4)
    log_mel = torch.randn(clips, 1, 256, 65, device=case.device)
    scenes = torch.randint(10, (clips,), device=case.device)

    def step() -> None:
        with aum.use_backend(backend), case.autocast():
            loss = F.cross_entropy(model(log_mel), scenes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3 if compiled else 0):  # compile, record the graph, replay it
        step()
    return step


def measure_growth(case: Case, args: argparse.Namespace) -> str:
    """Return a table of the cost per clip against the number of tokens.

    b (l - 1) is the same in every call, so that all lengths use the same memory and fill the machine alike; with b = 1
    the short ones would show the overhead of a call.
    """
    tokens = 512 if args.quick else {"cpu": 8192, "cuda": 65536}[args.device]
    clips = {2**k + 1: tokens // 2**k for k in range(6, 14) if 2**k <= tokens}
    ours = next(iter(case.blocks))  # the fastest backend
    samples = race({(name, l): case.calls(name, b, l)[BOTH] for l, b in clips.items() for name in (ours, FLOOR)}, args)
    columns = [(name, which) for name in (ours, FLOOR) for which in (WALL, CPU)[: 1 + case.by_cpu]]
    rows = []
    for l, b in clips.items():
        cells = (milliseconds(samples[name, l], which, per=b) for name, which in columns)
        rows.append([l, b, *cells, ratio(samples[ours, l], samples[FLOOR, l], columns[-1][1])])
    exponents = []
    for name, which in columns:
        costs = [math.log(median(samples[name, l], which) / b) for l, b in clips.items()]
        exponents.append(f"{statistics.linear_regression([math.log(l) for l in clips], costs).slope:.3f}")
    kinds = {WALL: "wall", CPU: "CPU"}
    named = (f"{name}, ms per clip, {kinds[which]}" for name, which in columns)
    text = table(["l", "b", *named, f"x floor, {kinds[columns[-1][1]]}"], [*rows, ["exponent", "", *exponents]])
    return (
        f"### Growth of the block's cost with l, {BOTH}, {case.where}\n\n{text}\n\n"
        f"b (l - 1) = {tokens} in every call. The exponent is the slope of a least-squares line through log(time per "
        "clip) over log(l). All lengths take turns in each repetition."
    )


def measure_lengths(case: Case, args: argparse.Namespace) -> str:
    """Return a table of what ``lengths`` cost, where all are full and where they differ."""
    b, frames = (2, 64) if args.quick else (8, 321)
    torch.manual_seed(0)
    model = aum.create_model("aum_tiny", depth=1 if args.quick else 2, target_length=frames).to(case.device)
    x, lengths = torch.randn(b, 1, 256, frames, device=case.device), torch.linspace(frames // 4, frames, b).long()

    def call(*batches: tuple) -> None:
        with case.autocast():
            sum(model(*batch).square().sum() for batch in batches).backward()
        model.zero_grad()

    calls = {
        "no lengths": partial(call, (x,)),
        "lengths, all full": partial(call, (x, torch.full((b,), frames))),
        "lengths, from a quarter on": partial(call, (x, lengths)),
        "the same clips one by one": partial(
            call, *((clip[None, ..., :n],) for clip, n in zip(x, lengths.tolist(), strict=True))
        ),
    }
    samples, which = race(calls, args), CPU if case.by_cpu else WALL
    rows = [
        [name, milliseconds(samples[name], which), ratio(samples[name], samples["no lengths"], which)] for name in calls
    ]
    title = f"### Lengths, {b} clips of up to 256 x {frames}, AuM-Tiny of 2 layers, {BOTH}, {case.where}"
    return f"{title}\n\n{table(['batch', 'CPU ms' if case.by_cpu else 'ms', 'x no lengths'], rows)}"


MEASURES = {
    "block": measure_block,
    "memory": measure_memory,
    "step": measure_step,
    "models": measure_models,
    "growth": measure_growth,
    "lengths": measure_lengths,
}


def mib(n: int) -> str:
    return f"{n / 2**20:.1f}"


def shape(text: str) -> tuple[int, int]:
    b, l = text.split("x")
    return int(b), int(l)


def parse() -> argparse.Namespace:  # by argparse: a machine with a GPU may have torch but not what dcase needs
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--only", type=lambda x: x.split(","), default=[*MEASURES], help=f"measure only these of {','.join(MEASURES)}")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--threads", type=int, nargs="+", default=[1], help="numbers of CPU threads; CPU time is shown for 1 (1)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"),
        help="below float32: autocast over float32 parameters (float32; on a GPU bfloat16 too)")  # fmt: skip
    add("--shapes", type=shape, nargs="+", metavar="BxL", help="clips x tokens of the block (16x65 64x65 4x1025)")
    add("--repeats", type=int, default=15, help="repetitions; all contenders take turns in each (15)")
    add("--compile", action="store_true", help="also time the training step after model.compile()")
    add("--mamba_ref", type=Path, help="path to mamba_ssm/ops/selective_scan_interface.py, for selective_scan_ref")
    add("--append", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    add("--quick", action="store_true", help="tiny sizes, 3 repetitions: to see that it runs, never for figures")
    args = parser.parse_args()
    if set(args.only) - set(MEASURES):
        parser.error(f"--only takes {','.join(MEASURES)}")
    if args.quick and args.append:
        parser.error("--quick makes no figures worth appending")
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU here")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in every contender
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    args.shapes = args.shapes or ([(2, 65), (1, 129)] if args.quick else [(16, 65), (64, 65), (4, 1025)])
    args.repeats = 3 if args.quick else args.repeats
    return args


def parts_of(args: argparse.Namespace) -> Iterator[Callable[[], str]]:
    """Yield functions that make the parts of the tables, in order."""
    torch.set_num_threads(args.threads[0])
    case = Case(args.device, torch.float32, args.mamba_ref)
    case.check()
    intro = "Contenders, all of one function with one set of gradients (checked at the start, to 1e-3 in relative L2):"
    yield partial(timing.machine, args.device, args.threads)
    yield partial("\n".join, [intro, "", *case.legend])
    for dtype, n in itertools.product(args.dtype, args.threads if args.device == "cpu" else args.threads[:1]):
        torch.set_num_threads(n)
        case = Case(args.device, getattr(torch, dtype), args.mamba_ref)
        for name in (name for name in MEASURES if name in args.only):
            if name != "memory" or n == args.threads[0]:
                yield partial(MEASURES[name], case, args)
    case = Case(args.device, getattr(torch, args.dtype[0]))
    if "block" in args.only and (os.cpu_count() or 1) > 1 and "aum, backend cpu" in case.blocks:
        yield partial(measure_threads, case, args)


def main() -> int:
    args = parse()
    if args.device == "cpu":
        keep_freed_memory()  # as the training scripts do
    failures = 0
    for measure in parts_of(args):
        try:
            part = measure()
        except Exception as error:  # the other measures may work; an hour of them must not be lost
            traceback.print_exc()
            failures += 1
            message = " ".join(str(error).split())[:300]
            part = f"### Failed: {measure.func.__name__}\n\n{type(error).__name__}: {message}"
        timing.publish(f"{part}\n", args.append)  # at once, so that an interruption loses nothing
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
