"""Run what needs an NVIDIA GPU: memcheck, the tests side by side, then the benchmarks, whatever the tests said.

    python benchmarks/gpu.py --prepare        with a network: data and wheels for the GPU's machine, into gpu_data/
    python benchmarks/gpu.py --quick          with a GPU: under 6 minutes on 16 cores and an H100
    python benchmarks/gpu.py --dry_run        the same plan without a GPU: tiny sizes, a CPU and Triton's interpreter

Everything goes into the folder --out (or $OUT): a log of each part, and results.md with the tables and with the minutes
that each part was given and took. The exit code is 1 where a part failed. The tests of aum need torch, pytest and what
aum needs; those of the scripts need dcase's packages too, and are left out, with a line, where one is missing.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "gpu_data"  # made by --prepare, to be carried along
SITE = "site"  # folder of the wheels' packages, beside the data
WHEELS = ("tyro==1.0.17", "docstring-parser", "typeguard", "soundfile==0.14.0", "torchinfo==1.8.0")
OF_SCRIPTS = ("torchaudio", "pytorch_lightning", "torchmetrics", "pandas", "matplotlib", "jinja2", "tyro", "soundfile",
              "torchinfo")  # fmt: skip
STAGES = ("environment", "memcheck", "tests", "benchmarks")  # in this order; the parts of "tests" run side by side

PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"


@dataclass
class Part:
    name: str
    stage: str
    minutes: float  # that it is expected to take on an H100 with --quick
    commands: list[list[str]]
    modules: tuple[str, ...] = ()  # without which it is left out
    tool: str = ""  # likewise
    env: dict[str, str] = field(default_factory=dict)
    tables: str = ""  # file for what it prints on stdout; the rest is in its log
    outcome: str = ""
    why: str = ""
    took: float = 0.0  # minutes


def plan(args: argparse.Namespace) -> list[Part]:
    """Return the parts in order."""
    python, out = sys.executable, args.out
    dry = args.dry_run
    test_env = {"TRITON_INTERPRET": "1"} if dry else {}

    def pytest(name: str, *more: str) -> list[str]:
        options = ["-q", "-rs", "-p", "no:cacheprovider", "--durations=5", f"--junitxml={out / name}.xml"]
        return [python, "-m", "pytest", *options, *more]

    def of_aum(name: str, minutes: float, select: str) -> Part:
        command = pytest(name, "--noconftest", "tests/test_gpu_aum.py", "-k", select)
        return Part(name, "tests", minutes, [command], env=test_env)

    def of_scripts(name: str, minutes: float, *select: str) -> Part:
        return Part(name, "tests", minutes, [pytest(name, *select)], modules=OF_SCRIPTS, env=test_env)

    memcheck = pytest("memcheck", "--noconftest", "tests/test_gpu_aum.py", "-k", "every_kernel")
    sanitizer = "compute-sanitizer"
    if not dry:
        memcheck = [sanitizer, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "9",
                    *memcheck]  # fmt: skip
    scan = [python, "benchmarks/scan.py", "--device", "cpu" if dry else "cuda"]
    scan += ["--quick"] if dry else ["--repeats", "5" if args.quick else "15"]
    block, steps = [*scan, "--only", "block,memory"], [*scan, "--only", "step,models", "--compile"]
    if args.quick and not dry:
        block += ["--shapes", "64x65", "4x1025"]
    return [
        Part("environment", "environment", 0.2, [[python, "-c", ENVIRONMENT], [python, "-m", "pip", "list"]]),
        # Without the allocator's cache, what is written behind a tensor's end belongs to no other tensor.
        Part("memcheck", "memcheck", 0.6, [memcheck], tool="" if dry else sanitizer,
             env=test_env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        of_aum("compiled", 1.5, "compiled"),
        of_aum("models", 0.8, "test_model"),
        of_aum("mixer_65", 0.5, "test_mixer and not 1025" if not dry else "test_mixer and 3"),
        of_aum("mixer_1025", 0.8, "test_mixer and 1025" if not dry else "test_mixer and 7"),
        of_aum("scan", 0.8, "test_scan"),
        of_aum("graphs", 0.5, "every_kernel or graph or second_device or self_test"),
        Part("stages", "tests", 1.2, stages(args), modules=OF_SCRIPTS),
        of_scripts("learns", 1.3, "tests/test_gpu.py", "-k", "learns"),
        of_scripts("scripts", 1.3, "tests/test_gpu.py", "-k", "not learns"),
        of_scripts("sound", 0.4, "tests/test_augment.py", "-k", "gpu_hears"),
        Part("block", "benchmarks", 0.7, [block], tables="block.md"),
        Part("steps", "benchmarks", 1.4, [steps], tables="steps.md"),
    ]  # fmt: skip


def stages(args: argparse.Namespace) -> list[list[str]]:
    """Return the commands that train and test both stages for an epoch on SynthTAU, packed beforehand if possible."""
    python, project, data = sys.executable, args.out / "runs", args.data / "SynthTAU"
    commands = []
    if not data.is_dir():
        data = args.out / "SynthTAU"
        clips = "--train_clips", "180", "--test_clips_per_device", "10"
        commands.append([python, "-m", "dcase.synth", "--out", str(data), *clips])
    common = ["--dataset_dir", str(data), "--project_name", str(project), "--logger", "none", "--report_audio", "False"]
    machine = ["--accelerator", "cpu"] if args.dry_run else ["--accelerator", "gpu", "--precision", "bf16-mixed"]
    machine += ["--num_workers", "0" if args.dry_run else "4"]
    fit = ["--n_epochs", "1", "--check_val_every_n_epoch", "1"]
    compiled = [] if args.dry_run else ["--compile"]
    small = ["--depth", "1", "--n_mels", "64"] if args.dry_run else []
    best = str(project / "stage2" / "checkpoints" / "best.ckpt")
    return [
        *commands,
        [python, "train_base.py", "--model", "aum_nano", "--run_id", "stage1", *small, *common, *machine, *fit,
         *compiled],
        [python, "train_device_specific.py", "--ckpt_id", "stage1", "--run_id", "stage2", "--only_devices", "a,b",
         *common, *machine, *fit],
        [python, "test_only.py", "--ckpt_path", best, *common, *machine],
    ]  # fmt: skip


ENVIRONMENT = """
import os, platform, shutil, subprocess, torch
print(platform.python_version(), platform.platform(), os.cpu_count(), "cores")
print("torch", torch.__version__, "for CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
"""


def run(parts: list[Part], args: argparse.Namespace, env: dict[str, str]) -> int:
    """Run the parts stage by stage until the time is up. Return the exit code."""
    began = time.monotonic()
    later = list(STAGES)
    for stage in STAGES:
        later.remove(stage)
        mine = [part for part in parts if part.stage == stage]
        # What hangs here must not cost those after it their share of the time.
        share = 1 - planned([x for x in parts if x.stage in later], args.jobs) / max(planned(parts, args.jobs), 1e-9)
        for part in mine:
            part.why = missing(part, env)
        at_once = min(args.jobs, len(mine)) if stage == "tests" else 1
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
        run_one = partial(run_part, out=args.out, env=env | threads, deadline=began + 60 * args.minutes * share)
        with ThreadPoolExecutor(max(1, at_once)) as pool:
            list(pool.map(run_one, mine))
        (args.out / "results.md").write_text(report(parts, args, (time.monotonic() - began) / 60))  # after each stage
    print((args.out / "results.md").read_text())
    return int(any(part.outcome == FAILED for part in parts))


def missing(part: Part, env: dict[str, str]) -> str:
    """Return what a part needs and this machine lacks; "" where it lacks nothing."""
    if part.tool and not shutil.which(part.tool, path=env.get("PATH")):
        return f"there is no {part.tool} here"
    if not part.modules:
        return ""
    program = "import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None], sep=', ')"
    command = [sys.executable, "-c", program, *part.modules]
    lacking = subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()
    return f"not installed: {lacking}" if lacking else ""


def run_part(part: Part, out: Path, env: dict[str, str], deadline: float) -> None:
    """Run a part's commands one after the other, until one fails or the time is up."""
    if part.why:
        part.outcome = LEFT_OUT
    else:
        began = time.monotonic()
        with (
            (out / f"{part.name}.log").open("w") as log,
            (out / (part.tables or f"{part.name}.log")).open("a") as tables,
        ):
            part.why = next(
                filter(None, (run_command(x, env | part.env, tables, log, deadline) for x in part.commands)), ""
            )
        part.outcome, part.took = FAILED if part.why else PASSED, (time.monotonic() - began) / 60
    print(f"{part.name}: {part.outcome}{part.why and f', {part.why}'}, {part.took:.1f} min", flush=True)


def run_command(command: list[str], env: dict[str, str], out, log, deadline: float) -> str:
    """Run a command, and all that it starts, until the deadline. Return why it failed; "" where it did not."""
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=log, start_new_session=True)
    try:
        code = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "not finished when its share of --minutes was up"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a finished command has left running
        process.wait()
    return f"exit code {code}: see the end of the log" if code else ""


