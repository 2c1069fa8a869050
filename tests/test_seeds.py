"""--seeds: a run for each seed, their mean, and going on after an interruption at any place."""

import json
import shutil
import signal
import statistics
import sys
from pathlib import Path

import pytest
from conftest import FIT, SMALL, read_results, refusal, wait_for, weights
from forked import Program, run_script

import train_base
from dcase.runs.config import split_flags
from dcase.training import seeds

SHORT = [*SMALL, *FIT, "--n_epochs", "1", "--project_name", "P", "--run_id", "many"]


@pytest.fixture(scope="module")
def series(learnable, tmp_path_factory) -> Path:
    """The project folder of a finished series of two seeds, 3 and 4."""
    cwd = tmp_path_factory.mktemp("series")
    args = ["--dataset_dir", learnable, *SHORT, "--seeds=2", "--seed", "3"]
    (cwd / "said").write_text(run_script("train_base.py", *args, cwd=cwd).succeeded().out)
    return cwd / "P"


def test_each_seed_is_a_run_of_its_own(series):
    assert sorted(path.name for path in series.iterdir()) == ["many-3", "many-4", "many.json"]
    configs = [json.loads((series / f"many-{seed}" / "config.json").read_text())["config"] for seed in (3, 4)]
    assert [config["fit"]["seed"] for config in configs] == [3, 4]
    assert [config["seeds"] for config in configs] == [1, 1]
    three, four = (weights(series / f"many-{seed}" / "checkpoints" / "best.ckpt") for seed in (3, 4))
    assert not all(value.equal(four[name]) for name, value in three.items())


def test_mean_and_deviation_are_told_and_written(series):
    accuracies = [read_results(series / f"many-{seed}")["macro_avg_acc"] for seed in (3, 4)]
    found = json.loads((series / "many.json").read_text())["figures"]["macro_avg_acc"]
    assert found["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert found["deviation"] == pytest.approx(statistics.stdev(accuracies))
    said = (series.parent / "said").read_text()
    assert f"{100 * statistics.fmean(accuracies):.2f} ± {100 * statistics.stdev(accuracies):.2f}" in said
    assert "(2 seeds)" in said
    loop = "for run in many-3 many-4; do python train_device_specific.py --ckpt_id $run"
    saved = json.loads((series / "many-3" / "config.json").read_text())["config"]
    assert f"next: {loop} --project_name P --dataset_dir {saved['data']['dataset_dir']}; done" in said


@pytest.fixture
def copy(series, tmp_path) -> Path:
    return Path(shutil.copytree(series, tmp_path / "P"))


@pytest.fixture
def call_series(call_main, monkeypatch):
    """Call train_base.py's main with each seed's process from the fork server."""
    monkeypatch.setattr(seeds, "_run", lambda args, series_id: run_script("train_base.py", *args, cwd=Path()).code)
    return lambda *args: call_main(train_base.main, *args)


def test_resuming_trains_only_what_is_missing(copy, call_series):
    before = {path: path.stat().st_mtime_ns for path in (copy / "many-3").rglob("*") if path.is_file()}
    shutil.rmtree(copy / "many-4")
    done = call_series("--resume", "many", "--project_name", "P").succeeded()
    assert "seed 3: run many-3 is finished" in done.out and read_results(copy / "many-4")["n_clips"] == 32
    assert before == {path: path.stat().st_mtime_ns for path in (copy / "many-3").rglob("*") if path.is_file()}


def test_the_first_failure_ends_the_series_and_says_how_to_go_on(copy, call_series):
    (copy / "many-3" / "results.json").unlink()
    shutil.rmtree(copy / "many-4")
    (copy / "many-3" / "checkpoints" / "best.ckpt").write_bytes(b"")
    done = call_series("--resume", "many", "--project_name", "P")
    assert done.code == 2 and "seed 3 (run many-3) ended with exit code 2" in done.error
    assert done.error.endswith("go on with: python train_base.py --resume many --project_name P")
    assert not (copy / "many-4").exists()


def test_a_signal_ends_the_seed_under_way_and_the_series_goes_on_from_there(learnable, tmp_path, call_series):
    args = ["--dataset_dir", learnable, *SHORT, "--n_epochs", "10", "--batch_size", "4", "--seeds", "2"]
    program = Program("train_base.py", *args, cwd=tmp_path)
    wait_for("P/many-0/checkpoints/last.ckpt", tmp_path, program)
    program.send(signal.SIGTERM)
    done = program.wait()
    assert done.code == 143, done.err
    assert "stopped by SIGTERM, saved in epoch" in done.err and "--resume many --project_name P" in done.err
    assert "Traceback" not in done.err and not (tmp_path / "P" / "many-1").exists()
    call_series("--resume", "many", "--project_name", "P").succeeded()
    assert all(read_results(tmp_path / "P" / f"many-{seed}")["n_clips"] == 32 for seed in (0, 1))
    steps = (tmp_path / "P/many-0/metrics.csv").read_text().count("train/loss,")
    assert steps == 10  # each epoch once, none lost


def refused(monkeypatch, *args) -> str:
    """What train_base.py, in this process, says to these flags."""
    monkeypatch.setattr(sys, "argv", ["train_base.py", *map(str, args)])
    return refusal(train_base.main)


def test_mistakes_are_found_before_anything_is_made(learnable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset_dir", learnable, *SHORT]
    assert "--seeds must be at least 1" in refused(monkeypatch, *data, "--seeds", "0")
    assert "--lr must be" in refused(monkeypatch, *data, "--seeds", "2", "--lr", "-1")
    assert "must be below 2^32" in refused(monkeypatch, *data, "--seeds", "2", "--seed", 2**32 - 1)
    assert "--run_id is 1 to 64 letters" in refused(monkeypatch, *data, "--run_id", "a/b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "under torchrun or srun give one seed at a time" in refused(monkeypatch, *data, "--seeds", "2")
    assert not (tmp_path / "P").exists()


def test_ids_that_are_taken(series, learnable, monkeypatch):
    monkeypatch.chdir(series.parent)
    data = ["--dataset_dir", learnable, *SHORT]
    assert "many.json is there already: --resume it" in refused(monkeypatch, *data, "--seeds", "2")
    said = refused(monkeypatch, *data, "--run_id", "many-3")
    assert "--run_id many-3: there is such a run in P/: --resume it" in said


def test_a_damaged_list_of_runs(copy, monkeypatch):
    (copy / "many.json").write_text('{"args": []}')
    monkeypatch.setattr(sys, "argv", ["train_base.py", "--resume", "many", "--project_name", str(copy)])
    assert "many.json cannot be read" in refusal(seeds.train_each, "")


@pytest.mark.parametrize(
    "args, kept",
    [
        ("--seeds 3 --lr 1", "--lr 1"),
        ("--lr 1 --seeds=3 --seed 4", "--lr 1"),
        ("--run-id x --seedling 3", "--seedling 3"),
        ("--compile --seed 0 --run_id=x", "--compile"),
    ],
)
def test_the_command_line_without_some_flags(args, kept):
    assert split_flags(args.split(), "seeds", "seed", "run_id")[1] == kept.split()
