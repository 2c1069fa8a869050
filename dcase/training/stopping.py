"""Ending a training run early without losing anything: signals become a wish that the next step's end can grant."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
received = 0  # number of the signal that asks for the end; 0: none


@contextmanager
def on_signals() -> Iterator[None]:
    """While this lasts, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (what SLURM can send) only set `received`. A second Ctrl-C
    ends at once."""
    global received
    received = 0
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    take()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take() -> None:
    """Take the signals over, from Lightning's handlers where it has set some meanwhile: those would end a run of
    several processes within a step."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells in the background ask for
                signal.signal(number, _note)


def _note(number: int, frame) -> None:
    global received
    if received and number == signal.SIGINT:
        raise KeyboardInterrupt
    received = number
