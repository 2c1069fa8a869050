"""How long training takes, from the steps that it has done: an epoch, what is left of a run, and when that ends."""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

FURTHER_RUNS = "DCASE_FURTHER_RUNS"  # environment variable: how many runs like this one --seeds starts after it
WARM_UP = 3  # first steps that do not count: compilation, caches, the loader's start
FEWEST, STEPS, SECONDS = 3, 20, 20  # measured steps before anything is said: so many, or so many seconds of them
LATEST = 200  # the median is over the last steps only, so that it follows a machine that becomes busy
FORWARD = 1 / 3  # of a training step's time, until a validation has been measured


@dataclass(frozen=True)
class Plan:
    """One training: ``epochs`` of ``batches`` each, with ``val_batches`` every so many epochs and at the end, or never
    (None)."""

    epochs: int
    batches: int
    every_n_epochs: int | None = None
    val_batches: int = 0

    def left(self, epoch: int = 1, done: int = 0) -> tuple[int, int, int]:
        """Return how much is left after ``done`` batches of an epoch, counted from 1, its validation included: first
        batches of an epoch, other batches, validation batches."""
        first = self.epochs - epoch + (done == 0)
        batches = self.batches * (self.epochs - epoch + 1) - done
        validations = sum(self.validates(n) for n in range(epoch, self.epochs + 1))
        return first, batches - first, validations * self.val_batches

    def validates(self, epoch: int) -> bool:
        """Return whether a validation follows this epoch, counted from 1."""
        return self.every_n_epochs is not None and (epoch % self.every_n_epochs == 0 or epoch == self.epochs)


class TimeLeft:
    """What is left of a run, in seconds and in words.

    An epoch's first batch, which waits for the loader and follows the checkpoints, is measured apart from the others.
    """

    def __init__(self, plan: Plan, later: Sequence[Plan] = (), earlier: Sequence[Plan] = ()):
        """``later``: what the run trains after this, on the same kind of batches; ``earlier``: what it has trained
        before, which further runs train, too."""
        self.plan, self.later, self.earlier = plan, later, earlier
        self.further_runs = int(os.environ.get(FURTHER_RUNS, 0))
        self._first, self._others = deque(maxlen=LATEST), deque(maxlen=LATEST)  # seconds
        self._validation: float | None = None  # seconds per batch
        self._seen = 0
        self._mark: float | None = None  # when the last batch ended; validations since then do not count

    def batch_ends(self, is_first: bool) -> None:
        now = time.monotonic()
        if self._seen >= WARM_UP:
            (self._first if is_first else self._others).append(now - self._mark)
        self._seen, self._mark = self._seen + 1, now

    def validation_ends(self, seconds: float) -> None:
        self._validation = seconds / self.plan.val_batches
        if self._mark is not None:  # None: a resumed run began with the validation
            self._mark += seconds

    def is_known(self) -> bool:
        """Return whether enough steps are measured."""
        measured = [*self._first, *self._others]
        return len(measured) >= FEWEST and (len(measured) >= STEPS or sum(measured) >= SECONDS)

    def _seconds(self, first: int, others: int, validation: int) -> float:
        step = statistics.median(self._others or self._first)
        to_begin = statistics.median(self._first) if self._first else step
        to_validate = FORWARD * step if self._validation is None else self._validation
        return to_begin * first + step * others + to_validate * validation

    def of_epoch(self) -> float:
        """Return the seconds of an epoch's training."""
        return self._seconds(1, self.plan.batches - 1, 0)

    def of_run(self, epoch: int, done: int) -> float:
        """Return the seconds from after ``done`` batches of an epoch, counted from 1, to the end of the run's
        training."""
        return sum(self._seconds(*left) for left in (self.plan.left(epoch, done), *(x.left() for x in self.later)))

    def in_words(self, epoch: int, done: int) -> str:
        """Return `of_run`, and what --seeds trains after it, with the time at which all that ends; "" where too few
        steps are measured, and at the end."""
        end = left = self.of_run(epoch, done) if self.is_known() else 0
        if left < 1 and not (left and self.further_runs):
            return ""
        said = f"about {spoken(left)} left"
        if self.further_runs:
            whole = sum(self._seconds(*each.left()) for each in (*self.earlier, self.plan, *self.later))
            end += self.further_runs * whole
            said += f", {spoken(end)} with the seeds after it"
        return f"{said} (until {clock(end)})"


def spoken(seconds: float) -> str:
    """Return a time in two digits: "45 s", "4.2 min", "10 h", "3.5 days"."""
    below = {"s": 90, "min": 90 * 60, "h": 48 * 3600, "days": math.inf}
    unit = next(unit for unit, limit in below.items() if seconds < limit)
    value = seconds / {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
    return f"{value:.2g} {unit}" if value < 99.5 else f"{value:.0f} {unit}"


def clock(seconds: float) -> str:
    """Return the local time in so many seconds: "16:20" today, "Tue 04:10" within six days, "Tue 3 Nov 04:10" later."""
    now = datetime.now()
    then = now + timedelta(seconds=seconds)
    date = f" {then.day} {then:%b}" if seconds > 6 * 86400 else ""
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%a}{date} {then:%H:%M}"
