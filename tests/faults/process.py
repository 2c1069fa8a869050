"""Run a command in a process that is forked from this one, which has imported torch and Lightning, and disturb it."""

import math
import multiprocessing
import operator
import os
import re
import resource
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import count
from pathlib import Path

import torch

from dcase import errors
from dcase.training.lit import SceneClassifier

LIMIT = 300  # seconds after which a command counts as hung; on an idle machine the longest takes 5
_PATIENCE = 3  # seconds of silence after which processes have outlived the command that started them
CALLS = {"os.replace": os, "os.fsync": os, "os.link": os, "os.unlink": os, "torch.save": torch}  # kills hurt most here
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int | None  # minus the signal's number where one ended it; None: it hung
    said: str  # on stdout and stderr
    seconds: float  # since its main() was called
    orphans: bool  # processes that it had started outlived it
    calls: Counter  # of `CALLS`
    steps: list[tuple[str, int, int]]  # (device or "", epoch, batch) of each training step

    @property
    def error(self) -> str:
        """The last line that it said, without a progress bar before the error."""
        line = (self.said.replace("\r", "\n").strip().splitlines() or [""])[-1]
        return line[max(0, line.find("error: ")) :]

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.said[-1500:]}"


@dataclass
class Fault:
    """A disturbance of one run of a command. This one is none: the command must succeed."""

    text: str = ""
    codes: Sequence[int] = (0,)  # exit codes that it may end with
    named: Sequence[str] = ()  # one of these must be in its error
    signals: Sequence[tuple[float, int]] = ()  # (seconds after its main() was called, number), in order
    call: tuple[str, int] = ("", 0)  # the n-th call of one of `CALLS`, or of "training_step"
    instead: Callable = operator.call  # instead(original, *args, **kwargs) in place of this call
    max_file: int = 0  # bytes that a file may have; 0: any number
    after: Callable[[Finished], object] = bool  # mends what must be mended before the command can go on
    always_counts: bool = False  # even where the command succeeds


def run(command: Sequence, cwd: Path, fault: Fault = Fault()) -> Finished:  # noqa: B008  it is not changed
    """Run a command, (main, *flags), in a new process group; wait for its end and that of the processes it started."""
    reader, writer = os.pipe()  # not a file: a limit on the size of files must not stop the output
    process = _fork.Process(target=_become, args=(command, cwd, fault, writer))
    process.start()
    os.close(writer)
    text, signals, began, ended, late = b"", list(fault.signals), None, False, False
    deadline = time.monotonic() + LIMIT
    while not late:
        due = began + signals[0][0] if signals and began else math.inf
        wait = _PATIENCE if ended else min(0.01, max(0, due - time.monotonic()))
        ready = select.select([reader], [], [], wait)[0]
        if ready:
            piece = os.read(reader, 1 << 16)
            if not piece:  # all processes have ended
                break
            text += piece
        late = (ended and not ready) or time.monotonic() > deadline
        if not began and b"\0log begun\n" in text:
            began = time.monotonic()
        ended = process.exitcode is not None
        if not ended and time.monotonic() >= due:
            os.kill(process.pid, signals.pop(0)[1])
    if late:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os.close(reader)
    process.join()
    said = text.decode(errors="replace")
    log = [line.split() for line in re.findall(r"\0log (.*)\n", said)]
    return Finished(
        code=None if late and not ended else process.exitcode,
        said=re.sub(r"\0log .*\n", "", said),
        seconds=time.monotonic() - (began or deadline),
        orphans=late and ended,
        calls=Counter(line[0] for line in log if line[0] in CALLS),
        steps=[(line[1].strip("-/"), int(line[2]), int(line[3])) for line in log if line[0] == "training_step"],
    )


def _become(command: Sequence, cwd: Path, fault: Fault, writer: int) -> None:
    """In the child: become the command. Lines "\\0log ..." tell its steps and `CALLS`."""
    main, *flags = command
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in programs that run in the background
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout.reconfigure(line_buffering=True)  # in order with stderr
    os.chdir(cwd)
    sys.argv = [f"{main.__module__}.py", *map(str, flags)]

    def watch(place, name: str, detail: Callable[..., str] = lambda *_: "") -> None:
        attribute, pid, numbers = name.split(".")[-1], os.getpid(), count(1)
        original = getattr(place, attribute)

        @wraps(original)
        def call(*args, **kwargs):
            if os.getpid() != pid:  # in a process that it has started
                return original(*args, **kwargs)
            os.write(writer, f"\0log {name} {detail(*args)}\n".encode())
            instead = fault.instead if (name, next(numbers)) == fault.call else operator.call
            return instead(original, *args, **kwargs)

        setattr(place, attribute, call)

    for name, place in CALLS.items():
        watch(place, name)
    step = "{0.log_prefix}- {0.current_epoch} {2}".format  # of (module, batch, batch_idx)
    watch(SceneClassifier, "training_step", step)
    if fault.max_file:  # writing more than that fails with EFBIG: Python ignores the signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.max_file, fault.max_file))
    os.write(writer, b"\0log begun\n")
    errors.run(main)
