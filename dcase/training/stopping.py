"""End a training run early without losing anything."""

import signal
import threading

from dcase.errors import leave_closed_terminal
from dcase.machine import SIGNALS


class StopRequest:
    """Signals request a stop, which training honours at the end of the current step.

    As a context manager it handles SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning) and SIGHUP (a terminal that is
    closed) by setting ``received``, the signal's number. A second Ctrl-C ends the program at once.
    """

    def __init__(self):
        self.received = 0  # no signal yet
        # Python lets only the main thread set handlers.
        self._may_handle = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopRequest":
        if self._may_handle:
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.take_over()
        return self

    def __exit__(self, *exception) -> None:
        if self._may_handle:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Handle the signals again after Lightning has set its own handlers, which would end a run of several processes
        within a step. A signal that is ignored, as nohup asks for, stays ignored."""
        if self._may_handle:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == getattr(signal, "SIGHUP", None):
            leave_closed_terminal()
