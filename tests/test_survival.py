"""Runs that are stopped, damaged or split up end where an undisturbed run does. Kills: test_scripts.py and faults."""

import json
import os
import random
import re
import select
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import (
    DEVICE_FIT,
    FIT,
    QUIET,
    SMALL,
    assert_same_run,
    only_run,
    read_results,
    refusal,
    wait_for,
)  # fmt: skip
from forked import Program, run_script
from test_scripts import copy_general

import train_base
from dcase import files
from dcase.data.labels import TAU22_LABELS
from dcase.errors import UserError
from dcase.runs.checkpoints import load_checkpoint, merged_checkpoint, newest_checkpoint
from dcase.runs.config import DeviceConfig
from dcase.training.fit import KeepCheckpoints
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan
from dcase.training.stopping import StopRequest

# 24 steps an epoch: a signal comes in the middle of one.
LONG = [*SMALL, *FIT, "--n_epochs", "12", "--batch_size", "2", "--check_val_every_n_epoch", "5", "--project_name", "P"]
RESUME = ["--project_name", "P", "--resume"]


def begin(learnable: Path, cwd: Path, *args, wait: str = "last.ckpt") -> tuple[Program, Path]:
    """(train_base.py, under way; the checkpoint file that it has written)"""
    program = Program("train_base.py", *LONG, "--dataset_dir", learnable, *args, cwd=cwd)
    return program, wait_for(f"P/*/checkpoints/{wait}", cwd, program)


