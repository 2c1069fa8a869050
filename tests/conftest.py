"""A small data folder that can be learnt from in seconds, and the scripts as a user runs them."""

import json
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from data_folder import DEVICE_FIT, FIT, QUIET, RATE, SCENES, SMALL, tone, write_tones
from forked import ROOT, Finished, Program, run_script, stop_server

from dcase import errors
from dcase.errors import UserError

# The tests import these from here.
__all__ = ["DEVICE_FIT", "FIT", "QUIET", "RATE", "ROOT", "SCENES", "SMALL", "Finished", "tone"]


@pytest.fixture(scope="session")
def learnable(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learnable") / "data"
    write_tones(folder)
    return folder


@pytest.fixture
def script(tmp_path):
    """Run a script or module in a folder of its own: script("train_base.py", "--lr", "1")."""
    return partial(run_script, cwd=tmp_path)


@pytest.fixture
def call_main(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in a folder of its own: call_main(predict.main, "--out", "x.csv")."""

    def run(main, *args) -> Finished:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
        code = 0
        try:
            errors.run(main)
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return Finished(code, shown.out, shown.err)

    return run


@pytest.fixture
def alarm():
    """Fail the test instead of waiting for ever, as on a FIFO."""

    def ring(*_):
        pytest.fail("it waits for ever")  # no Exception, which the code may expect

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(call, *args) -> str:
    """The message of the `UserError` that a call ends in: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def only_run(project: Path) -> Path:
    """The folder of the only run of a project."""
    (config,) = project.glob("*/config.json")
    return config.parent


def read_results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="session")
def general_run(learnable, tmp_path_factory) -> Path:
    """The folder of a finished run of train_base.py; its project is the folder above."""
    cwd = tmp_path_factory.mktemp("general")
    run_script("train_base.py", "--dataset_dir", learnable, *SMALL, *FIT, "--project_name", "P", cwd=cwd).succeeded()
    return only_run(cwd / "P")


@pytest.fixture(scope="session")
def device_run(general_run, learnable) -> tuple[Path, str]:
    """(the folder of a finished run of train_device_specific.py, beside the general run; what it printed)"""
    args = ["--ckpt_id", general_run.name, "--dataset_dir", learnable, "--project_name", "P", "--run_id", "tuned"]
    cwd = general_run.parent.parent
    done = run_script("train_device_specific.py", *args, *DEVICE_FIT, *QUIET, cwd=cwd).succeeded()
    return general_run.parent / "tuned", done.out


def weights(path: Path) -> dict:
    import torch  # not before `forked` has set the number of threads

    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_run(run: Path, other: Path, checkpoints: tuple[str, ...] = ("last.ckpt", "best.ckpt")) -> None:
    """Figures, logs and weights are equal to the last bit."""
    for name in ("results.json", "metrics.csv"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for name in checkpoints:
        ours, theirs = (weights(folder / "checkpoints" / name) for folder in (run, other))
        assert ours.keys() == theirs.keys() and all(value.equal(theirs[key]) for key, value in ours.items()), name


def wait_for(pattern: str, folder: Path, program: Program) -> Path:
    """Return the first file of that pattern that a program makes in ``folder``."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and program.is_running():
        for found in folder.glob(pattern):
            return found
        time.sleep(0.01)
    raise AssertionError(f"{pattern} did not appear: {program.wait(0)}")


def pytest_sessionfinish() -> None:
    stop_server()
