"""The one exception for what a user can put right: its message is all that they see, and it says what to do."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps

DOCTOR = " (`python -m dcase.doctor` tells more)"


class UserError(Exception):
    """Bad input: a flag, a file or a data folder. The message, one line, names it and says what to do.

    Not a ``ValueError``, so that no library on the way (tyro, Lightning) takes it for one of its own.
    """


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
        message = str(end) or "stopped by the keyboard"
        raise Stopped(getattr(end, "number", signal.SIGINT), f"{message}; go on with: {command}") from end


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def doctor_tells_more(look: Callable) -> Callable:
    """A function that looks at the machine or the data: its `UserError` then points to `dcase.doctor`, too."""

    @wraps(look)
    def looking(*args, **kwargs):
        try:
            return look(*args, **kwargs)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix(DOCTOR)}{DOCTOR}") from error

    return looking


def _others_are_gone(error: RuntimeError) -> bool:
    """Whether this is one of several processes, and can no longer reach another one."""
    several = "LOCAL_RANK" in os.environ or "SLURM_LOCALID" in os.environ
    return several and any(name in str(error) for name in ("gloo", "NCCL", "TCPStore"))


def run(main: Callable[[], None]) -> None:
    """Call ``main``; turn a `UserError` into one line on stderr and exit code 2, a signal into 128 + its number."""
    try:
        main()
    except UserError as error:
        # The line break ends a progress bar's line. A reading process hands its message on behind a traceback.
        _end(2, f"error: {str(error).strip().rpartition('UserError: ')[2]}")
    except RuntimeError as error:
        if not _others_are_gone(error):
            raise
        _end(
            1,
            f"error: processes have lost each other; if one has said why above, that is the reason ({one_line(error)})",
        )
    except (Stopped, KeyboardInterrupt) as end:
        with suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses Ctrl-C again has been heard
        # Lightning kills the main process, which may still be busy, where another one ends with anything but 0.
        main_process = os.environ.get("LOCAL_RANK", "0") == "0"
        _end(128 + getattr(end, "number", signal.SIGINT) if main_process else 0, str(end) or "stopped by the keyboard")
    except BrokenPipeError:  # the reader of a pipe, as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        _end_reading_processes()


def _end(code: int, message: str) -> None:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(code)


def _end_reading_processes() -> None:
    """Where an error has ended the training process; they are deaf to SIGTERM, which Python would wait for in vain."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        with suppress(ValueError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for child in children:
        child.kill()
