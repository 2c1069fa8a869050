"""The three scripts as a user runs them: two stages, evaluation, kill and resume."""

import fcntl
import json
import os
import pty
import random
import re
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import DEVICE_FIT, FIT, QUIET, SMALL, assert_same_run, only_run, read_results, wait_for, weights
from forked import Program, run_script

from dcase.progress import on_terminal, progress
from dcase.report import setup
from dcase.report.run_files import read_finished
from dcase.training.bars import Bars


def kill_and_resume(name: str, args: list, project: Path, wait: str, seconds: float) -> Path:
    """Start a script, kill -9 it ``seconds`` after a file appears in its run's folder, resume it; the run's folder."""
    program = Program(name, *args, "--project_name", project.name, "--run_id", "killed", cwd=project.parent)
    wait_for(f"killed/{wait}", project, program)
    time.sleep(seconds)
    program.send(signal.SIGKILL)
    program.wait()
    resume = ["--resume", "killed", "--project_name", project.name, "--accelerator", "cpu"]
    run_script(name, *resume, cwd=project.parent).succeeded()
    return project / "killed"


def test_stage_1_leaves_everything_it_promises(general_run):
    results = read_results(general_run)
    assert results["n_clips"] == 32 and results["macro_avg_acc"] > 0.4  # chance is 0.25 of these four scenes
    assert results["scene_acc"]["metro"] is None and results["device_acc"]["s4"] is not None
    assert set(results["device_group_acc"]) == {"real", "seen", "unseen"}
    assert results["complexity"]["macs"] > 0 and results["data"] == "data"
    shown = {"index.html", "report.md", "confusion.png", "devices.png"}
    assert {path.name for path in (general_run / "report").iterdir()} == shown
    assert (general_run / "predictions.csv").is_file()
    checkpoints = {path.name for path in (general_run / "checkpoints").iterdir()}
    assert checkpoints == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    config = json.loads((general_run / "config.json").read_text())
    assert config["config"]["model"]["embed_dim"] == 16 and config["versions"]["torch"] == torch.__version__
    logged = (general_run / "metrics.csv").read_text()
    for name in ("train/loss,", "val/macro_avg_acc,", "test/macro_avg_acc,", "lr,"):
        assert name in logged, name
    assert re.findall(r"^(\d+),val/acc,", logged, re.MULTILINE) == ["8", "11"]  # every third epoch, and the last one


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
    assert_same_run(run, general_run)  # nothing is logged twice, nothing is lost


def test_killed_before_the_first_checkpoint_starts_again_under_the_same_id(general_run, learnable, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT]
    run = kill_and_resume("train_base.py", args, tmp_path / "P", "config.json", 0.0)
    assert (run / "results.json").read_bytes() == (general_run / "results.json").read_bytes()


def test_stage_2_judges_the_devices_together_and_says_why(device_run, general_run):
    run, out = device_run
    fine_tuning = read_results(run)["fine_tuning"]
    assert set(fine_tuning) == {"a", "b", "c", "s1", "s2", "s3"}
    falls = {}
    for device_id, outcome in fine_tuning.items():
        said = "own model kept" if outcome["kept"] else "general model stays"
        assert f"device {device_id}: {said}: {outcome['reason']}" in out
        if device_id in ("a", "b", "s1"):
            falls[device_id] = outcome["general_loss"] - outcome["fine_tuned_loss"]
            own = f"by {abs(falls[device_id]):.3f} (standard error {outcome['gain_error']:.3f})"
            assert own in outcome["reason"]
            assert outcome["n_train"] == 16 and outcome["n_val"] == 8
        else:
            assert outcome["reason"] == "no training clip of this device" and not outcome["kept"]
    said = re.search(r"mean over the devices \(a, b, s1\): .* by (\S+) \(standard error (\S+)\)", out)
    mean, error = map(float, said.groups())
    assert abs(sum(falls.values())) / 3 == pytest.approx(mean, abs=6e-4)
    for device_id, fall in falls.items():
        contradicts = -fall > 2 * fine_tuning[device_id]["gain_error"]
        assert fine_tuning[device_id]["kept"] == (sum(falls.values()) / 3 > error and not contradicts)
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert epochs and not [line for line in epochs if "best" in line]  # the last epoch's weights are taken
    state, general = (weights(folder / "checkpoints" / "best.ckpt") for folder in (run, general_run))
    assert all(torch.equal(state[name], value) for name, value in general.items())  # the general model is as it was
    kept = {device_id for device_id, outcome in fine_tuning.items() if outcome["kept"]}
    assert {name.split(".")[1] for name in state if name.startswith("device_models.")} == kept


