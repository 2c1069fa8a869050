"""One drill: a task is disturbed, goes on, is disturbed again, and must end as if it had been left alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from drills.zygote import Child, Finished


class Failure(Exception):
    """A drill that went wrong; by itself, something untidy."""


class Lost(Failure):
    """Something finished is gone, or the result is not the undisturbed one."""


class Unclear(Failure):
    """A traceback or a message that does not name the file, where one clear line is due."""


@dataclass
class Drill:
    """``most`` faults at most, by chance from ``rng``, in a folder of its own; ``faults`` are those that have hit."""

    rng: random.Random
    folder: Path
    most: int
    faults: list[str] = field(default_factory=list)


class Task(Protocol):
    """Something that can be interrupted and run again."""

    drill: Drill
    seconds: float  # that it takes undisturbed

    def start(self, faults=()) -> Child:
        """Start it, or go on with it."""

    def check_kept(self, done: Finished) -> None:
        """After a fault: raise `Lost` where something that was finished is not there, whole."""

    def check_end(self, done: Finished) -> None:
        """When it is over: raise `Lost` where the result is not the undisturbed one."""


class Disturbance:
    """Nothing; others say in ``text`` what they do."""

    text = "nothing"
    faults = ()  # of `faults.py`, put into the process
    must_hit = False  # the task cannot end as if nothing had happened

    def act(self, child: Child) -> None:
        """What happens from outside while the task is running."""

    def check(self, done: Finished) -> None:
        """Raise `Unclear` where the task did not end as this lets expect."""

    def undo(self) -> None:
        """So that the task can go on."""


def disturb(task: Task, disturbances: Iterator[Disturbance]) -> None:
    """Run a task to its end, with the faults that come. One that it is too quick for does not count."""
    drill = task.drill
    done = None
    while done is None or done.code != 0:
        disturbance = next(disturbances) if len(drill.faults) < drill.most else Disturbance()
        child = task.start(disturbance.faults)
        disturbance.act(child)
        done = child.wait()
        must_be_orderly(done)
        if done.code == 0 and disturbance.must_hit:
            raise Lost(f"not noticed: {disturbance.text}")
        if done.code != 0:
            if len(drill.faults) == drill.most:
                raise Lost(f"it does not go on: {done}")
            drill.faults.append(disturbance.text)
            disturbance.check(done)
            disturbance.undo()
            task.check_kept(done)
    task.check_end(done)


def must_be_orderly(done: Finished) -> None:
    if done.orphans:
        raise Unclear("processes that it had started went on without it")
    if "Traceback" in done.err:
        raise Unclear(f"a traceback: {done.err[-1500:]}")


def must_name(done: Finished, *names: str) -> None:
    """Raise `Unclear` unless the process ended with exit code 2 and one line that has one of the names."""
    must_be_orderly(done)
    if done.code != 2 or not done.error.startswith("error: ") or done.err.count("error: ") != 1:
        raise Unclear(f"no clear error but {done}: {done.err[-1500:]}")
    if not any(name in done.error for name in names):
        raise Unclear(f"the error does not name {' or '.join(names)}: {done.error}")
