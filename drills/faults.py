"""What is put into a process before its script begins: each has ``install()``."""

import importlib
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

CALLS = ("os.replace", "os.fsync", "os.link", "os.unlink", "torch.save")  # where a kill is the most dangerous


def _wrap(function: str, make: Callable[[Callable], Callable]) -> None:
    """Replace "module.name" by what ``make`` makes of it, in this process alone and not in those it starts."""
    module, _, name = function.rpartition(".")
    module = importlib.import_module(module)
    original, pid = getattr(module, name), os.getpid()
    disturbed = make(original)
    setattr(module, name, lambda *args, **kwargs: (disturbed if os.getpid() == pid else original)(*args, **kwargs))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class LogCalls:
    """A line per call of one of `CALLS`, so that `DieAtCall` knows how many there are."""

    path: Path

    def install(self) -> None:
        for function in CALLS:
            _wrap(function, lambda original, function=function: self._logged(original, function))

    def _logged(self, original: Callable, function: str) -> Callable:
        def logged(*args, **kwargs):
            _append(self.path, function)
            return original(*args, **kwargs)

        return logged


@dataclass(frozen=True)
class DieAtCall:
    """kill -9 at the n-th call of a function: before it, after it, or (torch.save) with a part of the file written."""

    function: str
    number: int
    when: str  # before, after or torn
    part: float = 0.5  # of a torn file

    def __str__(self) -> str:
        return f"kill -9 at call {self.number} of {self.function} ({self.when})"

    def install(self) -> None:
        _wrap(self.function, self._deadly)

    def _deadly(self, original: Callable) -> Callable:
        calls = 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == self.number and self.when == "before":
                _die()
            result = original(*args, **kwargs)
            if calls == self.number:
                if self.when == "torn":
                    os.truncate(args[1], int(self.part * os.path.getsize(args[1])))
                _die()
            return result

        return call


@dataclass(frozen=True)
class LogSteps:
    """A line "prefix epoch batch" per training step, to see that a resumed run goes on exactly where it was."""

    path: Path

    def install(self) -> None:
        def logged(original):
            def step(module, batch, batch_idx):
                _append(self.path, f"{module.log_prefix or '-'} {module.current_epoch} {batch_idx}")
                return original(module, batch, batch_idx)

            return step

        _wrap_step(logged)


@dataclass(frozen=True)
class AtStep:
    """Do something in the n-th training step that this process takes."""

    number: int
    do: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.do} at step {self.number}"

    def install(self) -> None:
        def disturbed(original):
            steps = 0

            def step(module, batch, batch_idx):
                nonlocal steps
                steps += 1
                if steps == self.number:
                    self.do()
                return original(module, batch, batch_idx)

            return step

        _wrap_step(disturbed)


def _wrap_step(make: Callable[[Callable], Callable]) -> None:
    from dcase.training.lit import SceneClassifier

    SceneClassifier.training_step = make(SceneClassifier.training_step)


def _append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


@dataclass(frozen=True)
class Raise:
    """A signal that a process sends to itself."""

    signal: int

    def __call__(self) -> None:
        signal.raise_signal(self.signal)

    def __str__(self) -> str:
        return signal.Signals(self.signal).name


@dataclass(frozen=True)
class LimitFileSize:
    """No file may become larger: a disk that is full, for those who may not mount one."""

    n_bytes: int

    def install(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.n_bytes))


@dataclass(frozen=True)
class Damage:
    """Make a file unusable, in one of the ways `DAMAGES`."""

    path: Path
    how: str
    seed: int

    def __str__(self) -> str:
        return f"{self.path.name} {self.how}"

    def __call__(self) -> None:
        rng, content = random.Random(self.seed), self.path.read_bytes()
        if self.how == "removed":
            self.path.unlink()
        elif self.how == "emptied":
            self.path.write_bytes(b"")
        elif self.how == "replaced by text":
            self.path.write_text("404: not found\n")
        elif self.how == "truncated":
            os.truncate(self.path, rng.randrange(len(content)))
        elif self.how == "with a flipped bit":
            place = rng.randrange(len(content))
            flipped = content[place] ^ (1 << rng.randrange(8))
            self.path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        elif self.how == "with NaN":
            samples, rate = soundfile.read(self.path)
            samples[rng.randrange(len(samples))] = np.nan
            soundfile.write(self.path, samples, rate, subtype="FLOAT")
        else:
            raise ValueError(self.how)