def test_stage_2_s_page_shows_as_changed_what_differs_from_the_general_model_s(device_run):
    changed = {flag.name for flag in setup.flags(read_finished(device_run[0])) if flag.differs}
    of_fit = {"n_epochs", "batch_size", "lr", "warmup_steps", "check_val_every_n_epoch"}
    places = {"project_name", "run_id", "dataset_dir", "read_from", "ckpt_id"}
    assert changed == of_fit | places | {"num_workers", "wandb_mode", "accelerator"}


def test_fine_tuning_starts_from_the_general_model_and_moves_every_tensor(device_run, general_run):
    tuned = weights(device_run[0] / "checkpoints" / "a" / "last.ckpt")
    for name, value in weights(general_run / "checkpoints" / "best.ckpt").items():
        if name.startswith("model."):
            assert not torch.equal(tuned[name], value), f"{name} did not move"
            assert (tuned[name] - value).abs().max() < 0.2, f"{name} did not start from the general model's"
        else:
            assert torch.equal(tuned[name], value), f"{name} is the general model's"


def test_stage_2_killed_and_resumed_equals_undisturbed(device_run, general_run, learnable, tmp_path):
    args = ["--ckpt_id", copy_general(general_run, tmp_path / "P"), "--dataset_dir", learnable, *DEVICE_FIT, *QUIET]
    seconds = random.Random(time.time()).uniform(0, 1.0)
    print(f"killed {seconds:.3f} s into device b")
    run = kill_and_resume("train_device_specific.py", args, tmp_path / "P", "checkpoints/a/tuned.ckpt", seconds)
    assert_same_run(run, device_run[0], ("best.ckpt",))


def copy_general(general_run: Path, project: Path) -> str:
    """Put what stage 2 needs of the general run into another project; its id."""
    (project / general_run.name / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "checkpoints/best.ckpt"):
        (project / general_run.name / name).write_bytes((general_run / name).read_bytes())
    return general_run.name


@pytest.mark.parametrize("stage", [1, 2])
def test_test_only_repeats_the_figures_of_either_stage(stage, device_run, general_run, learnable, script, tmp_path):
    run = general_run if stage == 1 else device_run[0]
    path = run / "checkpoints" / "best.ckpt"
    args = ["--ckpt_path", path, "--dataset_dir", learnable, "--batch_size", "7", "--project_name", "T", *QUIET]
    script("test_only.py", *args, "--embed_dim", "16", "--depth", "1", "--patch_size", "8,4").succeeded()
    again, before = read_results(only_run(tmp_path / "T")), read_results(run)
    again_loss, before_loss = again.pop("loss"), before.pop("loss")
    before.pop("fine_tuning", None)
    assert again == before
    assert again_loss == pytest.approx(before_loss, rel=1e-6)  # another batch size, other roundings


def test_without_validation_the_last_epoch_is_kept(learnable, script, tmp_path):
    data = ["--dataset_dir", learnable, "--project_name", "P"]
    script("train_base.py", *data, *SMALL, *FIT, "--n_epochs", "1", "--val_fraction", "0").succeeded()
    run = only_run(tmp_path / "P")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt"}
    assert read_results(run)["n_clips"] == 32
    args = [*data, "--ckpt_id", run.name, *DEVICE_FIT, *QUIET, "--n_epochs", "1", "--only_devices", "a"]
    done = script("train_device_specific.py", *args).succeeded()
    assert "device a: own model kept: no validation clip to compare on" in done.out


