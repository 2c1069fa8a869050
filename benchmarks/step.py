"""How fast the small models train and evaluate on a CPU: whole steps, front end to optimiser, and their parts.

    python benchmarks/step.py                          # aum_nano, cp_mobile; 1 thread
    git worktree add /tmp/before e1924d0
    python benchmarks/step.py --against /tmp/before    # the same steps of another checkout beside them

Each contender is a process of its own that waits for its turn. In every repetition each runs one step, so that what
else the machine does affects them alike. Ratios are taken within each repetition. Batches are noise: no file is read,
and speed does not depend on what the clips hold. A step has what the scripts' steps have by default, Lightning apart.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
PARTS = ("waveform", "log-mel", "augmentation", "forward", "backward", "optimiser")


def worker(name: str, batch: int, evaluate: bool) -> None:
    """Run a step for each line of stdin and print its parts: [[wall, CPU], ...] in seconds."""
    import torch

    from aum.allocator import keep_freed_memory
    from dcase.data.augment import Augment, AugmentConfig
    from dcase.data.logmel import LogMel, LogMelConfig, frames_of
    from dcase.model import named

    keep_freed_memory()
    torch.manual_seed(0)
    config = LogMelConfig()
    frames = frames_of(config, config.sample_rate, config.sample_rate)
    model = named.build(named.ModelConfig(name), config.n_mels, frames).train(not evaluate)
    logmel, augment = LogMel(config, config.sample_rate), Augment(AugmentConfig(), config, frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    sound = torch.randint(-3000, 3000, (batch, 1, config.sample_rate), dtype=torch.int16)
    scale, length = torch.full((batch,), 2.0**-15), torch.full((batch,), config.sample_rate)
    device, scene = torch.zeros(batch, dtype=torch.long), torch.randint(0, 10, (batch,))
    clock = [(0.0, 0.0)]

    def lap() -> None:
        clock.append((time.perf_counter(), time.process_time()))

    def step() -> None:
        clock.clear()
        lap()
        x, _ = logmel.resampled(sound, length, scale)
        x = x if evaluate else augment.waveform(x, device, length)
        lap()
        x = logmel(x, length)
        lap()
        x = x if evaluate else augment.log_mel(x)[0]
        lap()
        with torch.set_grad_enabled(not evaluate):
            loss = torch.nn.functional.cross_entropy(model(x), scene)
        lap()
        if not evaluate:
            loss.backward()
            lap()
            optimizer.step()
            optimizer.zero_grad()
            lap()

    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        step()
        laps = zip(clock, clock[1:], strict=False)
        print(json.dumps([[b - a for a, b in zip(*pair, strict=True)] for pair in laps]), flush=True)


class Contender:
    """A process that runs steps of a model from a checkout of this repository."""

    def __init__(self, root: Path, model: str, threads: int, batch: int, evaluate: bool):
        command = [sys.executable, str(HERE), "--worker", model, "--batch_size", str(batch)]
        command += ["--evaluate"] if evaluate else []
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=root, env=environment, **pipes)
        self.steps: list[list[list[float]]] = []

    def wait(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended: {' '.join(map(str, self.process.args))}")
        return line

    def run(self) -> None:
        print("", file=self.process.stdin, flush=True)
        self.steps.append(json.loads(self.wait()))

    def totals(self, clock: int) -> list[float]:
        return [sum(part[clock] for part in step) for step in self.steps]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=lambda x: x.split(","), default=["aum_nano", "cp_mobile"], help="named models (%(default)s)")
    add("--against", type=Path, help="another checkout, whose first model takes part too")
    add("--threads", type=int, nargs="+", default=[1], help="CPU threads; several: the first model with each (1)")
    add("--evaluate", action="store_true", help="evaluation instead of training")
    add("--batch_size", type=int, default=64, help="clips of a step (64)")
    add("--repeats", type=int, default=15, help="repetitions; all take turns in each (15)")
    add("--append", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        worker(args.worker, args.batch_size, args.evaluate)
        return
    sys.path.insert(0, str(HERE.parent.parent))
    from benchmarks import timing

    first, here = args.models[0], HERE.parent.parent
    wanted = {f"{name}, {args.threads[0]} thread{'s' * (args.threads[0] > 1)}": (here, name, args.threads[0])
              for name in args.models}  # fmt: skip
    wanted |= {f"{first}, {n} thread{'s' * (n > 1)}": (here, first, n) for n in args.threads[1:]}
    if args.against:
        wanted[f"{first} of {args.against}"] = (args.against.resolve(), first, args.threads[0])
    contenders = {}
    for label, (root, model, threads) in wanted.items():
        timing.progress(f"  starting {label}")
        contenders[label] = Contender(root, model, threads, args.batch_size, args.evaluate)
        contenders[label].wait()
    for r in range(args.repeats):
        timing.progress(f"  repetition {r + 1} of {args.repeats}")
        order = list(contenders.values())
        for contender in order[r % len(order) :] + order[: r % len(order)]:
            contender.run()
    base = next(iter(contenders.values()))
    clock = timing.CPU if len(args.threads) == 1 and args.threads[0] == 1 else timing.WALL
    names = PARTS[:4] if args.evaluate else PARTS
    rows, parts = [], []
    for label, contender in contenders.items():
        seconds = [timing.median([(t, t) for t in contender.totals(k)]) for k in (timing.WALL, timing.CPU)]
        ratios = [b / a for a, b in zip(base.totals(clock), contender.totals(clock), strict=True)]
        rows.append([label, *(f"{1000 * x:.0f}" for x in seconds), f"{args.batch_size / seconds[clock]:.0f}",
                     timing.spread(ratios)])  # fmt: skip
        of_part = [timing.median([tuple(step[k]) for step in contender.steps], clock) for k in range(len(names))]
        parts.append([label, *(f"{1000 * x:.1f}" for x in of_part)])
    kind = ("wall", "CPU")[clock]
    what = "Evaluation" if args.evaluate else "Training step"
    header = ["contender", "wall ms", "CPU ms", f"clips/s, {kind}", f"time over the first's, {kind}"]
    timing.publish(
        f"{timing.machine('cpu', args.threads)}\n\n### {what}, {args.batch_size} clips, medians of {args.repeats}\n\n"
        f"{timing.table(header, rows)}\n\nParts, {kind} ms:\n\n{timing.table(['contender', *names], parts)}\n",
        args.append,
    )
    for contender in contenders.values():
        contender.process.stdin.close()


if __name__ == "__main__":
    main()
