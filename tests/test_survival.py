"""Runs that are stopped, damaged or split up end where an undisturbed run does. (Kills: test_scripts.py and drills.)"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FIT, ROOT, SMALL, only_run, read_results

import train_base
from dcase.errors import UserError
from dcase.runs.checkpoints import load_checkpoint, merged_checkpoint
from dcase.training.lit import SceneClassifier

# 24 steps an epoch: a signal comes in the middle of one.
LONG = [*SMALL, *FIT, "--n_epochs", "12", "--batch_size", "2", "--check_val_every_n_epoch", "5"]
DEVICE_FIT = "--n_epochs 2 --batch_size 8 --lr 0.003 --warmup_steps 2 --check_val_every_n_epoch 1".split()
QUIET = "--num_workers 0 --wandb_mode disabled --accelerator cpu".split()


@pytest.fixture(scope="module")
def undisturbed(learnable, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, ROOT / "train_base.py", *LONG, "--dataset_dir", learnable, "--project_name", "P"]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return only_run(cwd / "P")


def start(args: list, cwd: Path, **options) -> subprocess.Popen:
    """train_base.py, which does not inherit that Ctrl-C is ignored, as it is where the tests run in the background."""
    command = [sys.executable, ROOT / "train_base.py", *args, "--project_name", "P"]
    return subprocess.Popen(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )  # fmt: skip


def wait_for(pattern: str, folder: Path, program: subprocess.Popen) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and program.poll() is None:
        for found in folder.glob(pattern):
            return found
        time.sleep(0.01)
    raise AssertionError(f"{pattern} did not appear")


def same_files(run: Path, other: Path) -> None:
    for name in ("results.json", "metrics.csv"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("last.ckpt", "best.ckpt"):
        states = [load_checkpoint(r / "checkpoints" / name)["state_dict"] for r in (run, other)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_the_run_goes_on_behind_it(number, undisturbed, learnable, script, tmp_path):
    program = start([*LONG, "--dataset_dir", learnable], tmp_path)
    last = wait_for("P/*/checkpoints/last.ckpt", tmp_path, program)
    seconds = random.Random(time.time()).uniform(0, 0.6)
    print(f"{number!r} {seconds:.3f} s after the first checkpoint")
    time.sleep(seconds)
    program.send_signal(number)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == 128 + number, said
    found = re.search(rf"stopped by {number.name}, saved in epoch (\d+) after (\d+) steps", said)
    assert found and "Traceback" not in said
    assert load_checkpoint(last)["global_step"] == int(found[2])
    run = only_run(tmp_path / "P")
    assert said.endswith(f"; go on with: python train_base.py --resume {run.name} --project_name P\n"), said
    done = script("train_base.py", "--resume", run.name, "--project_name", "P")
    assert done.code == 0 and "only tested again" not in done.out, done.err
    same_files(run, undisturbed)


def test_a_signal_between_accumulated_batches_waits_for_the_step(learnable, script, tmp_path):
    args = [*LONG, "--accumulate_grad_batches", "5", "--dataset_dir", learnable]
    whole = script("train_base.py", *args, "--project_name", "W")
    assert whole.code == 0, whole.err
    program = start(args, tmp_path)
    last = wait_for("P/*/checkpoints/last.ckpt", tmp_path, program)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143
    batches = load_checkpoint(last)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert batches % 5 == 0 or batches == 24
    run = only_run(tmp_path / "P")
    done = script("train_base.py", "--resume", run.name, "--project_name", "P")
    assert done.code == 0, done.err
    same_files(run, only_run(tmp_path / "W"))


@pytest.fixture(scope="module")
def stopped_early(learnable, tmp_path_factory) -> Path:
    """The project folder of a run that was stopped after some epochs."""
    cwd = tmp_path_factory.mktemp("stopped")
    program = start([*LONG, "--dataset_dir", learnable], cwd)
    wait_for("P/*/checkpoints/previous.ckpt", cwd, program)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143
    return cwd / "P"


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(harm, undisturbed, stopped_early, script, tmp_path):
    run = only_run(shutil.copytree(stopped_early, tmp_path / "P"))
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 16
    last.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[harm])
    done = script("train_base.py", "--resume", run.name, "--project_name", "P")
    assert done.code == 0, done.err
    assert "WARNING" in done.out and "last.ckpt" in done.out and "Going on from" in done.out
    assert (run / "checkpoints" / "last.ckpt.damaged").exists()  # and did not replace previous.ckpt
    same_files(run, undisturbed)


def test_without_any_checkpoint_to_read_a_run_says_so(stopped_early, script, tmp_path):
    run = only_run(shutil.copytree(stopped_early, tmp_path / "P"))
    for name in ("last.ckpt", "previous.ckpt"):
        (run / "checkpoints" / name).write_bytes(b"PK")
    script("train_base.py", "--resume", run.name, "--project_name", "P").refused("last.ckpt")


def test_wandb_may_lose_its_process(learnable, tmp_path):
    """As where it is short of memory: killed under the run, which ends as if it had never been."""
    args = [arg if arg != "disabled" else "offline" for arg in LONG]
    program = start([*args, "--n_epochs", "40", "--dataset_dir", learnable], tmp_path)
    wait_for("P/*/checkpoints/last.ckpt", tmp_path, program)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        ours = f"PPid:\t{program.pid}\n" in text
        if text.startswith("Name:\twandb-core") and (ours or started_by(status.parent, program.pid)):
            signal.pidfd_send_signal(os.pidfd_open(int(status.parent.name)), signal.SIGKILL)
    said = program.communicate(timeout=120)[0]
    assert program.returncode == 0 and "W&B has failed" in said and "Traceback" not in said, said
    assert read_results(only_run(tmp_path / "P"))["n_clips"] == 32


def started_by(process: Path, pid: int) -> bool:
    """wandb-core is told whose it is."""
    return f"{pid}" in (process / "cmdline").read_text().split("\0")


def test_a_signal_to_all_processes_of_a_job_is_the_training_process_s(learnable, tmp_path):
    """As SLURM sends it: to the processes that read, too."""
    args = [*LONG, "--num_workers", "2", "--n_epochs", "60", "--dataset_dir", learnable]
    program = start(args, tmp_path, start_new_session=True)
    wait_for("P/*/checkpoints/last.ckpt", tmp_path, program)
    os.killpg(program.pid, signal.SIGTERM)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == 143 and "stopped by SIGTERM, saved in epoch" in said, said


def test_an_error_ends_the_processes_that_read(learnable, script, tmp_path):
    data = Path(shutil.copytree(learnable, tmp_path / "data"))
    path = sorted((data / "audio").glob("tram-lyon-*-b.wav"))[-1]
    path.write_bytes(path.read_bytes()[:900])
    begun = time.monotonic()
    done = script("train_base.py", *SMALL, *FIT, "--dataset_dir", data, "--num_workers", "2", "--val_fraction", "0")
    done.refused(path.name)
    assert time.monotonic() - begun < 60  # they did not keep it waiting


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [0, 1])
def test_a_run_killed_in_its_last_validation_does_it_again(batch, learnable, tmp_path, monkeypatch):
    args = [*SMALL, *FIT, "--dataset_dir", str(learnable)]

    def train(*args) -> None:
        monkeypatch.setattr(sys, "argv", ["train_base.py", *args])
        train_base.main()

    monkeypatch.chdir(tmp_path)
    train(*args, "--project_name", "W")
    step = SceneClassifier.validation_step

    def killed(self, some, batch_idx):
        if self.current_epoch == 3 and batch_idx == batch:
            raise Killed
        step(self, some, batch_idx)

    monkeypatch.setattr(SceneClassifier, "validation_step", killed)
    with pytest.raises(Killed):
        train(*args, "--project_name", "P")
    monkeypatch.setattr(SceneClassifier, "validation_step", step)
    run = only_run(tmp_path / "P")
    train("--resume", run.name, "--project_name", "P", "--accelerator", "cpu")
    same_files(run, only_run(tmp_path / "W"))


# Parts


def stage_2(script, general_run, learnable, project: Path, *args) -> Path:
    kept = project / "general"
    if not kept.exists():
        shutil.copytree(general_run, kept)
    before = set(project.iterdir())
    args = [
        "--ckpt_id",
        "general",
        "--dataset_dir",
        learnable,
        "--project_name",
        project.name,
        *DEVICE_FIT,
        *QUIET,
        *args,
    ]
    done = script("train_device_specific.py", *args)
    assert done.code == 0, done.err
    (run,) = set(project.iterdir()) - before
    return run


def test_stage_2_in_parts_merges_into_what_it_is_as_a_whole(general_run, learnable, script, tmp_path):
    project = tmp_path / "P"
    whole = stage_2(script, general_run, learnable, project)
    parts = [stage_2(script, general_run, learnable, project, "--only_devices", only) for only in ("s1,b", "a")]
    assert all(
        (part / "checkpoints" / "best.ckpt").is_file() and not (part / "results.json").exists() for part in parts
    )
    paths = ",".join(str(part / "checkpoints" / "best.ckpt") for part in parts)
    done = script("test_only.py", "--ckpt_path", paths, "--dataset_dir", learnable, "--project_name", "T", *QUIET)
    assert done.code == 0, done.err
    merged = only_run(tmp_path / "T")
    states = [load_checkpoint(run / "checkpoints" / "best.ckpt") for run in (merged, whole)]
    assert states[0]["device_ids"] == states[1]["device_ids"]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    again, before = read_results(merged), read_results(whole)
    before.pop("fine_tuning")
    assert again.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6) and again == before


def test_parts_that_do_not_belong_together():
    general = {"model.a": torch.ones(2)}
    one = {"state_dict": {**general, "device_models.b.a": torch.ones(2)}, "device_ids": ["b"]}
    assert merged_checkpoint({"one": one}) == one
    with pytest.raises(UserError, match="two holds a model for device b"):
        merged_checkpoint({"one": one, "two": one})
    other = {"state_dict": {"model.a": torch.zeros(2)}, "device_ids": []}
    with pytest.raises(UserError, match="not of one general model"):
        merged_checkpoint({"one": one, "two": other})


def test_unknown_device(script, tmp_path):
    script("train_device_specific.py", "--ckpt_id", "x", "--only_devices", "a,s4").refused("--ckpt_id x")
    from dcase.runs.config import DeviceConfig

    with pytest.raises(UserError, match="--only_devices a,s4: known devices are a,b,c"):
        DeviceConfig(only_devices="a,s4")


# Sound


def test_a_pack_trains_as_the_files_do(general_run, learnable, script, tmp_path):
    """But for 16-bit roundings, less than a 65,000th of a clip's peak: the same augmentation, curves and figures."""
    pack = tmp_path / "pack"
    done = script("dcase.prepare", "--dataset_dir", learnable, "--pack", "--pack_dir", pack,
                  "--orig_sample_rate", "8000", "--sample_rate", "8000")  # fmt: skip
    assert done.code == 0, done.err
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--pack_dir", pack, "--project_name", "P"]
    done = script("train_base.py", *args)
    assert done.code == 0 and f"sound: the pack {pack}" in done.out, done.err
    run = only_run(tmp_path / "P")
    curves = [
        [line.split(",") for line in (r / "metrics.csv").read_text().splitlines()[1:]] for r in (run, general_run)
    ]
    assert [row[:2] for row in curves[0]] == [row[:2] for row in curves[1]]
    for (_, name, value), (_, _, expected) in zip(*curves, strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-4), name
    assert read_results(run)["confusion"] == read_results(general_run)["confusion"]
    assert json.loads((run / "config.json").read_text())["config"]["data"]["read_from"] == "pack"  # what --resume reads
