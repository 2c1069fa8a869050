"""The three scripts as a user runs them: two stages, evaluation, kill and resume."""

import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import FIT, ROOT, SMALL, only_run, read_results

from dcase.progress import on_terminal, progress
from dcase.training.bars import Bars

DEVICE_FIT = "--n_epochs 2 --batch_size 8 --lr 0.003 --warmup_steps 2 --check_val_every_n_epoch 1".split()
QUIET = "--num_workers 0 --wandb_mode disabled --accelerator cpu".split()


def kill_and_resume(name: str, args: list, project: Path, wait_for: str, seconds: float) -> Path:
    """Start a script, kill -9 it ``seconds`` after a file appears in its run's folder, resume it; the run's folder."""
    command = [sys.executable, str(ROOT / name)]
    started = subprocess.Popen(
        [*command, *map(str, args), "--project_name", project.name],
        cwd=project.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(project.glob(f"*/{wait_for}")) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    started.send_signal(signal.SIGKILL)
    started.wait()
    (run,) = [path for path in project.iterdir() if path.name != "general"]
    resumed = subprocess.run(
        [*command, "--resume", run.name, "--project_name", project.name, "--accelerator", "cpu"],
        cwd=project.parent,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    return run


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["state_dict"]


def test_stage_1_leaves_everything_it_promises(general_run):
    results = read_results(general_run)
    assert results["n_clips"] == 32 and results["macro_avg_acc"] > 0.4  # chance is 0.25 of these four scenes
    assert results["scene_acc"]["metro"] is None and results["device_acc"]["s4"] is not None
    assert set(results["device_group_acc"]) == {"real", "seen", "unseen"}
    assert results["complexity"]["macs"] > 0 and results["data"] == "data"
    shown = {"index.html", "report.md", "confusion.png", "devices.png"}
    assert {path.name for path in (general_run / "report").iterdir()} == shown
    assert (general_run / "predictions.csv").is_file()
    assert {path.name for path in (general_run / "checkpoints").iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "best.ckpt",
    }
    config = json.loads((general_run / "config.json").read_text())
    assert config["config"]["model"]["embed_dim"] == 16 and config["versions"]["torch"] == torch.__version__
    logged = (general_run / "metrics.csv").read_text()
    for name in ("train/loss,", "val/macro_avg_acc,", "test/macro_avg_acc,", "lr,"):
        assert name in logged, name


def test_checkpoints_load_safely_and_carry_their_configuration(general_run):
    checkpoint = torch.load(general_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["config"]["logmel"]["n_mels"] == 32 and checkpoint["frames"] == 32
    names = set(checkpoint["state_dict"])
    assert {"logmel.mean", "logmel.std", "model.cls_token", "model.layers.0.mixer.A_b_log"} <= names
    assert not [name for name in names if not name.startswith(("model.", "logmel.mean", "logmel.std"))]


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(general_run, learnable, tmp_path, workers):
    seconds = random.Random(time.time()).uniform(0, 1.0)
    print(f"killed {seconds:.3f} s after the first checkpoint")
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--num_workers", workers]
    run = kill_and_resume("train_base.py", args, tmp_path / "P", "checkpoints/last.ckpt", seconds)
    assert (run / "results.json").read_bytes() == (general_run / "results.json").read_bytes()
    for name in ("best.ckpt", "last.ckpt"):
        resumed, undisturbed = weights(run / "checkpoints" / name), weights(general_run / "checkpoints" / name)
        assert all(torch.equal(value, undisturbed[key]) for key, value in resumed.items())
    rows = [(run / "metrics.csv").read_text(), (general_run / "metrics.csv").read_text()]
    assert rows[0] == rows[1]  # nothing is logged twice, nothing is lost


def test_killed_before_the_first_checkpoint_starts_again_under_the_same_id(general_run, learnable, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT]
    run = kill_and_resume("train_base.py", args, tmp_path / "P", "config.json", 0.0)
    assert (run / "results.json").read_bytes() == (general_run / "results.json").read_bytes()


@pytest.fixture(scope="module")
def device_run(general_run, learnable):
    """A finished run of train_device_specific.py."""
    project = general_run.parent
    args = ["--ckpt_id", general_run.name, "--dataset_dir", learnable, "--project_name", project.name]
    command = [sys.executable, str(ROOT / "train_device_specific.py"), *map(str, args), *DEVICE_FIT, *QUIET]
    done = subprocess.run(command, cwd=project.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = [path.parent for path in project.glob("*/config.json") if path.parent != general_run]
    return run, done.stdout


def test_stage_2_keeps_what_beats_the_general_model_by_more_than_chance_and_says_so(device_run, general_run):
    run, out = device_run
    fine_tuning = read_results(run)["fine_tuning"]
    assert set(fine_tuning) == {"a", "b", "c", "s1", "s2", "s3"}
    for device_id, outcome in fine_tuning.items():
        said = "own model kept" if outcome["kept"] else "general model stays"
        assert f"device {device_id}: {said}" in out
        if device_id in ("a", "b", "s1"):
            gain = outcome["general_loss"] - outcome["fine_tuned_loss"]
            assert f"by {abs(gain):.3f} with a standard error of {outcome['gain_error']:.3f}" in outcome["reason"]
            no_worse = outcome["fine_tuned"] >= outcome["general"]
            was_clear = gain > 2 * outcome["gain_error"]
            assert outcome["kept"] == (was_clear and no_worse)
            assert ("the accuracy falls, although" in outcome["reason"]) == (was_clear and not no_worse)
            assert ("which may be chance" in outcome["reason"]) == (gain > 0 and not was_clear)
            assert outcome["n_train"] == 16 and outcome["n_val"] == 8
        else:
            assert outcome["reason"] == "no training clip of this device"
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert any(line.endswith("(best epoch so far)") for line in epochs)
    assert not [line for line in epochs if "kept" in line]  # a word for what is decided at the end alone
    state = weights(run / "checkpoints" / "best.ckpt")
    general = weights(general_run / "checkpoints" / "best.ckpt")
    assert all(torch.equal(state[name], value) for name, value in general.items())  # the general model is as it was
    kept = {device_id for device_id, outcome in fine_tuning.items() if outcome["kept"]}
    assert {name.split(".")[1] for name in state if name.startswith("device_models.")} == kept


def test_fine_tuning_starts_from_the_general_model_and_moves_every_tensor(device_run, general_run):
    run, _ = device_run
    tuned = weights(run / "checkpoints" / "a" / "last.ckpt")
    general = weights(general_run / "checkpoints" / "best.ckpt")
    for name, value in general.items():
        if name.startswith("model."):
            assert not torch.equal(tuned[name], value), f"{name} did not move"
            assert (tuned[name] - value).abs().max() < 0.2, f"{name} did not start from the general model's"
        else:
            assert torch.equal(tuned[name], value), f"{name} is the general model's"


def test_stage_2_killed_and_resumed_equals_undisturbed(device_run, general_run, learnable, tmp_path):
    project = tmp_path / "P"
    kept = project / "general"
    (kept / "checkpoints").mkdir(parents=True)
    (kept / "config.json").write_bytes((general_run / "config.json").read_bytes())
    (kept / "checkpoints" / "best.ckpt").write_bytes((general_run / "checkpoints" / "best.ckpt").read_bytes())
    args = ["--ckpt_id", "general", "--dataset_dir", learnable, *DEVICE_FIT, *QUIET]
    seconds = random.Random(time.time()).uniform(0, 1.0)
    print(f"killed {seconds:.3f} s into device b")
    run = kill_and_resume("train_device_specific.py", args, project, "checkpoints/a/outcome.json", seconds)
    for name in ("results.json", "metrics.csv"):
        assert (run / name).read_bytes() == (device_run[0] / name).read_bytes()


@pytest.mark.parametrize("stage", [1, 2])
def test_test_only_repeats_the_figures_of_either_stage(stage, device_run, general_run, learnable, script, tmp_path):
    run = general_run if stage == 1 else device_run[0]
    path = run / "checkpoints" / "best.ckpt"
    args = ["--ckpt_path", path, "--dataset_dir", learnable, "--batch_size", "7", "--project_name", "T", *QUIET]
    done = script("test_only.py", *args, "--embed_dim", "16", "--depth", "1", "--patch_size", "8,4")
    assert done.code == 0, done.err
    again, before = read_results(only_run(tmp_path / "T")), read_results(run)
    again_loss, before_loss = again.pop("loss"), before.pop("loss")
    before.pop("fine_tuning", None)
    assert again == before
    assert again_loss == pytest.approx(before_loss, rel=1e-6)  # another batch size, other roundings


def test_wandb_offline_under_the_runs_own_id(learnable, script, tmp_path):
    small = [*SMALL, "--wandb_mode", "offline"]
    done = script("train_base.py", "--dataset_dir", learnable, *small, *FIT, "--n_epochs", "1", "--project_name", "P")
    assert done.code == 0, done.err
    run = only_run(tmp_path / "P")
    assert len(list(run.glob(f"wandb/offline-run-*-{run.name}/run-{run.name}.wandb"))) == 1


def test_without_validation_the_last_epoch_is_kept(learnable, script, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", "1", "--val_fraction", "0", "--project_name", "P"]
    done = script("train_base.py", *args)
    assert done.code == 0, done.err
    run = only_run(tmp_path / "P")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt"}
    assert read_results(run)["n_clips"] == 32
    done = script(
        "train_device_specific.py", "--ckpt_id", run.name, "--dataset_dir", learnable, "--project_name", "P",
        *DEVICE_FIT, *QUIET, "--n_epochs", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "device a: own model kept: nothing was held out to compare on" in done.out


def test_choosing_on_the_test_split_says_that_the_figure_is_optimistic(learnable, script, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", "1", "--val_split", "test", "--project_name", "P"]
    done = script("train_base.py", *args)
    assert done.code == 0 and "OPTIMISTIC" in done.out
    run = only_run(tmp_path / "P")
    assert "optimistic" in read_results(run)["note"] and "optimistic" in (run / "report" / "report.md").read_text()


def test_the_last_epoch_is_always_validated(learnable, script, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", "5", "--check_val_every_n_epoch", "3"]
    done = script("train_base.py", *args, "--project_name", "P")
    assert done.code == 0, done.err
    validated = re.findall(r"epoch (\d+): validation", done.out + done.err)
    assert validated == ["3", "5"]


def test_bf16_and_other_options_train(learnable, script, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", "1", "--project_name", "P"]
    done = script("train_base.py", *args, "--precision", "bf16-mixed", "--pos_embed", "True", "--target_length", "40")
    assert done.code == 0, done.err
    checkpoint = torch.load(only_run(tmp_path / "P") / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["frames"] == 40 and "model.pos_embed.pos_embed" in checkpoint["state_dict"]
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values())


TRAIN_TWO = [str(ROOT / "train_base.py"), *SMALL, *FIT, "--n_epochs", "2", "--report_audio", "False"]


def shown_by(command: list, cwd: Path, into_files: tuple[str, ...] = ()) -> tuple[str, str]:
    """What a script shows in a terminal of 100 columns, and what goes to the streams that are redirected into files."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    with open(cwd / "log", "wb") as log:
        streams = {name: log if name in into_files else theirs for name in ("stdout", "stderr")}
        started = subprocess.Popen([sys.executable, *command], cwd=cwd, stdin=theirs, **streams)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert started.wait() == 0, shown.decode()
    return shown.decode(), (cwd / "log").read_text()


@pytest.mark.parametrize("into_file", [("stdout",), ("stdout", "stderr")], ids=["stdout", "both"])
def test_a_log_file_has_a_line_per_epoch_and_no_bars(learnable, tmp_path, into_file):
    _, log = shown_by([*TRAIN_TWO, "--dataset_dir", str(learnable), "--logger", "none"], tmp_path, into_file)
    lines = re.findall(r"^epoch (\d) of 2: training loss (\d\.\d{4}), \d+ s$", log, re.MULTILINE)
    assert [epoch for epoch, _ in lines] == ["1", "2"], log
    logged = (only_run(tmp_path / "DCASE25_Task1") / "metrics.csv").read_text()
    losses = [float(loss) for loss in re.findall(r",train/loss,(\S+)", logged)]
    assert [float(loss) for _, loss in lines] == pytest.approx(losses, abs=5e-5)
    assert "train/loss_step" not in log


def test_a_terminal_has_bars_and_no_line_per_epoch(learnable, tmp_path):
    command = [*TRAIN_TWO, "--dataset_dir", str(learnable), "--logger", "none"]
    shown, _ = shown_by(command, tmp_path, ("stderr",))  # Lightning draws to stdout
    assert "epoch 2 of 2: 100%" in shown and "train/loss_step" in shown and "training loss" not in shown


def test_a_long_epoch_says_how_far_it_is(monkeypatch, capsys):
    bars = Bars()
    assert not bars.on_terminal
    bars._still("test", 1, 20)
    monkeypatch.setattr(bars, "said", time.monotonic() - 61)
    bars._still("test", 19, 20)
    bars._still("test", 20, 20)
    assert capsys.readouterr().out == "test: 19 of 20 batches\n"


def test_a_bar_is_drawn_seldom_in_a_file_and_without_stderr_not_at_all(monkeypatch, capsys):
    for _ in progress(range(10_000), desc="some"):
        pass
    drawn = capsys.readouterr().err.count("some:")
    assert drawn == 2  # its beginning and its end
    monkeypatch.setattr(sys, "stderr", None)
    assert not on_terminal(sys.stderr)
