"""Signals at random moments, and kills exactly inside the writing of a file."""

import signal
from collections.abc import Iterator
from random import Random

from drills.drill import Disturbance, Drill, Unclear, disturb
from drills.faults import DieAtCall
from drills.tasks import Checking, Packing, Training, any_task
from drills.world import World
from drills.zygote import Child, Finished


class Kill(Disturbance):
    """kill -9 at a random moment."""

    def __init__(self, rng: Random, seconds: float):
        self.after = rng.uniform(0, seconds)
        self.text = f"kill -9 after {self.after:.3f} s"

    def act(self, child: Child) -> None:
        child.send(signal.SIGKILL, self.after)

    def check(self, done: Finished) -> None:
        if done.code != -signal.SIGKILL:
            raise Unclear(f"it ended by itself: {done}")


class Stop(Disturbance):
    """SIGTERM, SIGINT or SIGUSR1 at a random moment; now and then Ctrl-C twice."""

    def __init__(self, rng: Random, seconds: float):
        self.number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        self.twice = self.number == signal.SIGINT and rng.random() < 0.3
        self.after = rng.uniform(0, seconds)
        self.text = f"{self.number.name}{' twice' * self.twice} after {self.after:.3f} s"

    def act(self, child: Child) -> None:
        child.send(self.number, self.after)
        if self.twice:
            child.send(self.number, 0.002)

    def check(self, done: Finished) -> None:
        if done.code not in (128 + self.number, -self.number):  # before and after training it is not caught
            raise Unclear(f"not ended by {self.text}: {done}")
        if "saved in epoch" in done.err and (done.code < 0 or self.number.name not in done.error):
            raise Unclear(f"it does not say what ended it: {done}")


class InWriting(Disturbance):
    """A kill inside one of the calls that write, rename and remove."""

    def __init__(self, rng: Random, calls: dict[str, int]):
        function = rng.choice([name for name, count in calls.items() for _ in range(min(count, 10))])
        when = rng.choice(("before", "after", "torn") if function == "torch.save" else ("before", "after"))
        self.faults = [DieAtCall(function, rng.randint(1, calls[function]), when, rng.random())]
        self.text = str(self.faults[0])

    def check(self, done: Finished) -> None:
        if done.code != -signal.SIGKILL:
            raise Unclear(f"it ended by itself: {done}")


def _often(make, *args) -> Iterator[Disturbance]:
    return iter(lambda: make(*args), None)


def checking(world: World, drill: Drill) -> None:
    task = Checking(world, drill)
    disturb(task, _often(Kill, drill.rng, task.seconds))


def packing(world: World, drill: Drill) -> None:
    task = Packing(world, drill)
    disturb(task, _often(Kill, drill.rng, task.seconds))


def training(world: World, drill: Drill, stage: int = 1, how: type[Disturbance] = Kill) -> None:
    task = Training(world, drill, stage=stage)
    disturb(task, _often(how, drill.rng, task.seconds))


def writing(world: World, drill: Drill) -> None:
    task = any_task(world, drill)
    disturb(task, _often(InWriting, drill.rng, task.undisturbed.calls))
