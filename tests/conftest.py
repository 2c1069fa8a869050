"""A small data folder that can be learnt from in seconds, and the scripts as a user runs them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_folder import clip_row, write_lists

from dcase import errors
from dcase.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RATE = 8000  # Hz
os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts: fast at this size, and the same roundings everywhere
SCENES = ("airport", "bus", "park", "tram")
HERTZ = {"airport": 300, "bus": 700, "park": 1500, "tram": 3000}
TRAIN_DEVICES = ("a", "b", "s1")

# A front end and a model of a few thousand parameters: an epoch takes a second.
SMALL = (
    "--model aum_tiny --pos_embed True --head linear --embed_dim 16 --depth 1 --d_state 4 --patch_size 8,4 "
    "--orig_sample_rate 8000 --sample_rate 8000 --window_length 256 --n_fft 256 --hop_length 128 --n_mels 32 --freqm 4 "
    "--timem 4 --num_workers 0 --wandb_mode disabled --accelerator cpu"
).split()
FIT = "--n_epochs 4 --batch_size 16 --lr 0.01 --warmup_steps 5 --check_val_every_n_epoch 3 --val_fraction 0.34".split()


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

    def succeeded(self) -> None:
        assert self.code == 0, self.err

    def refused(self, *parts: str) -> None:
        """It ended with exit code 2 and one clear line that has these parts, without a traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.out + self.err
        assert self.error.startswith("error: "), self.err
        for part in parts:
            assert part in self.error, self.error


@pytest.fixture
def script(tmp_path):
    """Run a script or module in a folder of its own: script("train_base.py", "--lr", "1")."""

    def run(name: str, *args, cwd: Path = tmp_path, env: dict | None = None) -> Finished:
        command = [sys.executable, *(["-m", name] if name.startswith("dcase.") else [str(ROOT / name)])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        done = subprocess.run([*command, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


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
    command = [sys.executable, str(ROOT / "train_base.py"), "--dataset_dir", str(learnable), *SMALL, *FIT]
    done = subprocess.run([*command, "--project_name", "P"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return only_run(cwd / "P")