def report(parts: list[Part], args: argparse.Namespace, took: float) -> str:
    """Return the table of the parts, the ends of the logs of those that failed, and the benchmarks' tables."""
    rows = [f"| {x.name} | {x.stage} | {x.minutes:.1f} | {x.took:.1f} | {x.outcome} | {x.why} |" for x in parts]
    text = f"# {'Dry run of make gpu' if args.dry_run else 'make gpu'}, {took:.1f} of {args.minutes:g} minutes\n\n"
    text += "\n".join(["| part | stage | planned, min | took, min | | |", "|---|---|---:|---:|---|---|", *rows])
    for part in parts:
        if part.outcome == FAILED:
            end = (args.out / f"{part.name}.log").read_text(errors="replace").splitlines()[-15:]
            text += f"\n\n## The end of {part.name}.log\n\n" + "\n".join(f"    {line}" for line in end)
    tables = [(args.out / x.tables).read_text() for x in parts if x.tables and (args.out / x.tables).exists()]
    return "\n\n".join([text, *tables]) + "\n"


def planned(parts: list[Part], jobs: int) -> float:
    """Return the minutes of the whole plan: the longest of the tests side by side, and the sum of the others."""
    tests = [part.minutes for part in parts if part.stage == "tests"]
    others = sum(part.minutes for part in parts if part.stage != "tests")
    return others + max(max(tests, default=0), sum(tests) / jobs)


