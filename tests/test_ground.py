"""The ground: what the terminal shows, files beside their place, locks, and Ctrl-C."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, refusal
from forked import Program

from dcase import errors, files
from dcase.errors import UserError, command
from dcase.files import only_one, replace_file

HOST = files._HOST


def test_an_error_is_one_line_without_control_characters(call_main):
    def main():
        raise UserError("no file a\x1b]0;title\x07\u202eb\udcff\n or 'c  d'")

    done = call_main(main)
    assert done.error == "error: no file a\\x1b]0;title\\x07\\u202eb\\udcff or 'c  d'" and done.code == 2


def test_a_command_is_quoted():
    assert command("du", "-sh", Path("a b;rm -rf x")) == "du -sh 'a b;rm -rf x'"


@pytest.mark.parametrize("name", ["dcase.complexity", "train_base.py"])
def test_a_full_disk_behind_stdout(name, learnable, tmp_path):
    args = ["--model", "aum_nano", "--dataset_dir", learnable] if name.endswith("py") else ["--model", "aum_nano"]
    done = Program(name, *args, cwd=tmp_path, out="/dev/full").wait()
    done.refused("the output cannot be written (No space left on device)")
    assert not list(tmp_path.iterdir())


# Ctrl-C


@pytest.fixture
def ctrl_c(monkeypatch):
    """SIGINT as a program in the foreground has it, and as it was after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_destructor_is_not_lost(call_main, ctrl_c):
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main():
        Slow()
        time.sleep(20)

    done = call_main(main)
    assert done.code == 130 and done.err == "\nstopped by the keyboard\n"


def test_a_second_ctrl_c_at_the_end_changes_nothing(call_main, ctrl_c, monkeypatch):
    def main():
        again = SimpleNamespace(
            SIGINT=signal.SIGINT, SIG_IGN=signal.SIG_IGN, signal=lambda *_: signal.raise_signal(signal.SIGINT)
        )
        monkeypatch.setattr(errors, "signal", again)
        raise KeyboardInterrupt

    done = call_main(main)
    assert done.code == 130 and done.err == "\nstopped by the keyboard\n"


# Files


def test_halves_of_ended_processes_are_removed_and_another_machines_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    ours, running = f".x.{HOST}.{ended.pid}", f".x.{HOST}.{os.getppid()}"
    theirs, old = f".x.other.{ended.pid}", f".x.other.{ended.pid + 1}"
    for name in (ours, running, theirs, old):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (0, 0))
    replace_file(tmp_path / "x", lambda beside: beside.write_text("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([running, theirs, "x"])


@pytest.mark.parametrize("said", ["basic_ios::clear: iostream error", "PytorchStreamWriter failed writing file data/0"])
def test_what_torch_says_of_a_full_disk_keeps_the_old_file(said, tmp_path):
    def full(beside):
        beside.touch()
        raise RuntimeError(said)

    (tmp_path / "x").write_text("old")
    assert f"{tmp_path}/x cannot be written ({said})" in refusal(replace_file, tmp_path / "x", full)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# Locks

HOLD = """
import os, sys, time
from pathlib import Path
from dcase.files import only_one
with only_one(Path(sys.argv[1]), "it"):
    if os.fork():
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder, and has started another."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, process_group=0
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def take(folder: Path) -> None:
    with only_one(folder, "run x"):
        pass


def test_a_lock_names_its_holder_and_ends_with_it(holder, tmp_path):
    who = f"run x is in use by process {holder.pid} on {HOST}: wait for its end, or stop it there (kill {holder.pid})"
    assert refusal(take, tmp_path) == refusal(take, tmp_path) == who
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    take(tmp_path)  # although the process that it has started runs on
    take(tmp_path)


def test_where_the_file_system_has_no_locks_the_file_says_who(holder, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert f"process {holder.pid} on {HOST}" in refusal(take, tmp_path)
    holder.kill()
    holder.wait()
    take(tmp_path)
    (tmp_path / ".lock").write_text(f"{os.getpid()} {HOST} \n")  # of a container that was started again
    take(tmp_path)
    (tmp_path / ".lock").write_text("7 node3 11\n")
    assert refusal(take, tmp_path).endswith(f"process 7 on node3: wait for its end, or stop it there (kill 7); if it has ended, delete {tmp_path}/.lock")  # fmt: skip  # noqa: E501
    (tmp_path / ".lock").write_text("7 node3 12\n")  # the same SLURM job, requeued
    take(tmp_path)