@pytest.fixture(scope="module")
def undisturbed(learnable, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    run_script("train_base.py", *LONG, "--dataset_dir", learnable, cwd=cwd).succeeded()
    return only_run(cwd / "P")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_the_step_and_the_run_goes_on_behind_it(number, undisturbed, learnable, script, tmp_path):
    program, last = begin(learnable, tmp_path)
    seconds = random.Random(time.time()).uniform(0, 0.6)
    print(f"{number!r} {seconds:.3f} s after the first checkpoint")
    time.sleep(seconds)
    program.send(number)
    done = program.wait()
    assert done.code == 128 + number, done.err
    found = re.search(rf"stopped by {number.name}, saved in epoch (\d+) after (\d+) steps", done.err)
    assert found and "Traceback" not in done.err
    assert load_checkpoint(last)["global_step"] == int(found[2])
    run = only_run(tmp_path / "P")
    assert done.err.endswith(f"; go on with: python train_base.py --resume {run.name} --project_name P\n"), done.err
    if number in (signal.SIGTERM, signal.SIGINT):  # the others have the same handler
        done = script("train_base.py", *RESUME, run.name).succeeded()
        assert "only tested again" not in done.out
        assert_same_run(run, undisturbed)


def test_a_terminal_that_is_closed_saves_the_run(learnable, tmp_path):
    controller, terminal = os.openpty()
    place, closing = os.ttyname(terminal), threading.Event()

    def read():
        while not closing.is_set():
            if select.select([controller], [], [], 0.05)[0]:
                os.read(controller, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    program = Program("train_base.py", *LONG, "--dataset_dir", learnable, cwd=tmp_path, out=place, err=place)
    last = wait_for("P/*/checkpoints/last.ckpt", tmp_path, program)
    closing.set()
    reader.join()
    os.close(terminal)
    os.close(controller)
    program.send(signal.SIGHUP)
    assert program.wait().code == 128 + signal.SIGHUP
    assert load_checkpoint(last)["global_step"] % 24  # in the middle of an epoch


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_is_resumed_by_one_process_at_a_time_and_from_where_it_was_moved(stopped, undisturbed, script):
    moved = stopped.parent.rename(stopped.parent.with_name("Q")) / stopped.name
    args = ["--resume", moved.name, "--project_name", "Q"]
    time.sleep(0.01)
    began = (moved / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    first = Program("train_base.py", *args, cwd=moved.parent.parent)
    while (moved / "checkpoints" / "last.ckpt").stat().st_mtime_ns == began and first.is_running():
        time.sleep(0.01)
    second = script("train_base.py", *args)
    second.refused(f"run {moved.name} is in use by process {first.pid} on ", f"stop it there (kill {first.pid})")
    first.wait().succeeded()
    assert_same_run(moved, undisturbed)  # no row is there twice


def test_a_signal_between_accumulated_batches_waits_for_the_step(learnable, script, tmp_path):
    args = ["--accumulate_grad_batches", "5", "--n_epochs", "6"]
    script("train_base.py", *LONG, "--dataset_dir", learnable, *args, "--project_name", "W").succeeded()
    program, last = begin(learnable, tmp_path, *args)
    program.send(signal.SIGTERM)
    assert program.wait().code == 143
    batches = load_checkpoint(last)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert batches % 5 == 0 or batches == 24
    run = only_run(tmp_path / "P")
    script("train_base.py", *RESUME, run.name).succeeded()
    assert_same_run(run, only_run(tmp_path / "W"))


@pytest.fixture(scope="module")
def stopped_early(learnable, tmp_path_factory) -> Path:
    """The project folder of a run that was stopped after some epochs."""
    cwd = tmp_path_factory.mktemp("stopped")
    program, _ = begin(learnable, cwd, wait="previous.ckpt")
    program.send(signal.SIGTERM)
    assert program.wait().code == 143
    return cwd / "P"


@pytest.fixture
def stopped(stopped_early, tmp_path) -> Path:
    """The run's folder, a copy."""
    return only_run(shutil.copytree(stopped_early, tmp_path / "P"))


def damage(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 16
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[harm])


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(undisturbed, stopped, script):
    damage(stopped / "checkpoints" / "last.ckpt", "flip")
    done = script("train_base.py", *RESUME, stopped.name).succeeded()
    assert "WARNING" in done.out and "last.ckpt" in done.out and "Going on from" in done.out
    assert (stopped / "checkpoints" / "last.ckpt.damaged").exists()  # and did not replace previous.ckpt
    assert_same_run(stopped, undisturbed)


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_damage_of_any_kind_is_found(harm, stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    assert newest_checkpoint(last.parent) == last
    damage(last, harm)
    assert newest_checkpoint(last.parent).name == "previous.ckpt" and not last.exists()


def test_without_any_checkpoint_to_read_a_run_says_so(stopped, call_main):
    for name in ("last.ckpt", "previous.ckpt"):
        (stopped / "checkpoints" / name).write_bytes(b"PK")
    call_main(train_base.main, *RESUME, stopped.name).refused("last.ckpt")


def test_wandb_may_lose_its_process(learnable, tmp_path):
    """As where it is short of memory: killed under the run, which ends as if it had never been."""
    program, _ = begin(learnable, tmp_path, "--wandb_mode", "offline")
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        ours = f"PPid:\t{program.pid}\n" in text
        if text.startswith("Name:\twandb-core") and (ours or started_by(status.parent, program.pid)):
            signal.pidfd_send_signal(os.pidfd_open(int(status.parent.name)), signal.SIGKILL)
    done = program.wait()
    assert done.code == 0 and "W&B has failed" in done.out and "Traceback" not in done.out + done.err, done
    assert read_results(only_run(tmp_path / "P"))["n_clips"] == 32


def started_by(process: Path, pid: int) -> bool:
    """wandb-core is told whose it is."""
    return f"{pid}" in (process / "cmdline").read_text().split("\0")


def test_a_signal_to_all_processes_of_a_job_is_the_training_process_s(learnable, tmp_path):
    """As SLURM sends it: to the processes that read, too."""
    program, _ = begin(learnable, tmp_path, "--num_workers", "2", "--n_epochs", "60")
    readers = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    assert readers
    for pid in (*map(int, readers), program.pid):
        os.kill(pid, signal.SIGTERM)
    done = program.wait()
    assert done.code == 143 and "stopped by SIGTERM, saved in epoch" in done.err, done


def test_an_error_ends_the_processes_that_read(learnable, script, tmp_path):
    data = Path(shutil.copytree(learnable, tmp_path / "data"))
    path = sorted((data / "audio").glob("tram-lyon-*-b.wav"))[-1]
    path.write_bytes(path.read_bytes()[:900])
    begun = time.monotonic()
    done = script("train_base.py", *SMALL, *FIT, "--dataset_dir", data, "--num_workers", "2", "--val_fraction", "0")
    done.refused(path.name)
    assert time.monotonic() - begun < 120  # they did not keep it waiting


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch", [0, 1])
def test_a_run_killed_in_its_last_validation_does_it_again(batch, general_run, learnable, call_main, monkeypatch):
    step = SceneClassifier.validation_step

    def killed(self, some, batch_idx):
        if self.current_epoch == 3 and batch_idx == batch:
            raise Killed
        step(self, some, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SceneClassifier, "validation_step", killed)
        with pytest.raises(Killed):
            call_main(train_base.main, *SMALL, *FIT, "--dataset_dir", learnable, "--project_name", "P")
    run = only_run(Path("P").absolute())
    call_main(train_base.main, *RESUME, run.name, "--accelerator", "cpu").succeeded()
    assert_same_run(run, general_run)


# Parts


def test_stage_2_in_parts_merges_into_what_it_is_as_a_whole(general_run, learnable, script, tmp_path):
    data = ["--dataset_dir", learnable, *QUIET]
    args = ["--ckpt_id", copy_general(general_run, tmp_path / "P"), "--project_name", "P", *data, *DEVICE_FIT]
    args += ["--keep", "all", "--own_share", "0.5"]  # a part hears only its own devices
    script("train_device_specific.py", *args, "--run_id", "whole").succeeded()
    device_run = tmp_path / "P" / "whole"
    parts = {"one": "s1,b", "two": "a"}
    for run_id, only in parts.items():
        script("train_device_specific.py", *args, "--only_devices", only, "--run_id", run_id).succeeded()
        assert not (tmp_path / "P" / run_id / "results.json").exists()
    paths = ",".join(f"P/{run_id}/checkpoints/best.ckpt" for run_id in parts)
    script("test_only.py", "--ckpt_path", paths, *data, "--project_name", "T").succeeded()
    merged = only_run(tmp_path / "T")
    states = [load_checkpoint(run / "checkpoints" / "best.ckpt") for run in (merged, device_run)]
    assert states[0]["device_ids"] == states[1]["device_ids"]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    again, before = read_results(merged), read_results(device_run)
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


def test_unknown_device():
    said = refusal(DeviceConfig(only_devices="a,s4").devices_to_tune, TAU22_LABELS)
    assert said == "--only_devices a,s4: known devices are a,b,c,s1,s2,s3"


# Sound


def test_a_pack_trains_as_the_files_do(general_run, learnable, script, tmp_path):
    """But for 16-bit roundings, less than a 65,000th of a clip's peak: the same augmentation, curves and figures."""
    pack = tmp_path / "pack"
    rates = ["--orig_sample_rate", "8000", "--sample_rate", "8000"]
    script("dcase.prepare", "--dataset_dir", learnable, "--pack", "--pack_dir", pack, *rates).succeeded()
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--pack_dir", pack, "--project_name", "P"]
    assert f"sound: the pack {pack}" in script("train_base.py", *args).succeeded().out
    run = only_run(tmp_path / "P")
    files = [(folder / "metrics.csv").read_text().splitlines()[1:] for folder in (run, general_run)]
    curves = [[line.split(",") for line in lines] for lines in files]
    assert [row[:2] for row in curves[0]] == [row[:2] for row in curves[1]]
    for (_, name, value), (_, _, expected) in zip(*curves, strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-4), name
    assert read_results(run)["confusion"] == read_results(general_run)["confusion"]
    assert json.loads((run / "config.json").read_text())["config"]["data"]["read_from"] == "pack"  # what --resume reads


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: done.append("fsync"))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    files.replace_file(tmp_path / "x", lambda beside: beside.write_text("new"))
    assert done == ["fsync", "replace"]


def test_of_equal_scores_the_first_epoch_is_the_best(tmp_path):
    trainer = MagicMock(loggers=[], max_epochs=2)
    module = MagicMock(results={"macro_avg_acc": 0.5, "loss": 1.0}, total_steps=2)
    module.averaged.side_effect = nullcontext
    keep = KeepCheckpoints(tmp_path, Plan(epochs=2, batches=1), StopRequest())
    for epochs in (1, 2):
        trainer.fit_loop.epoch_progress.current.processed = epochs
        keep._validate(trainer, module)
    assert keep.best_epoch == 0
