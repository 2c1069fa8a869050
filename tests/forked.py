"""The scripts and commands as processes that start at once: forked from one that has imported torch and Lightning.

This is multiprocessing's fork server. What runs is the real file, as ``__main__``, with its own folder, environment,
output, signals and exit code.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# One thread: fast at this size, and the same roundings everywhere.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pytest", "forked", "torchinfo", "matplotlib.pyplot", "train_base", "train_device_specific", "test_only"]
)


@dataclass(frozen=True)
class Finished:
    """A script that has ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, from where a progress bar that stood in it ends."""
        line = self.err.replace("\r", "\n").strip().splitlines()[-1]
        return line[line.index("error: ") :] if "error: " in line else line

    def succeeded(self) -> "Finished":
        assert self.code == 0, self.err
        return self

    def refused(self, *parts: str) -> None:
        """It ended with exit code 2 and one clear line that has these parts, without a traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.out + self.err
        assert self.error.startswith("error: "), self.err
        for part in parts:
            assert part in self.error, self.error


class Program:
    """A script ("train_base.py") or module ("dcase.prepare") that runs in the folder ``cwd``.

    ``out`` and ``err``: files or a terminal for its streams, in place of temporary files that `wait` reads; ``stdin``:
    a file, a FIFO or a terminal that it reads.
    """

    def __init__(self, name: str, *args, cwd: Path, env: dict | None = None, out="", err="", stdin=os.devnull):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [stdin, out or f"{self._folder.name}/out", err or f"{self._folder.name}/err"]
        command = (name, [str(arg) for arg in args], str(cwd.absolute()), {**os.environ, **(env or {})}, self._files)
        self._process = _context.Process(target=_become, args=command)
        self._process.start()
        self.pid = self._process.pid

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 600) -> Finished:
        """Wait for its end; after so many seconds it is killed."""
        self._process.join(seconds)
        if self.is_running():
            self._process.kill()
            self._process.join()
        texts = [Path(file).read_text() if file.startswith(self._folder.name) else "" for file in self._files[1:]]
        self._folder.cleanup()
        return Finished(self._process.exitcode, *texts)


def run_script(name: str, *args, cwd: Path, env: dict | None = None) -> Finished:
    """Run a script or module to its end."""
    return Program(name, *args, cwd=cwd, env=env).wait()


def stop_server() -> None:
    """Wait for the fork server's end, so that what its children computed counts as the tests' CPU time."""
    forkserver._forkserver._stop()


def _become(name: str, args: list[str], cwd: str, env: dict, files: list[str]) -> None:
    os.dup2(os.open(files[0], os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    for number, file in enumerate(files[1:], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this under nohup
    multiprocessing.set_start_method(None, force=True)  # the usual one for the script's own processes
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    path = str(ROOT / name)
    sys.argv = [path if name.endswith(".py") else name, *args]
    try:
        if name.endswith(".py"):
            runpy.run_path(path, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's children leave them out
