"""Errors that a user can put right, signals, what a command prints and returns for them, and how it prints commands."""

import errno
import multiprocessing
import operator
import os
import re
import shlex
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TextIO

LONGEST = 1500  # characters of a message: torch's, for one, may name a thousand weights
DOCTOR = " (`python -m dcase.doctor` tells more)"


def printable(text: object) -> str:
    """Return a text with escapes, such as \\x1b, for what a terminal would obey (control characters) or cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def command(*parts: object) -> str:
    """Return a command to be copied into a shell: each part is quoted where it must be."""
    return printable(shlex.join(map(str, parts)))


class UserError(Exception):
    """Bad input: a flag, a file or a data folder. The message, one line, names it and says what to do.

    Not a ``ValueError``, which libraries (tyro, Lightning) would catch and handle as their own.
    """

    def __init__(self, message: object = ""):
        text = str(message).strip().rpartition("UserError: ")[2]  # a reading process puts a traceback before it
        line = printable(re.sub(r"\s*\n\s*", " ", text))
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


class Stopped(Exception):
    """A signal ended a training run, which was saved first."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Add the command that resumes a run to the message of the signal or Ctrl-C that ends this block."""
    try:
        yield
    except (Stopped, KeyboardInterrupt) as end:
        ignore_ctrl_c()
        message = str(end) or "stopped by the keyboard"
        raise Stopped(getattr(end, "number", signal.SIGINT), f"{message}; go on with: {command}") from end


MOST = 2**40  # of any number that a flag sets: larger ones are slips
_COMPARISONS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
    "most": (operator.le, "at most"),
}


def check_range(flags: object, names: str, **bounds: float) -> None:
    """Raise `UserError` where one of the attributes ``names`` of ``flags`` is not finite or not within ``bounds``.

    ``bounds`` are least, above, below and most; nothing is above `MOST`. An attribute that is None passes.
    """
    limits = bounds | {"most": bounds.get("most", MOST)}
    for name in names.split():
        value = getattr(flags, name)
        if value is None or all(_COMPARISONS[bound][0](value, limit) for bound, limit in limits.items()):
            continue  # NaN and infinities never get here
        shown = limits if value > MOST else bounds
        wanted = " and ".join(f"{_COMPARISONS[bound][1]} {limit}" for bound, limit in shown.items())
        raise UserError(f"--{name} must be {wanted}; got {value!r:.50}")


def one_line(error: Exception) -> str:
    """Return an error's message in one line, or the name of its type."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def doctor_tells_more(look: Callable) -> Callable:
    """Decorate a function that checks the machine or the data: its `UserError` then also points to `dcase.doctor`."""

    @wraps(look)
    def looking(*args, **kwargs):
        try:
            return look(*args, **kwargs)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix(DOCTOR)}{DOCTOR}") from error

    return looking


def _others_are_gone(error: RuntimeError) -> bool:
    """Return whether this is one of several processes, and ``error`` says that it cannot reach another one."""
    several = "LOCAL_RANK" in os.environ or "SLURM_LOCALID" in os.environ
    return several and any(name in str(error) for name in ("gloo", "NCCL", "TCPStore"))


def run(main: Callable[[], None]) -> None:
    """Call ``main``; turn a `UserError` into one line on stderr and exit code 2, a signal into 128 + its number."""
    sys.unraisablehook = _unraisable
    try:
        _run(main)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was dealt with
        _end(128 + signal.SIGINT, "stopped by the keyboard")
    finally:
        _end_reading_processes()


def _run(main: Callable[[], None]) -> None:
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except UserError as error:
        _end(2, f"error: {error}")
    except RuntimeError as error:
        if not _others_are_gone(error):
            raise
        _end(
            1,
            f"error: the processes have lost contact; if one reports an error above, that is why ({one_line(error)})",
        )
    except (Stopped, KeyboardInterrupt) as end:
        ignore_ctrl_c()
        # Lightning kills the main process, which may still be busy, where another one ends with a code other than 0.
        main_process = os.environ.get("LOCAL_RANK", "0") == "0"
        _end(128 + getattr(end, "number", signal.SIGINT) if main_process else 0, str(end) or "stopped by the keyboard")
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        discard(sys.stdout)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        discard(sys.stdout)  # Python would try again at its end
        _end(2, f"error: the output cannot be written ({error.strerror}): make room where it goes")


def ignore_ctrl_c() -> None:
    """Let a further Ctrl-C change nothing: the program is ending."""
    with suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unraisable(unraisable) -> None:
    """Repeat a Ctrl-C that came while Python destroyed an object, where it ignores every exception."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def discard(stream: TextIO) -> None:
    """Send what is written to a stream nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_closed_terminal() -> None:
    """Send what goes to a terminal that has been closed nowhere: printing would fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # it has no file
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not stream.isatty():
                discard(stream)


def _end(code: int, message: str) -> None:
    print(f"\n{message}", file=sys.stderr)  # the line break ends a progress bar's line
    sys.exit(code)


def _end_reading_processes() -> None:
    """Kill the processes that read clips after an error: they ignore SIGTERM, and Python would wait for them."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        with suppress(ValueError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for child in children:
        child.kill()