def prepare(data: Path) -> None:
    """Make packed SynthTAU and fetch wheels of what a bare CUDA machine lacks: about 50 MiB, to be carried along."""
    folder, wheels = data / "SynthTAU", data / "wheels"
    if not folder.is_dir():
        clips = ["--train_clips", "540", "--test_clips_per_device", "10"]
        subprocess.run([sys.executable, "-m", "dcase.synth", "--out", str(folder), *clips], cwd=ROOT, check=True)
        command = [sys.executable, "-m", "dcase.prepare", "--dataset_dir", str(folder), "--pack"]
        subprocess.run(command, cwd=ROOT, check=True)
        shutil.rmtree(folder / "audio")  # the pack has all of it
    for_python = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for_python += [
        x
        for tag in ("2_28", "2_17", "2014")
        for x in ("--platform", f"manylinux{'' if tag == '2014' else '_'}{tag}_x86_64")
    ]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *for_python, "--dest", str(wheels), *WHEELS]
    subprocess.run(command, check=True)
    print(f"carry {data} along, beside the repository's files")


def install(data: Path, out: Path) -> dict[str, str]:
    """Install the wheels that were carried along into a folder of their own. Return the parts' environment."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wheels, site = sorted((data / "wheels").glob("*.whl")), data / SITE
    if wheels and not site.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(site)]
        with (out / "wheels.log").open("w") as log:
            subprocess.run([*command, *map(str, wheels)], stdout=log, stderr=log)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(site)])}  # last: what is installed comes first


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu_out")),
        help="folder for all results ($OUT, gpu_out)",
    )
    add("--quick", action="store_true", help="fewer sizes and repetitions of the benchmarks; 6 minutes at most")
    add("--minutes", type=float, help="stop, and kill what runs, after so long (6 with --quick, else 30)")
    add("--jobs", type=int, help="tests that run side by side (10; with --dry_run 1)")
    add("--only", type=lambda x: x.split(","), help="run only these parts, as memcheck,block")
    add("--data", type=Path, default=DATA, help="what --prepare made (gpu_data in the repository)")
    add("--prepare", action="store_true", help="make --data, and end: on a machine with a network and dcase's packages")
    add("--dry_run", action="store_true", help="without a GPU, to see that the plan works; its figures mean nothing")
    add("--plan", action="store_true", help="print the plan, and end")
    args = parser.parse_args()
    args.minutes = args.minutes or (6 if args.quick else 30)
    args.jobs = args.jobs or (1 if args.dry_run else 10)
    args.out, args.data = args.out.absolute(), args.data.absolute()
    names = [part.name for part in plan(args)]
    if args.only and set(args.only) - set(names):
        parser.error(f"--only takes {','.join(names)}")
    return args


def main() -> int:
    args = parse()
    if args.prepare:
        prepare(args.data)
        return 0
    parts = [part for part in plan(args) if not args.only or part.name in args.only]
    for part in parts:
        print(f"{part.stage:12} {part.name:12} {part.minutes:4.1f} min")
    print(f"{'':25} {planned(parts, args.jobs):4.1f} min in all on an H100, by estimate")
    if args.plan:
        return 0
    has_gpu = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if not args.dry_run and subprocess.run([sys.executable, "-c", has_gpu]).returncode:
        print(
            "torch sees no GPU: `python -m dcase.doctor` says why; --dry_run runs the plan without one", file=sys.stderr
        )
        return 2
    if args.out.exists() and any(args.out.iterdir()):
        print(f"--out: {args.out} is not empty", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    env = install(args.data, args.out)
    if args.dry_run:
        env["OMP_NUM_THREADS"] = "1"  # the machine may have other work
    code = run(parts, args, env)
    print(f"everything is in {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
