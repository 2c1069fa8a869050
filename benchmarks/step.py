"""Measure whole training and evaluation steps on a CPU, front end to optimiser, and their parts.

    python benchmarks/step.py                          # aum_nano, cp_mobile; 1 thread
    git worktree add /tmp/before e1924d0
    python benchmarks/step.py --against /tmp/before    # the same steps of another checkout beside them
    python benchmarks/step.py --threads 1 2            # two threads over one
    python benchmarks/step.py --models aum_nano --threads 2 --busy --settings GOMP_SPINCOUNT=300000 default

Each contender is a process of its own that waits for its turn. In every repetition each runs one step, so that what
else the machine does affects them alike. Ratios are taken within each repetition. Batches are noise: no file is read,
and speed does not depend on what the clips hold. A step is that of train_base.py with the
model's default flags but 64 clips, Lightning apart.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
BATCH = 64  # clips, of every model and checkout
PARTS = ("waveform", "log-mel", "augmentation", "forward", "backward", "optimiser")
OURS = "default"  # what dcase sets for OpenMP, unless the user did
SPINS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def worker(model: str, evaluate: bool) -> None:
    """Run a step for each line of stdin and print its parts: [[wall, CPU], ...] in seconds."""
    with redirect_stdout(sys.stderr):
        import dcase  # noqa: F401, I001 - before torch: it sets how OpenMP's threads wait
        import torch
        import torch.nn.functional as F

        from aum.allocator import keep_freed_memory
        from dcase.data.logmel import frames_of
        from dcase.runs.config import parse_base
        from dcase.training.lit import SceneClassifier

        keep_freed_memory()  # as the training scripts do
        config, _ = parse_base("", ["--model", model, "--batch_size", str(BATCH)])
        rate = config.logmel.sample_rate
        module = SceneClassifier(config, frames_of(config.logmel, rate, rate)).train(not evaluate)
        b = config.machine.batch_size
        sound = torch.randint(-3000, 3000, (b, 1, rate), dtype=torch.int16)  # as a pack has it
        scale, length, device = torch.full((b,), 2.0**-15), torch.full((b,), rate), torch.zeros(b, dtype=torch.long)
        scene = F.one_hot(torch.arange(b) % 10).float()
        module.logmel.fit([(sound * 2.0**-15, length)])
        module.total_steps = 10**6
        made = module.configure_optimizers()
    clock: list[tuple[float, float]] = []

    def lap() -> None:
        clock.append((time.perf_counter(), time.process_time()))

    def step() -> None:
        torch.manual_seed(0)  # the same augmentation, and so the same work
        clock.clear()
        lap()
        x, _ = module.logmel.resampled(sound, length, scale, rate)
        x = x if evaluate else module.augment.waveform(x, device, length)
        lap()
        x = module.logmel(x, length)
        lap()
        x, mix = (x, None) if evaluate else module.augment.log_mel(x)
        lap()
        with torch.set_grad_enabled(not evaluate):
            logits = module.forward_model(x, rounding=False).float()
        lap()
        if not evaluate:
            F.cross_entropy(logits, mix(scene)).backward()
            lap()
            if config.fit.gradient_clip_val:
                torch.nn.utils.clip_grad_norm_(module.parameters(), config.fit.gradient_clip_val)
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
            made["optimizer"].zero_grad()
            lap()

    for _ in range(3):  # compilation, caches and the allocator are warm
        step()
    print(b, flush=True)
    for _ in sys.stdin:
        step()
        laps = zip(clock, clock[1:], strict=False)
        print(json.dumps([[b - a for a, b in zip(*pair, strict=True)] for pair in laps]), flush=True)


class Contender:
    """A process that runs steps of a model, from a checkout of this repository, in an environment."""

    def __init__(self, root: Path, model: str, threads: int, setting: str, evaluate: bool):
        command = [sys.executable, str(HERE), "--worker", model, *(["--evaluate"] if evaluate else [])]
        environment = {name: value for name, value in os.environ.items() if name not in SPINS}
        environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        environment |= dict(pair.split("=", 1) for pair in setting.split(",") if setting != OURS)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=root, env=environment, **pipes)
        self.batch_size = int(self._line())
        self.steps: dict[bool, list] = {False: [], True: []}  # on a quiet machine, on a busy one

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender has ended, see above: {' '.join(map(str, self.process.args))}")
        return line

    def run(self, busy: bool) -> None:
        print("", file=self.process.stdin, flush=True)
        self.steps[busy].append(json.loads(self._line()))

    def totals(self, clock: int, busy: bool = False) -> list[float]:
        return [sum(part[clock] for part in step) for step in self.steps[busy]]


@contextmanager
def ended(process: subprocess.Popen):
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        type=lambda x: x.split(","),
        default=["aum_nano", "cp_mobile"],
        help="named models (aum_nano,cp_mobile)",
    )
    add("--against", type=Path, help="another checkout, whose first model takes part too")
    add("--threads", type=int, nargs="+", default=[1], help="CPU threads; several: the first model with each (1)")
    add("--evaluate", action="store_true", help="evaluation instead of training")
    add("--settings", nargs="+", default=[OURS], metavar="NAME=VALUE",
        help="environments of the first model, variables joined by commas (default: dcase's)")  # fmt: skip
    add("--busy", action="store_true", help="also with a spinning process per core, in every repetition")
    add("--other_sessions", action="store_true",
        help="start each spinning process in a session of its own, as from other terminals: Linux shares the cores "
        "among the sessions first")  # fmt: skip
    add("--repeats", type=int, default=15, help="repetitions; all take turns in each (15)")
    add("--append", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        return worker(args.worker, args.evaluate)
    sys.path.insert(0, str(ROOT))
    from benchmarks import timing

    head = timing.machine("cpu", args.threads)  # before anything else, for its load
    first, n = args.models[0], args.threads[0]
    wanted = [(ROOT, name, n, args.settings[0]) for name in args.models]
    wanted += [(ROOT, first, threads, args.settings[0]) for threads in args.threads[1:]]
    wanted += [(ROOT, first, n, setting) for setting in args.settings[1:]]
    wanted += [(args.against.resolve(), first, n, args.settings[0])] if args.against else []
    with ExitStack() as stack:
        spin = [sys.executable, "-c", "while True: pass"]
        spinning = [stack.enter_context(ended(subprocess.Popen(spin, start_new_session=args.other_sessions)))
                    for _ in range(os.cpu_count() if args.busy else 0)]  # fmt: skip

        def make(busy: bool) -> None:
            for process in spinning:
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)

        make(busy=False)
        contenders = {}
        for one in wanted:
            root, model, threads, setting = one
            label = f"{model}, {threads} thread{'s' * (threads > 1)}"
            label += f", `{setting}`" if len(args.settings) > 1 else ""
            label += f", {args.against}" if root != ROOT else ""
            timing.progress(f"  starting {label}")
            contenders[label] = Contender(*one, args.evaluate)
            stack.enter_context(ended(contenders[label].process))
        order = list(contenders.values())
        for r in range(args.repeats):
            timing.progress(f"  repetition {r + 1} of {args.repeats}")
            for busy in (False, True)[: 1 + args.busy]:
                make(busy)
                for contender in order[r % len(order) :] + order[: r % len(order)]:
                    contender.run(busy)
            make(busy=False)
    timing.publish(tables(args, contenders, head), args.append)


def tables(args: argparse.Namespace, contenders: dict[str, Contender], head: str) -> str:
    from benchmarks import timing

    def over(one: list[float], other: list[float]) -> str:
        return timing.spread([x / y for x, y in zip(one, other, strict=True)])

    base = next(iter(contenders.values()))
    clock = timing.CPU if args.threads == [1] else timing.WALL  # with several threads CPU time includes their waiting
    kind, names = ("wall", "CPU")[clock], PARTS[:4] if args.evaluate else PARTS
    rows, parts = [], []
    for label, contender in contenders.items():
        wall, cpu = (timing.median([(t, t) for t in contender.totals(k)]) for k in (timing.WALL, timing.CPU))
        row = [label, f"{1000 * wall:.0f}", f"{1000 * cpu:.0f}", f"{contender.batch_size / (wall, cpu)[clock]:.0f}"]
        row.append(over(contender.totals(clock), base.totals(clock)))
        if args.busy:
            busy = contender.totals(timing.WALL, True)
            row += [over(busy, contender.totals(timing.WALL)), over(busy, base.totals(timing.WALL))]
        rows.append(row)
        medians = (timing.median([tuple(step[k]) for step in contender.steps[False]], clock) for k in range(len(names)))
        parts.append([label, *(f"{1000 * x:.1f}" for x in medians)])
    header = ["contender", "wall ms", "CPU ms", f"clips/s, {kind}", f"time over the first's, {kind}"]
    header += ["busy over quiet, wall", "busy over the first's quiet, wall"] if args.busy else []
    what = "Evaluation" if args.evaluate else "Training step"
    return (
        f"{head}\n\n### {what}, {base.batch_size} clips, medians of {args.repeats}\n\n{timing.table(header, rows)}\n\n"
        f"Parts, {kind} ms:\n\n{timing.table(['contender', *names], parts)}\n"
    )


if __name__ == "__main__":
    main()
