"""A small data folder that can be learnt from in seconds, and the scripts as a user runs them."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_folder import clip_row, write_lists
from forked import ROOT, Finished, Program, run_script, stop_server

from dcase import errors
from dcase.errors import UserError

__all__ = ["ROOT", "Finished"]  # for the tests that import them from here
RATE = 8000  # Hz
SCENES = ("airport", "bus", "park", "tram")
HERTZ = {"airport": 300, "bus": 700, "park": 1500, "tram": 3000}
TRAIN_DEVICES = ("a", "b", "s1")

# A front end and a model of a few thousand parameters: an epoch takes a second.
SMALL = (
    "--model aum_tiny --pos_embed True --head linear --embed_dim 16 --depth 1 --d_state 4 --patch_size 8,4 "
    "--orig_sample_rate 8000 --sample_rate 8000 --window_length 256 --n_fft 256 --hop_length 128 --n_mels 32 --freqm 4 "
    "--timem 4 --num_workers 0 --wandb_mode disabled --accelerator cpu"
).split()
QUIET = "--num_workers 0 --wandb_mode disabled --accelerator cpu".split()  # of SMALL, where a checkpoint has the rest
FIT = "--n_epochs 4 --batch_size 16 --lr 0.01 --warmup_steps 5 --check_val_every_n_epoch 3 --val_fraction 0.34".split()
DEVICE_FIT = "--n_epochs 2 --batch_size 8 --lr 0.003 --warmup_steps 2 --check_val_every_n_epoch 1".split()


def tone(scene: str, device: str, seed: int) -> np.ndarray:
    """Half a second of a scene's tone in noise; devices differ in level."""
    rng = np.random.default_rng(seed)
    time = np.arange(RATE // 2) / RATE
    level = 0.3 if device == "a" else 0.1
    return level * np.sin(2 * np.pi * HERTZ[scene] * time * rng.uniform(0.9, 1.1)) + rng.normal(0, 0.05, len(time))


def write_learnable_folder(folder: Path) -> None:
    """4 scenes, 3 training locations each, devices a, b, s1 in training and s4 too in the test: 72 + 32 clips."""
    places = [(scene, 10 * number + place) for number, scene in enumerate(SCENES) for place in (1, 2, 3)]
    train = [clip_row(s, "lyon", place, k, d) for s, place in places for k in (0, 1) for d in TRAIN_DEVICES]
    test = [
        clip_row(s, "paris", 100 + number, k, d)
        for number, s in enumerate(SCENES)
        for k in (0, 1)
        for d in (*TRAIN_DEVICES, "s4")
    ]
    write_lists(folder, train, test)
    (folder / "audio").mkdir()
    for seed, (name, scene, _, device) in enumerate(train + test):
        soundfile.write(folder / name, tone(scene, device, seed), RATE, subtype="PCM_16")


@pytest.fixture(scope="session")
def learnable(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learnable") / "data"
    folder.mkdir()
    write_learnable_folder(folder)
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
