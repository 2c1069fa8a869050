"""Scripts as processes of their own that start at once: forked from one that has imported torch and Lightning already.

This is multiprocessing's fork server; what is run is the real script, as ``__main__``.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds after which a process counts as hung: undisturbed, the longest takes 5
_IMPORTED = [
    "torch", "torchaudio", "pytorch_lightning", "matplotlib.pyplot", "torchinfo",
    "dcase.runs.config", "dcase.training.fit", "dcase.training.fine_tuning", "dcase.training.evaluation",
    "dcase.data.packing",
    "pandas", "drills.faults",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_lock = threading.Lock()  # starting a process also looks after all others: not for two threads at a time


def start_zygote() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # one thread: the same roundings every time
    _context.set_forkserver_preload(_IMPORTED)


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int | None  # minus the signal's number where one ended it; None: it hung
    out: str
    err: str
    seconds: float  # from the beginning of its work
    orphans: bool = False  # processes that it had started went on without it

    @property
    def error(self) -> str:
        """The last line on stderr, from where a progress bar that stood in it ends."""
        lines = self.err.replace("\r", "\n").strip().splitlines() or [""]
        return lines[-1][max(0, lines[-1].find("error: ")) :]

    def __str__(self) -> str:
        return f"exit code {self.code}, {self.error!r}"


class Child:
    """A script that is running. ``faults`` (of `faults.py`) are put into the process before it begins."""

    def __init__(self, script: str, args: Sequence, folder: Path, faults: Sequence = ()):
        self._begun = folder / f"begun-{time.monotonic_ns()}"
        pipes = [_context.Pipe(duplex=False) for _ in range(2)]  # a size limit on files must not stop its output
        writers = [writer for _, writer in pipes]
        command = (script, [str(arg) for arg in args], folder, self._begun, writers, tuple(faults))
        self._process = _context.Process(target=_run, args=command)
        with _lock:
            self._process.start()
        self._texts: list[list[bytes]] = [[], []]
        self._readers = []
        for (reader, writer), text in zip(pipes, self._texts, strict=True):
            writer.close()
            self._readers.append(threading.Thread(target=_read_all, args=(reader, text), daemon=True))
            self._readers[-1].start()
        while not self._begun.exists() and not wait([self._process.sentinel], 0.002):
            pass
        self._since = time.monotonic()

    def send(self, number: int, after: float) -> None:
        """Send a signal ``after`` seconds of its work, if it is not over by then."""
        if not wait([self._process.sentinel], after):
            os.kill(self._process.pid, number)

    def wait(self) -> Finished:
        """Wait for its end, and for that of the processes it has started."""
        hung = not wait([self._process.sentinel], LIMIT)
        seconds = time.monotonic() - self._since
        if hung:
            os.killpg(self._process.pid, signal.SIGKILL)
        with _lock:
            self._process.join()
        orphans = _end_group(self._process.pid)
        for reader in self._readers:
            reader.join(10)
        self._begun.unlink(missing_ok=True)
        out, err = (b"".join(text).decode(errors="replace") for text in self._texts)
        return Finished(None if hung else self._process.exitcode, out, err, seconds, orphans)


def _end_group(group: int) -> bool:
    """Whether processes of the group are still there 3 seconds later; they are ended then."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return True


def _read_all(reader, text: list[bytes]) -> None:
    with reader:
        while piece := os.read(reader.fileno(), 1 << 16):
            text.append(piece)


def _run(script: str, args: list[str], folder: Path, begun: Path, writers: Sequence, faults: Sequence) -> None:
    """In the child: become the script."""
    os.setsid()  # a group of its own, to be looked for when it is gone
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    multiprocessing.set_start_method(None, force=True)  # the usual one, not the one that this process came by
    os.chdir(folder)
    sys.argv = [script, *args]
    sys.path.insert(0, str(ROOT))
    for fault in faults:
        fault.install()
    from dcase import errors

    main = errors.run

    def run(of_script) -> None:  # every script's last line calls it
        begun.touch()
        main(of_script)

    errors.run = run
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
