"""Several processes: each clip once, gradients that are means over all clips of a step, files written by one."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import FIT, ROOT, SMALL, only_run, read_results
from hypothesis import given
from hypothesis import strategies as st

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


PLAIN = (
    "--roll_sec 0 --mixstyle_p 0 --freqm 0 --timem 0 --dropout 0 --subset 25".split()
)  # nothing random but the order


@pytest.fixture(scope="module")
def alone_run(learnable, tmp_path_factory):
    """One process, 18 clips a step."""
    cwd = tmp_path_factory.mktemp("alone")
    args = [*SMALL, *FIT, *PLAIN, "--dataset_dir", learnable, "--project_name", "P", "--batch_size", "18"]
    done = subprocess.run([sys.executable, ROOT / "train_base.py", *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
    done = script("train_base.py", *args, "--batch_size", batch_size, "--accumulate_grad_batches", accumulate)
    assert done.code == 0, done.err
    run = only_run(tmp_path / "P")  # one run, whatever the number of processes
    assert_same_training(run, alone_run)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4 * 3 and checkpoint["clips_per_step"] == 18
    assert read_results(run)["n_clips"] == 32
    assert done.out.count("everything goes to") == 1 and done.err.count("scan backend") <= 1
    # The same weights in one process give the same figures.
    alone = script("test_only.py", "--ckpt_path", run / "checkpoints" / "best.ckpt", "--dataset_dir", learnable,
                   "--project_name", "T", "--wandb_mode", "disabled", "--accelerator", "cpu")  # fmt: skip
    assert alone.code == 0, alone.err
    again, before = read_results(only_run(tmp_path / "T")), read_results(run)
    assert again.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6) and again == before


def test_torchrun_starts_them_and_a_resumed_run_keeps_its_steps(learnable, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--project_name", "P", "--devices", "2", "--n_epochs", "2"]
    command = [*torchrun, ROOT / "train_base.py", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "P")
    assert read_results(run)["n_clips"] == 32 and done.stdout.count("everything goes to") == 1
    alone = [
        *torchrun,
        ROOT / "train_base.py",
        *args[:-4],
        "--devices",
        "1",
    ]  # would be two runs that know nothing of each other
    done = subprocess.run(list(map(str, alone)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (
        done.returncode != 0 and "2 processes were started, and --devices 1" in done.stderr and only_run(tmp_path / "P")
    )
    resumed = [sys.executable, ROOT / "train_base.py", "--resume", run.name, "--project_name", "P", "--devices", "1"]
    done = subprocess.run(list(map(str, resumed)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "32 clips per optimiser step" in done.stderr and "--devices" in done.stderr


def test_other_strategies_are_refused(learnable, script):
    done = script(
        "train_base.py", *SMALL, *FIT, "--dataset_dir", learnable, "--devices", "2", "--strategy", "ddp_spawn"
    )
    done.refused("--strategy", "ddp")


def test_an_error_ends_all_processes_with_one_line(learnable, script, tmp_path):
    args = [*SMALL, *FIT, "--dataset_dir", tmp_path / "nowhere", "--devices", "2"]
    done = script("train_base.py", *args)
    done.refused("nowhere", "--dataset_dir")


def test_stage_2_in_two_processes(general_run, learnable, script, tmp_path):
    kept = tmp_path / "P" / "general" / "checkpoints"
    kept.mkdir(parents=True)
    (kept.parent / "config.json").write_bytes((general_run / "config.json").read_bytes())
    (kept / "best.ckpt").write_bytes((general_run / "checkpoints" / "best.ckpt").read_bytes())
    args = "--ckpt_id general --project_name P --n_epochs 1 --batch_size 4 --devices 2 --num_workers 0".split()
    done = script("train_device_specific.py", *args, "--dataset_dir", learnable, "--wandb_mode", "disabled",
                  "--accelerator", "cpu", "--warmup_steps", "1")  # fmt: skip
    assert done.code == 0, done.err
    (run,) = [path for path in (tmp_path / "P").iterdir() if path.name != "general"]
    assert read_results(run)["n_clips"] == 32 and read_results(run)["fine_tuning"]["a"]["n_train"] == 16