def test_choosing_on_the_test_split_is_called_optimistic_and_other_options_train(learnable, script, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", "1", "--val_split", "test", "--project_name", "P"]
    done = script("train_base.py", *args, "--precision", "bf16-mixed", "--target_length", "40").succeeded()
    run = only_run(tmp_path / "P")
    assert "OPTIMISTIC" in done.out and "optimistic" in read_results(run)["note"]
    assert "optimistic" in (run / "report" / "report.md").read_text()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["frames"] == 40 and "model.pos_embed.pos_embed" in checkpoint["state_dict"]
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values())


# What is shown


def shown_by(args: list, cwd: Path, into_files: tuple[str, ...]) -> tuple[str, str]:
    """What train_base.py shows in a terminal of 100 columns, and what it writes to streams redirected into a file."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    log = cwd / "log"
    log.touch()
    streams = {name: str(log) if name in into_files else os.ttyname(theirs) for name in ("out", "err")}
    program = Program("train_base.py", *args, cwd=cwd, **streams)
    shown = b""
    os.set_blocking(ours, False)
    running = True
    while running:
        running = program.is_running()
        time.sleep(0.05)
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except BlockingIOError:
            pass
    for end in (ours, theirs):
        os.close(end)
    assert program.wait().code == 0, shown.decode() + log.read_text()
    return shown.decode(), log.read_text()


@pytest.mark.parametrize("into_file", [("out",), ("out", "err"), ("err",)], ids=["stdout", "both", "stderr"])
def test_a_log_file_has_a_line_per_epoch_and_a_terminal_has_bars(learnable, tmp_path, into_file):
    args = [*SMALL, *FIT, "--n_epochs", "20", "--batch_size", "2"]  # a second is left after 23 steps
    args += ["--check_val_every_n_epoch", "10", "--report_audio", "False", "--logger", "none"]
    shown, log = shown_by([*args, "--dataset_dir", learnable], tmp_path, into_file)
    left = r"about \d\S* (?:s|min) left \(until (?:\w+ )?\d\d:\d\d\)"
    assert len(re.findall(rf"an epoch takes about \d\S* (?:s|min), {left}", shown + log)) == 1
    if "out" not in into_file:  # Lightning draws to stdout
        assert "epoch 20 of 20: 100%" in shown and "train/loss_step" in shown and "training loss" not in shown
        assert re.search(r"epoch [2-9] of 20: .*, left=\d\S* (s|min)\]", shown)
        return
    lines = re.findall(rf"^epoch (\d+) of 20: training loss (\d\.\d{{4}}), \d+ s(?:, {left})?$", log, re.MULTILINE)
    assert [epoch for epoch, _ in lines] == [str(n) for n in range(1, 21)], log
    assert re.search(rf"^epoch [1-9] of 20: .* s, {left}$", log, re.MULTILINE)
    logged = (only_run(tmp_path / "DCASE25_Task1") / "metrics.csv").read_text()
    losses = [float(loss) for loss in re.findall(r",train/loss,(\S+)", logged)]
    assert [float(loss) for _, loss in lines] == pytest.approx(losses, abs=5e-5)
    assert "train/loss_step" not in log


def test_a_long_epoch_says_how_far_it_is(monkeypatch, capsys):
    bars = Bars()
    assert not bars.on_terminal
    bars._still("test", 1, 20)
    monkeypatch.setattr(bars, "said", time.monotonic() - 61)
    bars._still("test", 19, 20)
    bars._still("test", 20, 20)
    assert capsys.readouterr().out == "test: 19 of 20 batches\n"


def test_a_bar_is_drawn_rarely_in_a_file_and_without_stderr_not_at_all(monkeypatch, capsys):
    for _ in progress(range(10_000), desc="some"):
        pass
    assert capsys.readouterr().err.count("some:") == 2  # its beginning and its end
    monkeypatch.setattr(sys, "stderr", None)
    assert not on_terminal(sys.stderr)
