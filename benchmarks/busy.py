"""Measure what one other busy program per core does to a training step with several threads.

    python benchmarks/busy.py
    python benchmarks/busy.py --settings "GOMP_SPINCOUNT=300000 GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=passive"

Each setting of the environment has a process of its own, which runs whole steps of train_base.py (front end,
augmentation, model, optimiser) on clips of noise. In every repetition they take turns on the quiet machine, and then on
the busy one, where a process per core only spins. Ratios are taken within each repetition. The machine must be quiet
otherwise: the table shows its load.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcase import cli
from dcase.errors import UserError, run
from dcase.machine import n_cores

OURS = "default"
SPINS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what the default sets, or leaves to the user
STEPS = "--steps_of"  # marks this program as the process of one setting


@dataclass(frozen=True)
class BusyBenchmark:
    settings: str = f"GOMP_SPINCOUNT=300000 {OURS} OMP_WAIT_POLICY=passive"
    """Environments to compare, separated by spaces, each NAME=VALUE or several with commas; "default": what dcase sets.
    The first is the base of the ratios: 300000 is libgomp's own spin count, about 3 ms."""
    model: str = "aum_nano"
    """Model to train."""
    threads: int = 2
    """Threads of a step."""
    repeats: int = 15
    """Repetitions."""
    steps: int = 3
    """Steps that are timed together, after one that is not."""
    other_sessions: bool = False
    """Start each spinning process in a session of its own, as from other terminals: Linux shares the cores among the
    sessions first, so that beside two of them a step has a third of the time of two cores, and not half."""
    append: bool = False
    """Add the table to benchmarks/RESULTS.md."""


def serve(model: str) -> None:
    """Print the wall time per step, seconds, of as many training steps as each line on stdin names."""
    with redirect_stdout(sys.stderr):
        import torch
        import torch.nn.functional as F

        from aum.allocator import keep_freed_memory
        from dcase.data.logmel import frames_of
        from dcase.runs.config import parse_base
        from dcase.training.lit import SceneClassifier

        keep_freed_memory()  # as the training scripts do
        config, _ = parse_base("", ["--model", model])
        rate = config.logmel.sample_rate
        module = SceneClassifier(config, frames_of(config.logmel, rate, rate)).train()
        waveform = torch.randn(config.machine.batch_size, 1, rate)
        length, device = torch.full((len(waveform),), rate), torch.zeros(len(waveform), dtype=torch.long)
        scene = F.one_hot(torch.arange(len(waveform)) % 10).float()
        module.logmel.fit([(waveform, length)])
        module.total_steps = 10**6
        made = module.configure_optimizers()

    def step() -> None:
        """Do what `SceneClassifier.training_step` and the Trainer do, without Lightning's own time."""
        torch.manual_seed(0)  # the same augmentation, and so the same work
        x, mix = module.augment.log_mel(module.logmel(module.augment.waveform(waveform, device, length), length))
        F.cross_entropy(module.forward_model(x, rounding=False).float(), mix(scene)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.fit.gradient_clip_val)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        made["optimizer"].zero_grad()

    for _ in range(3):  # compilation, caches and the allocator are warm
        step()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        step()
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - begin) / int(line), flush=True)


class Steps:
    """The process of one setting."""

    def __init__(self, setting: str, config: BusyBenchmark):
        self.setting, self.steps = setting, config.steps
        environment = {name: value for name, value in os.environ.items() if name not in SPINS}
        environment |= {"OMP_NUM_THREADS": str(config.threads)}
        environment |= dict(pair.split("=", 1) for pair in setting.split(",") if setting != OURS)
        command = [sys.executable, __file__, STEPS, config.model]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer() != config.threads:
            raise UserError(f"--settings {setting}: a step does not run with {config.threads} threads")

    def seconds(self) -> float:
        """Return the wall time of a step."""
        print(self.steps, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.setting} has ended: see above")
        return float(line)


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    if STEPS in sys.argv:
        return serve(sys.argv[-1])
    config = cli.parse(BusyBenchmark, __doc__)
    from benchmarks import timing

    head = timing.machine(threads=(config.threads,))  # before anything else, for its load
    settings = config.settings.split()
    found: dict[tuple[str, bool], list[float]] = {(setting, busy): [] for setting in settings for busy in (False, True)}
    with ExitStack() as stack:
        spin = [sys.executable, "-c", "while True: pass"]
        spinning = [
            stack.enter_context(ended(subprocess.Popen(spin, start_new_session=config.other_sessions)))
            for _ in range(n_cores())
        ]

        def make(busy: bool) -> None:
            for process in spinning:
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)

        make(busy=False)
        contenders = [Steps(setting, config) for setting in settings]
        for contender in contenders:
            stack.enter_context(ended(contender.process))
        for i in range(config.repeats):
            timing.progress(f"  repetition {i + 1} of {config.repeats}")
            for busy in (False, True):
                make(busy)
                turn = i % len(settings)
                for contender in contenders[turn:] + contenders[:turn]:
                    found[contender.setting, busy].append(contender.seconds())
            make(busy=False)

    def over(one: list[float], other: list[float]) -> str:
        return timing.spread([x / y for x, y in zip(one, other, strict=True)])

    rows = []
    for setting in settings:
        quiet, busy = found[setting, False], found[setting, True]
        times = [f"{1000 * statistics.median(x):.4g}" for x in (quiet, busy)]
        rows.append([f"`{setting}`", *times, over(quiet, found[settings[0], False]), over(busy, quiet),
                     over(busy, found[settings[0], False])])  # fmt: skip
    where = "in other sessions" if config.other_sessions else "in the same session"
    title = f"### {config.model}'s step, {config.threads} threads, beside {n_cores()} spinning processes {where}"
    first = "the first's quiet"
    header = ["environment", "quiet, ms", "busy, ms", f"quiet over {first}", "busy over quiet", f"busy over {first}"]
    timing.publish(f"{head}\n\n{title}\n\n{timing.table(header, rows)}\n", config.append)


if __name__ == "__main__":
    run(main)
