"""Measure the selective scan: the mixer block, its memory, a training step, and growth with the sequence.

Tables go to stdout, progress to stderr. What is compared is said in contenders.py, how, at the top of RESULTS.md.
Axes: b clips, l tokens.
"""

import argparse
import datetime
import functools
import itertools
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aum
from aum.allocator import keep_freed_memory
from aum.scan import build
from benchmarks.contenders import (
    BOTH,
    D_MODEL,
    FLOOR,
    FORWARD,
    Contender,
    autocast,
    backends,
    block_calls,
    check,
    contenders,
    floor_calls,
    make_mixer,
    published_kernels,
    with_backend,
)
from benchmarks.memory import bytes_saved, bytes_to_keep, peak_on_cpu, peak_on_gpu
from benchmarks.timing import CPU, WALL, median, progress, race, ratios, spread, timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
NONE = "-"


def too_slow(contender: Contender, parameters: list, b: int, l: int, dtype, args: argparse.Namespace) -> str | None:
    """Why not to run it at this size, judged by one clip of an eighth and a quarter; None if it is worth its time."""
    lengths = (max(1, l // 8), max(2, l // 4))
    try:
        taken = []
        for length in lengths:
            call = block_calls(contender.block, parameters, 1, length, dtype, args)[BOTH]
            taken.append(min(timed(call, args.device)[WALL] for _ in range(2)))  # the first run may compile
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    growth = max(2.0, taken[1] / taken[0])  # for a doubled length: 2 or, with a quadratic backward, 4
    seconds = b * taken[1] * growth**2
    return None if seconds <= args.limit else f"not run: about {seconds:.3g} s per call"


# ---- the measures ----------------------------------------------------------------------------------------------------


def measure_block(mixer, found, dtype: torch.dtype, threads: int, args: argparse.Namespace) -> str:
    """Time of the block, against the floor."""
    by_cpu = args.device == "cpu" and threads == 1
    parameters = list(mixer.parameters())
    parts = []
    for b, l in args.shapes:
        progress(f"block at ({b}, {l}), {short(dtype)}, {threads} threads")
        reasons = {x.name: too_slow(x, parameters, b, l, dtype, args) for x in found}
        calls = {FLOOR: floor_calls(mixer, b, l, dtype, args)}
        calls |= {x.name: block_calls(x.block, parameters, b, l, dtype, args) for x in found if not reasons[x.name]}
        flat = {(name, kind): call for name, kinds in calls.items() for kind, call in kinds.items()}
        samples = race(flat, args, always=lambda key: key[0] == FLOOR)
        rows = []
        for name in (FLOOR, *reasons):
            row = [name]
            if reasons.get(name):
                rows.append(row + [reasons[name]])
                continue
            for kind in (FORWARD, BOTH):
                taken, floor = samples[name, kind], samples[FLOOR, kind]
                row += [milliseconds(median(taken)), spread(ratios(taken, floor)) if name != FLOOR else "1"]
                if by_cpu:
                    row += [milliseconds(median(taken, CPU))]
                    row += [spread(ratios(taken, floor, CPU)) if name != FLOOR else "1"]
            rows.append(row + [sum(x is not None for x in samples[name, BOTH])])
        columns = ["ms", "x floor"] + ["CPU ms", "CPU x floor"] * by_cpu
        header = ["contender", *(f"{kind} {x}" for kind in (FORWARD, BOTH) for x in columns), "runs"]
        parts.append(
            f"### Block, (b, l) = ({b}, {l}), {short(dtype)}{in_threads(threads, args)}\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts)


def measure_threads(mixer, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """What a second thread gives backend cpu and the floor."""
    b, l = 64, 65
    if args.quick:
        b = 4
    progress(f"two threads over one at ({b}, {l})")
    block = functools.partial(with_backend, "cpu", mixer)
    named = {"aum, backend cpu": block_calls(block, list(mixer.parameters()), b, l, dtype, args)}
    named[FLOOR] = floor_calls(mixer, b, l, dtype, args)

    def in_threads_of(n: int, call: Callable):
        torch.set_num_threads(n)
        call()

    keys = itertools.product(named, (FORWARD, BOTH), (1, 2))
    calls = {(name, kind, n): functools.partial(in_threads_of, n, named[name][kind]) for name, kind, n in keys}
    samples = race(calls, args, always=lambda key: True)
    rows = [
        [name, kind, *(milliseconds(median(samples[name, kind, n])) for n in (1, 2)),
         spread(ratios(samples[name, kind, 1], samples[name, kind, 2]))]
        for name in named for kind in (FORWARD, BOTH)
    ]  # fmt: skip
    header = ["contender", "what", "ms, 1 thread", "ms, 2 threads", "times as fast"]
    return f"### Two threads over one, (b, l) = ({b}, {l}), {short(dtype)}, wall time\n\n{table(header, rows)}"


def measure_memory(mixer, found, dtype: torch.dtype, args: argparse.Namespace) -> str:
    """What the block keeps for its backward, and what it needs at its peak."""
    parameters = list(mixer.parameters())
    rows = []
    for b, l in args.shapes:
        to_keep = bytes_to_keep(mixer, b, l, dtype)
        rows.append([f"({b}, {l})", "activations that anyone must keep", mib(to_keep), "1", NONE, NONE])
        for contender in found:
            progress(f"memory at ({b}, {l}), {short(dtype)}: {contender.name}")
            row = [f"({b}, {l})", contender.name]
            reason = too_slow(contender, parameters, b, l, dtype, args)
            if reason:
                rows.append([*row, reason])
                continue
            try:
                saved, extra = memory_of(contender, parameters, b, l, dtype, args)
            except torch.OutOfMemoryError:
                rows.append([*row, "out of memory"])
                continue
            row += [mib(saved), f"{saved / to_keep:.2f}"]
            rows.append([*row, *([mib(extra), f"{extra / to_keep:.2f}"] if extra else [NONE, NONE])])
    header = ["(b, l)", "contender", "saved, MiB", "x must keep", "peak, MiB", "peak x must keep"]
    legend = (
        "*Saved*: bytes of the storages that autograd saves in the forward, each counted once and whole, without "
        "parameters but with copies of them, stacked or cast. *Must keep*: the inputs of the products and of the "
        "nonlinear operations, hidden (b, l, 384), xz (b, l, 1536), and of both directions u (b, l, 768), x_proj's "
        "output (b, l, 56) and delta (b, l, 768), and y (b, l, 768): 5,872 values per token. *Peak*: the most that a "
        "forward + backward adds to what was there before, all gradients and the saved activations included; "
        + (
            "torch.cuda.max_memory_allocated."
            if args.device == "cuda"
            else "resident memory (Linux's VmHWM) of a fresh process for each figure, good to a few MiB. It sees the "
            "scratch of kernels too, which torch's profiler does not."
        )
    )
    return f"### Memory of the block, {short(dtype)}\n\n{table(header, rows)}\n\n{legend}"


def memory_of(contender: Contender, parameters: list, b: int, l: int, dtype: torch.dtype, args: argparse.Namespace):
    """Bytes saved for the backward, and at the peak (None where that cannot be told)."""
    hidden = torch.randn(b, l, D_MODEL, device=args.device, requires_grad=True)
    saved = bytes_saved(contender.block, hidden, parameters, autocast(args, dtype))
    if args.device == "cpu":
        return saved, peak_on_cpu(contender.name, b, l, dtype, args)
    call = block_calls(contender.block, parameters, b, l, dtype, args)[BOTH]
    call()  # compiled kernels, workspaces of cuBLAS
    return saved, peak_on_gpu(call)


def measure_step(dtype: torch.dtype, threads: int, args: argparse.Namespace) -> str:
    """Time of a whole training step of AuM-Small."""
    clips = args.batch or (2 if args.quick else {"cpu": 8, "cuda": 64}[args.device])
    names = backends(args.device, dtype)
    steps = {f"aum, backend {name}": make_step(name, clips, dtype, args) for name in names}
    absent = ""
    try:
        steps["the published construction"] = make_step("mamba_ssm", clips, dtype, args, as_published=True)
    except ImportError as error:
        absent = f"\n\nNot installed: the published construction ({error})."
    if args.compile:  # one alone: torch.compile would take what it compiled for one backend for another, too
        steps[f"aum, backend {names[0]}, model.compile()"] = make_step(names[0], clips, dtype, args, compiled=True)
    progress(f"training step of {clips} clips, {short(dtype)}, {threads} threads")
    samples = race(steps, args)
    base = next(name for name in ("the published construction", "aum, backend torch") if name in steps)
    rows = []
    for name, step in steps.items():
        seconds = median(samples[name])
        row = [name, milliseconds(seconds), f"{clips / seconds:.1f}", spread(ratios(samples[name], samples[base]))]
        if args.device == "cpu":  # of several threads, CPU time counts the waiting for each other, too
            row += [milliseconds(median(samples[name], CPU)) if threads == 1 else NONE]
        else:
            row += [NONE if math.isnan(seconds) else mib(peak_on_gpu(step))]
        rows.append(row + [sum(x is not None for x in samples[name])])
    last = "peak over parameters and moments, MiB" if args.device == "cuda" else "CPU ms"
    text = table(["contender", "ms per step", "clips/s", f"x {base}", last, "runs"], rows)
    title = f"### Training step of AuM-Small, {clips} clips of 256 x 65, {short(dtype)}{in_threads(threads, args)}"
    return f"{title}\n\nForward, cross-entropy, backward and AdamW.\n\n{text}{absent}"


def make_step(backend: str, clips: int, dtype: torch.dtype, args, as_published=False, compiled=False) -> Callable:
    torch.manual_seed(0)
    model = aum.create_model("aum_small").to(args.device)
    if as_published:
        for layer in model.layers:
            layer.mixer.forward = published_kernels(layer.mixer, args.device, dtype, None)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(aum.parameter_groups(model, 0.05), lr=1e-4)
    log_mel = torch.randn(clips, 1, 256, 65, device=args.device)
    scenes = torch.randint(10, (clips,), device=args.device)

    def step() -> None:
        with aum.use_backend(backend), autocast(args, dtype):
            loss = F.cross_entropy(model(log_mel), scenes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if compiled:
        step()
    return step


def measure_growth(mixer, dtype: torch.dtype, threads: int, args: argparse.Namespace) -> str:
    """Cost per clip against the number of tokens."""
    tokens = args.growth_tokens or (512 if args.quick else {"cpu": 8192, "cuda": 65536}[args.device])
    lengths = [2**k + 1 for k in range(6, 14) if 2**k <= tokens]
    name = backends(args.device, dtype)[0]
    title = f"aum, backend {name}"
    block = functools.partial(with_backend, name, mixer)
    calls, clips = {}, {}
    for l in lengths:
        clips[l] = tokens // (l - 1)
        calls[title, l] = block_calls(block, list(mixer.parameters()), clips[l], l, dtype, args)[BOTH]
        calls[FLOOR, l] = floor_calls(mixer, clips[l], l, dtype, args)[BOTH]
    progress(f"growth, {short(dtype)}, {threads} threads")
    samples = race(calls, args, always=lambda key: True)

    def exponent(of: str, which: int) -> str:
        costs = [math.log(median(samples[of, l], which) / clips[l]) for l in lengths]
        return f"{statistics.linear_regression([math.log(l) for l in lengths], costs).slope:.3f}"

    by_cpu = args.device == "cpu" and threads == 1
    measures = [("wall", WALL)] + [("CPU", CPU)] * by_cpu
    columns = [(of, kind, which) for of in (title, FLOOR) for kind, which in measures]
    rows = [
        [l, clips[l], *(milliseconds(median(samples[of, l], which) / clips[l]) for of, _, which in columns),
         spread(ratios(samples[title, l], samples[FLOOR, l], measures[-1][1]))]
        for l in lengths
    ]  # fmt: skip
    rows.append(["exponent", "", *(exponent(of, which) for of, _, which in columns), ""])
    header = ["l", "b", *(f"{of}, ms per clip, {kind}" for of, kind, _ in columns), f"x floor, {measures[-1][0]}"]
    return (
        f"### Growth of the block's cost with l, {BOTH}, {short(dtype)}"
        f"{in_threads(threads, args)}\n\n{table(header, rows)}\n\n"
        f"b (l - 1) = {tokens} in every call, so that all lengths use as much memory and fill the machine alike; with "
        "b = 1 the short ones would show the cost of calling alone. The exponent is the slope of a least-squares line "
        "through log(time per clip) over log(l). All lengths take turns in each repetition."
    )


# ---- words and tables ------------------------------------------------------------------------------------------------


def table(header: list, rows: list[list]) -> str:
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.4g}" if seconds < 10 else f"{seconds * 1000:.0f}"


def mib(n: int) -> str:
    return f"{n / 2**20:.1f}"


def short(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} autocast"


def in_threads(threads: int, args: argparse.Namespace) -> str:
    return "" if args.device == "cuda" else f", {threads} thread{'s' * (threads > 1)}"


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(args: argparse.Namespace) -> str:
    """On what, with what and by which command."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")), "")
    model = model or platform.processor() or platform.machine()
    try:
        kernels = f"the compiled kernels use vectors of {build.library().aum_vector_lanes()} floats"
    except build.NotAvailable as error:
        kernels = f"no compiled kernels: {error}"
    cpu = f"{model}, {os.cpu_count()} cores; torch's kernels use {torch.backends.cpu.get_cpu_capability()}, {kernels}"
    changed = output_of("git", "status", "--porcelain", "--", "aum", "benchmarks", ":!benchmarks/RESULTS.md")
    commit = output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    matters = ("OMP_", "MKL_", "AUM_", "TRITON_", "MALLOC_", "GLIBC_")
    environment = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(matters)]
    rows = [["CPU", cpu]]
    if args.device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        rows.append(
            ["GPU", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver {(driver or ['?'])[0]}"]
        )
    else:
        load = " ".join(f"{x:.2f}" for x in os.getloadavg())
        rows.append(["threads; load before", f"{', '.join(map(str, args.threads))}; {load} (1, 5, 15 minutes)"])
    rows += [
        ["software", f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"],
        ["commit", commit + (", with uncommitted changes" if changed else "")],
        ["command", f"`{' '.join([*sorted(environment), 'python', shlex.join(sys.argv)])}`"],
    ]
    day = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    name = torch.cuda.get_device_name() if args.device == "cuda" else model
    return f"## {day}, {name}\n\n{table(['', ''], rows)}"


def legend(found: list[Contender], absent: dict[str, str]) -> str:
    lines = [
        "Contenders, all of one function with one set of gradients (checked at the start, to 1e-3 in relative L2):",
        "",
    ]
    lines += [f"- {x.name}: {x.how}." for x in found]
    products = "in_proj, two x_proj, two dt_proj and out_proj"
    lines += [f"- {FLOOR}: the block's matrix products alone, {products} as F.linear, each on an input of its own."]
    lines += [f"- {name}: not installed; {how}." for name, how in absent.items()]
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def shape(text: str) -> tuple[int, int]:
    b, l = text.split("x")
    return int(b), int(l)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    measures = ("block", "memory", "step", "growth")
    add("--only", type=lambda x: x.split(","), default=measures, help=f"of {','.join(measures)}; all by default")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--threads",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of CPU threads; CPU time is shown for 1 (default: 1)",
    )
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"),
        help="below float32: autocast over float32 parameters (default: float32; on a GPU bfloat16 too)")  # fmt: skip
    add("--shapes", type=shape, nargs="+", metavar="BxL", help="clips x tokens of the block (16x65 64x65 4x1025)")
    add("--repeats", type=int, default=15, help="repetitions, in each of which all contenders take turns (15)")
    add("--budget", type=float, default=30, help="seconds for each contender and figure; slow ones repeat less (30)")
    add("--limit", type=float, default=30, help="seconds of a call beyond which a contender is left out (30)")
    add("--batch", type=int, help="clips of a training step (8 on the CPU, 64 on a GPU)")
    add("--growth_tokens", type=int, help="tokens of a call where l grows (8192 on the CPU, 65536 on a GPU)")
    add("--compile", action="store_true", help="also time the training step after model.compile()")
    add("--mamba_ref", type=Path, help="path to mamba_ssm/ops/selective_scan_interface.py, for selective_scan_ref")
    add("--markdown", type=Path, metavar="PATH", help="write the tables there, too")
    add("--append", action="store_true", help=f"append the tables to {RESULTS.relative_to(ROOT)}")
    add("--quick", action="store_true", help="tiny sizes, 3 repetitions: to see that it runs, never for figures")
    args = parser.parse_args(arguments)
    if set(args.only) - set(measures):
        parser.error(f"--only is of {','.join(measures)}")
    if args.quick and args.append:
        parser.error("--quick makes no figures worth appending")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    args.shapes = args.shapes or ([(2, 65), (1, 129)] if args.quick else [(16, 65), (64, 65), (4, 1025)])
    args.repeats = 3 if args.quick else args.repeats
    return args


def measures_of(args: argparse.Namespace) -> Iterator[Callable[[], str]]:
    """What makes each part of the tables, in their order."""
    mixer = make_mixer(args)
    dtypes = [getattr(torch, name) for name in args.dtype]
    found, absent = contenders(mixer, args.device, torch.float32, args.mamba_ref)
    check(found, mixer, args.device)
    yield functools.partial(machine, args)
    yield functools.partial(legend, found, absent)
    threads = [torch.get_num_threads()] if args.device == "cuda" else args.threads
    for dtype, n in itertools.product(dtypes, threads):
        torch.set_num_threads(n)
        fitting, _ = contenders(mixer, args.device, dtype, args.mamba_ref)
        if "block" in args.only:
            yield functools.partial(measure_block, mixer, fitting, dtype, n, args)
        if "memory" in args.only and n == threads[0]:
            yield functools.partial(measure_memory, mixer, fitting, dtype, args)
        if "step" in args.only:
            yield functools.partial(measure_step, dtype, n, args)
        if "growth" in args.only:
            yield functools.partial(measure_growth, mixer, dtype, n, args)
    if "block" in args.only and (os.cpu_count() or 1) > 1 and "cpu" in backends(args.device, dtypes[0]):
        yield functools.partial(measure_threads, mixer, dtypes[0], args)


def main() -> int:
    args = parse()
    if args.device == "cpu":
        keep_freed_memory()  # as the training scripts do
    parts, failures = [], 0
    try:
        for measure in measures_of(args):
            try:
                part = measure()
            except Exception as error:  # the other measures may work; an hour of them is not to be lost
                traceback.print_exc()
                failures += 1
                message = " ".join(str(error).split())[:300]
                part = f"### Failed: {measure.func.__name__}\n\n{type(error).__name__}: {message}"
            parts.append(part)
            print(part, end="\n\n", flush=True)
    finally:  # interrupted, too
        text = "\n\n".join(parts) + "\n"
        if args.markdown:
            args.markdown.write_text(text)
        if args.append and parts:
            with RESULTS.open("a") as file:
                file.write("\n" + text)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
