"""Several processes: each clip once, gradients that are means over all clips of a step, files written by one."""

import csv
import subprocess
import sys

import pytest
import torch
from conftest import FIT, QUIET, ROOT, SMALL, only_run, read_results
from forked import run_script
from hypothesis import given
from hypothesis import strategies as st
from test_scripts import copy_general

from dcase.data.loading import Batches, shuffled

sizes = st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))


@given(sizes)
def test_every_clip_is_in_one_batch_of_one_process(given_sizes):
    n, batch_size, processes, accumulate = given_sizes
    order = shuffled(n, 1, 2)
    parts = [Batches(n, batch_size, lambda: order, lambda: 0, accumulate, rank, processes) for rank in range(processes)]
    seen = []
    lengths = {len(list(part)) for part in parts}
    assert lengths == {len(parts[0])} == {-(-n // (batch_size * processes))}  # all take the same steps
    for part in parts:
        for i, rows in enumerate(part):
            assert 1 <= len(rows) <= batch_size and part.counted(i) in (len(rows), 0)
            seen += rows[: part.counted(i)]
    assert sorted(seen) == list(range(n))


@given(sizes)
def test_a_steps_gradient_is_the_mean_over_its_clips(given_sizes):
    """What DDP and accumulation do to the losses is a mean over processes and batches: with the weights, over clips."""
    n, batch_size, processes, accumulate = given_sizes
    value = torch.randn(n, dtype=torch.float64)  # of a clip: its loss, or its gradient
    parts = [Batches(n, batch_size, None, lambda: 0, accumulate, rank, processes) for rank in range(processes)]
    for first in range(0, len(parts[0]), accumulate):
        total, clips = 0.0, []
        for part in parts:
            for i, rows in enumerate(part):
                if first <= i < first + accumulate:
                    counted = rows[: part.counted(i)]
                    local = value[counted or rows].mean() * part.weight(i)
                    total, clips = total + local / processes / accumulate, clips + counted
        torch.testing.assert_close(total, value[clips].mean())


def test_a_resumed_epoch_begins_at_its_batch():
    whole = list(Batches(50, 4, lambda: shuffled(50, 3, 0)))
    assert list(Batches(50, 4, lambda: shuffled(50, 3, 0), lambda: 7)) == whole[7:]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


PLAIN = "--roll_sec 0 --mixstyle_p 0 --freqm 0 --timem 0 --dropout 0".split()  # nothing random but the order


@pytest.fixture(scope="module")
def alone_run(learnable, tmp_path_factory):
    """One process, 18 clips a step."""
    cwd = tmp_path_factory.mktemp("alone")
    args = [*SMALL, *FIT, *PLAIN, "--dataset_dir", learnable, "--project_name", "P", "--batch_size", "18"]
    run_script("train_base.py", *args, cwd=cwd).succeeded()
    return only_run(cwd / "P")


def rows(run) -> dict:
    with open(run / "metrics.csv") as file:
        return {(int(row["step"]), row["name"]): float(row["value"]) for row in csv.DictReader(file)}


def assert_same_training(run, other) -> None:
    """But for roundings: the same steps, curves, weights and results."""
    curves, others = rows(run), rows(other)
    assert curves.keys() == others.keys()
    for key, value in curves.items():
        assert value == pytest.approx(others[key], rel=1e-4, abs=1e-6), key
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, other)]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(value, states[1]["state_dict"][name], rtol=1e-3, atol=1e-4)
    assert read_results(run)["confusion"] == read_results(other)["confusion"]


@pytest.mark.parametrize("processes, batch_size, accumulate", [(3, 6, 1), (2, 3, 3), (1, 6, 3)])
def test_processes_and_accumulation_train_as_one_process_does(
    alone_run, learnable, script, tmp_path, processes, batch_size, accumulate
):
    """48 clips in steps of 18: the last step has 12, and 3 processes test 32 clips, which none of them divides."""
    args = [*SMALL, *FIT, *PLAIN, "--dataset_dir", learnable, "--project_name", "P", "--devices", processes]
    sizes = ["--batch_size", batch_size, "--accumulate_grad_batches", accumulate]
    done = script("train_base.py", *args, *sizes).succeeded()
    run = only_run(tmp_path / "P")  # one run, whatever the number of processes
    assert_same_training(run, alone_run)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4 * 3 and checkpoint["clips_per_step"] == 18
    assert read_results(run)["n_clips"] == 32
    assert done.out.count("everything goes to") == 1 and done.err.count("scan backend") <= 1
    # The same weights in one process give the same figures.
    args = ["--ckpt_path", run / "checkpoints" / "best.ckpt", "--dataset_dir", learnable, "--project_name", "T"]
    script("test_only.py", *args, *QUIET).succeeded()
    again, before = read_results(only_run(tmp_path / "T")), read_results(run)
    assert again.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6) and again == before


def test_torchrun_starts_them_and_a_resumed_run_keeps_its_steps(learnable, script, tmp_path):
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--project_name", "P", "--n_epochs", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = list(map(str, [*command, ROOT / "train_base.py", *args, "--devices"]))
    done = subprocess.run([*command, "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "P")
    assert read_results(run)["n_clips"] == 32 and done.stdout.count("everything goes to") == 1
    done = subprocess.run([*command, "1"], cwd=tmp_path, capture_output=True, text=True)  # two independent runs
    assert done.returncode != 0 and "2 processes were started, and --devices 1" in done.stderr
    assert only_run(tmp_path / "P") == run
    resumed = script("train_base.py", "--resume", run.name, "--project_name", "P", "--devices", "1")
    resumed.refused("32 clips per optimiser step", "--devices")


def test_other_strategies_are_refused(learnable, script):
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--devices", "2", "--strategy", "ddp_spawn"]
    script("train_base.py", *args).refused("--strategy", "ddp")


def test_an_error_ends_all_processes_with_one_line(script, tmp_path):
    args = [*SMALL, *FIT, "--dataset_dir", tmp_path / "nowhere", "--devices", "2"]
    script("train_base.py", *args).refused("nowhere", "--dataset_dir")


def test_stage_2_in_two_processes(general_run, learnable, script, tmp_path):
    args = ["--ckpt_id", copy_general(general_run, tmp_path / "P"), "--dataset_dir", learnable, *QUIET]
    more = "--project_name P --run_id tuned --n_epochs 1 --batch_size 4 --devices 2 --warmup_steps 1".split()
    script("train_device_specific.py", *args, *more).succeeded()
    results = read_results(tmp_path / "P" / "tuned")
    assert results["n_clips"] == 32 and results["fine_tuning"]["a"]["n_train"] == 16
