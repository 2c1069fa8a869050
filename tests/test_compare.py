"""Comparing runs: figures beside one another, seeds together, what differs, and runs that cannot be compared."""

import csv
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_results, refusal
from made_up_run import COMPLEXITY

from dcase import compare, errors
from dcase.compare import CompareConfig
from dcase.data.tau22 import DEVICES, SCENES
from dcase.machine import MachineConfig
from dcase.model import metrics
from dcase.report.compare import grouped, read_all
from dcase.report.run_files import read_finished
from dcase.runs.config import BaseConfig, DeviceConfig, StorageConfig, to_plain
from dcase.runs.config import TestConfig as ConfigOfTest

P = "P"


def results_of(right: dict[str, int], n: int = 20, **more) -> dict:
    """results.json of n clips per scene on each of three devices; ``right`` of them are right, per scene."""
    confusion = torch.zeros(len(DEVICES), len(SCENES), len(SCENES), dtype=torch.int64)
    for i, scene in enumerate(SCENES):
        for device in ("a", "s1", "s4"):
            hits = right.get(scene, right["all"])
            confusion[DEVICES.index(device), i, i] = hits
            confusion[DEVICES.index(device), i, (i + 1) % len(SCENES)] = n - hits
    complexity = COMPLEXITY | more.pop("complexity", {"total_param_bytes": 1000, "macs": 5000})
    return {"data": "TAU22", "note": "", **metrics.results(confusion, 1.0), "complexity": complexity, **more}


def make_run(run_id: str, results: dict | None, config=None, seed: int = 0, commit: str = "c" * 40, **fit) -> Path:
    """A run's folder in P, trained with these flags of FitConfig."""
    config = config or BaseConfig()
    if not isinstance(config, ConfigOfTest):
        config = replace(config, fit=replace(config.fit, seed=seed, **fit))
    folder = Path(P) / run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": to_plain(config), "commit": commit}))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_compare(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["compare.py", *args, "--project_name", P])
    code = 0
    try:
        errors.run(compare.main)
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def cells(out: str, start: str) -> list[str]:
    """The cells of the first table row whose first cell starts so."""
    (row, *_) = [line for line in out.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def test_two_runs_with_differences_and_the_best_marked(capsys, monkeypatch):
    make_run("one", results_of({"all": 10, "bus": 12}))
    make_run("two", results_of({"all": 12, "bus": 8}, complexity={"total_param_bytes": 900, "macs": 6000}), lr=0.25)
    code, out, _ = run_compare(capsys, monkeypatch, "one", "two")
    assert code == 0
    assert cells(out, "1 aum_small") == ["1 aum_small", "one", "general", *["51.00"] * 4, "1,000", "5,000 *"]
    second = ["2 aum_small", "two", "general", *["58.00 (+7.00) *"] * 4, "900 *", "6,000"]
    assert cells(out, "2 aum_small") == second
    assert cells(out, "bus") == ["bus", "60.00 *", "40.00 (-20.00)"]
    assert cells(out, "s1") == ["s1", "51.00", "58.00 (+7.00) *"]
    assert "\n| b  " not in out  # no clip of that device
    assert cells(out, "--lr") == ["--lr", "0.0005", "0.25"] and "--seed" not in out


def test_a_handful_of_clips_has_no_best(capsys, monkeypatch):
    for hits, run_id in enumerate(("one", "two")):
        make_run(run_id, results_of({"all": hits}, n=1), lr=0.1 + hits)  # 30 clips
    _, out, _ = run_compare(capsys, monkeypatch, "one", "two")
    assert cells(out, "2 aum_small")[3] == "100.00 (+100.00)" and "none marked: 30 clips are too few" in out


def test_seeds_stand_together(capsys, monkeypatch):
    for seed, hits in enumerate((10, 12, 14)):
        make_run(f"s{seed}", results_of({"all": hits}), seed=seed)
    make_run("other", results_of({"all": 12}), weight_decay=0.5)
    code, out, _ = run_compare(capsys, monkeypatch, "s0", "other", "s1", "s2")
    assert code == 0
    first = cells(out, "1 aum_small (3 seeds)")
    assert first[1] == "s0 s1 s2" and first[3] == f"60.00 ± {statistics.stdev((50, 60, 70)):.2f}"
    assert cells(out, "--seed")[1:] == ["0, 1, 2", "0"] and "Mean ± deviation over seeds" in out


def test_a_run_that_was_repeated_is_no_other_seed(capsys, monkeypatch):
    for run_id, seed in (("one", 0), ("again", 0), ("other", 1)):
        make_run(run_id, results_of({"all": 10}), seed=seed)
    _, out, _ = run_compare(capsys, monkeypatch, "one", "again", "other")
    assert cells(out, "1")[0] == "1 aum_small (3 runs of 2 seeds)"


def test_a_deviation_is_over_seeds_alone(capsys, monkeypatch):
    for run_id, seed, hits in (("one", 0, 10), ("again", 0, 12), ("other", 1, 14)):
        make_run(run_id, results_of({"all": hits}), seed=seed)
    _, out, _ = run_compare(capsys, monkeypatch, "one", "again")
    assert cells(out, "1 aum_small (2 runs of 1 seed)")[3] == "55.00" and "±" not in out
    _, out, _ = run_compare(capsys, monkeypatch, "one", "again", "other")
    assert cells(out, "1")[3] == f"62.50 ± {statistics.stdev((55, 70)):.2f}"


def test_stage_2_of_two_general_models_is_of_two_seeds(capsys, monkeypatch):
    for seed in (0, 1):
        make_run(f"base{seed}", results_of({"all": 10}), seed=seed)
        make_run(f"tuned{seed}", results_of({"all": 10 + seed}), DeviceConfig(ckpt_id=f"base{seed}"))
    _, out, _ = run_compare(capsys, monkeypatch, "tuned0", "tuned1")
    assert cells(out, "1 aum_small (2 seeds)")[3] == f"52.50 ± {statistics.stdev((50, 55)):.2f}"


def test_stage_2_of_several_seeds_stands_together_through_its_stage_1():
    for seed in (0, 1):
        make_run(f"base{seed}", results_of({"all": 10}), seed=seed)
        make_run(f"tuned{seed}", results_of({"all": 11}), DeviceConfig(ckpt_id=f"base{seed}"), seed)
    make_run("base9", None, lr=0.9)
    make_run("tuned9", results_of({"all": 11}), DeviceConfig(ckpt_id="base9"))
    make_run("orphan", results_of({"all": 11}), DeviceConfig(ckpt_id="gone"))
    runs, said = read_all(P, ["tuned0", "tuned1", "tuned9", "orphan"])
    assert [group.ids for group in grouped(runs)] == [["tuned0", "tuned1"], ["tuned9"], ["orphan"]] and not said


def test_tests_stand_together_by_seed_and_apart_by_the_file_they_tested():
    for seed in (0, 1):
        make_run(f"base{seed}", results_of({"all": 10}), seed=seed)
        make_run(f"test{seed}", results_of({"all": 10}), of_test(f"P/base{seed}/checkpoints/best.ckpt"))
    make_run("last", results_of({"all": 10}), of_test("P/base0/checkpoints/last.ckpt"))
    runs, _ = read_all(P, ["base0", "base1", "test0", "test1", "last"])
    assert [group.ids for group in grouped(runs)] == [["base0", "base1"], ["test0", "test1"], ["last"]]
    assert [group.n_seeds for group in grouped(runs)] == [2, 2, 1]


def test_names_machines_and_places_make_no_difference():
    make_run("one", results_of({"all": 10}))
    config = BaseConfig()
    other = replace(
        config,
        run=replace(config.run, experiment_name="x", wandb_mode="disabled"),
        machine=replace(config.machine, num_workers=0),
    )
    make_run("two", results_of({"all": 10}), other, seed=1)
    assert len(grouped(read_all(P, ["one", "two"])[0])) == 1


def test_a_run_from_before_a_flag_was_there_has_its_default():
    make_run("old", results_of({"all": 10}))
    path = Path(P) / "old" / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["fit"]["ema_decay"]
    path.write_text(json.dumps(content))
    make_run("new", results_of({"all": 10}), seed=1)
    assert len(grouped(read_all(P, ["old", "new"])[0])) == 1


def test_runs_that_cannot_be_compared_get_a_line(capsys, monkeypatch):
    make_run("good", results_of({"all": 10}))
    make_run("unfinished", None)
    (make_run("damaged", None) / "results.json").write_text('{"macro_avg_acc": 0.5}')
    (make_run("broken", {}) / "config.json").write_text("{")
    code, out, _ = run_compare(capsys, monkeypatch, "good", "unfinished", "damaged", "broken", "nowhere")
    said = out.splitlines()[:4]
    assert code == 1 and cells(out, "1 aum_small")[1] == "good"
    for line, parts in zip(
        said,
        [
            ("run unfinished has no results.json", "--resume"),
            ("P/damaged/results.json cannot be read",),
            ("P/broken/config.json cannot be read",),
            ("run nowhere: no such run in P/", "check --project_name"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line
    code, _, err = run_compare(capsys, monkeypatch, "unfinished")
    assert code == 2 and "none of these 1 runs has results" in err


def test_all_runs_are_shown_from_the_oldest_on_and_the_many_are_shown_short(capsys, monkeypatch):
    ages = (3, 8, 1, 0, 7, 5, 2, 6, 4)  # hours
    for i, age in enumerate(ages):
        folder = make_run(f"r{i}", results_of({"all": i}), lr=0.1 + i)
        os.utime(folder / "config.json", (1.7e9 - 3600 * age,) * 2)
    code, out, _ = run_compare(capsys, monkeypatch, "--all")
    rows = [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("| ") and "aum_small" in line]
    assert code == 0 and rows == [f"r{ages.index(age)}" for age in reversed(range(9))] and "up to 8 lines" in out
    assert cells(run_compare(capsys, monkeypatch, "--all", "--sort", "macro_avg_acc")[1], "1 aum_small")[1] == "r8"
    code, out, _ = run_compare(capsys, monkeypatch, "r1", "r0", "r2", "--sort", "macro_avg_acc")
    assert cells(out, "1 aum_small")[1] == "r2"
    assert cells(run_compare(capsys, monkeypatch, "r1", "r0")[1], "1 aum_small")[1] == "r1"


def of_test(path: str, **more) -> ConfigOfTest:
    return replace(ConfigOfTest(ckpt_path=path), **more)


def test_stages_and_tests_are_told_apart(capsys, monkeypatch):
    make_run("base", results_of({"all": 10}))
    make_run("tuned", results_of({"all": 11}), DeviceConfig(ckpt_id="base"))
    make_run("again", results_of({"all": 11}), of_test("P/tuned/checkpoints/best.ckpt"))
    out = run_compare(capsys, monkeypatch, "base", "tuned", "again", "--csv", "table.csv")[1]
    assert [cells(out, f"{i} aum_small")[2] for i in (1, 2, 3)] == ["general", "device-specific", "test"]
    with open("table.csv", newline="") as file:
        assert [row["kind"] for row in csv.DictReader(file)] == ["general", "device-specific", "test"]


@pytest.mark.parametrize("path", ["P/base/checkpoints/best.ckpt", "P/base/stored", "P/base/stored/general.safetensors"])
def test_a_test_has_the_flags_of_the_run_that_it_tested(path, capsys, monkeypatch):
    machine = MachineConfig(batch_size=32)
    make_run("base", results_of({"all": 10}), BaseConfig(machine=machine), seed=7, lr=0.25)
    make_run("again", results_of({"all": 10}), of_test(path, storage=StorageConfig(weight_bits=16)))
    make_run("other", results_of({"all": 10}))
    out = run_compare(capsys, monkeypatch, "base", "again", "other")[1]
    for flag, *values in (
        ("lr", "0.25", "0.25", "0.0005"), ("seed", "7", "7", "0"), ("batch_size", "32", "32", "64"),
        ("weight_bits", "32", "16", "32"), ("ckpt_path", "-", path, "-"),
    ):  # fmt: skip
        assert cells(out, f"--{flag} ")[1:] == values


def test_a_test_of_a_run_that_is_gone_or_of_a_published_model_has_its_own_flags_alone(capsys, monkeypatch):
    make_run("base", results_of({"all": 10}))
    make_run("again", results_of({"all": 10}), of_test("gone/checkpoints/best.ckpt"))
    Path("published").mkdir()
    Path("published/config.json").write_text('{"model": {}}')
    make_run("more", results_of({"all": 10}), of_test("published/model.safetensors"))
    code, out, _ = run_compare(capsys, monkeypatch, "base", "again", "more")
    assert code == 0 and cells(out, "--lr")[1:] == ["0.0005", "-", "-"]


def test_a_test_that_failed_cannot_be_resumed_but_given_again(capsys, monkeypatch):
    make_run("base", results_of({"all": 10}))
    make_run("failed", None, of_test("P/base/checkpoints/best.ckpt"))
    out = run_compare(capsys, monkeypatch, "--all")[1]
    assert "test failed has no results.json" in out and "--resume" not in out
    assert "run test_only.py --ckpt_path P/base/checkpoints/best.ckpt again; P/failed/ can be deleted" in out
    message = refusal(read_finished, Path("P/failed"))
    assert "run test_only.py --ckpt_path P/base/checkpoints/best.ckpt again" in message and "--resume" not in message
    make_run("stopped", None)
    assert "--resume" in refusal(read_finished, Path("P/stopped"))


def test_sorting_by_size_puts_the_smallest_first(capsys, monkeypatch):
    make_run("large", results_of({"all": 10}, complexity={"total_param_bytes": 9, "macs": 9}))
    make_run("small", results_of({"all": 9}, complexity={"total_param_bytes": 1, "macs": 10}), lr=0.1)
    assert cells(run_compare(capsys, monkeypatch, "--all", "--sort", "size")[1], "1 aum_small")[1] == "small"
    assert cells(run_compare(capsys, monkeypatch, "--all", "--sort", "macs")[1], "1 aum_small")[1] == "large"


def test_notes_and_other_test_clips_are_told(capsys, monkeypatch):
    note = "The model was chosen on the test split: its figures are optimistic."
    make_run("one", results_of({"all": 10}, note=note))
    make_run("two", results_of({"all": 10}, n=21), lr=0.1)
    out = run_compare(capsys, monkeypatch, "one", "two")[1]
    assert f"one: {note}" in out
    assert out.startswith("WARNING: tested on different clips") and "TAU22 (600 clips), TAU22 (630 clips)" in out


def test_runs_of_other_clips_have_neither_stars_nor_differences(capsys, monkeypatch):
    make_run("one", results_of({"all": 10}))
    make_run("own", results_of({"all": 14}, data="own"), lr=0.1)
    make_run("two", results_of({"all": 12}), lr=0.2)
    make_run("again", results_of({"all": 16}, data="own"), seed=1)  # of one's configuration, and other clips
    _, out, _ = run_compare(capsys, monkeypatch, "one", "own", "two", "again")
    assert out.splitlines()[0].startswith("WARNING: tested on different clips, so their figures cannot be compared: ")
    assert [cells(out, f"{i} aum_small")[3] for i in (1, 2, 3, 4)] == ["50.00", "70.00", "60.00 (+10.00)", "80.00"]
    assert cells(out, "bus") == ["bus", "50.00", "70.00", "60.00 (+10.00)", "80.00"] and "*" not in out
    _, out, _ = run_compare(capsys, monkeypatch, "one", "two")
    assert "WARNING" not in out and cells(out, "2 aum_small")[3] == "60.00 (+10.00) *"


def test_other_code_is_a_difference(capsys, monkeypatch):
    make_run("one", results_of({"all": 10}))
    make_run("two", results_of({"all": 10}), lr=0.1, commit="d" * 40)
    out = run_compare(capsys, monkeypatch, "one", "two")[1]
    assert cells(out, "commit of the code")[1:] == ["ccccccc", "ddddddd"]


def test_csv_has_every_figure_of_every_run(capsys, monkeypatch):
    make_run("one", results_of({"all": 10}), seed=3)
    make_run("two", results_of({"all": 12}), lr=0.1)
    code, out, _ = run_compare(capsys, monkeypatch, "one", "two", "--csv", "out/table.csv")
    assert code == 0 and "written: out/table.csv" in out
    with open("out/table.csv", newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["run_id"], one["--seed"], one["--lr"], one["macro_avg_acc"]) == ("one", "3", "0.0005", "0.5")
    assert two["bus"] == "0.6" and two["c"] == "" and set(SCENES) | set(DEVICES) <= set(two)
    Path("out/file").write_text("")
    code, _, err = run_compare(capsys, monkeypatch, "one", "--csv", "out/file/table.csv")
    assert code == 2 and "cannot be written" in err


def test_which_runs_must_be_said(capsys, monkeypatch):
    assert "--all" in refusal(CompareConfig)
    assert "not both" in refusal(CompareConfig, ("one",), P, True)
    code, _, err = run_compare(capsys, monkeypatch, "--all")
    assert code == 2 and "no run in P/" in err


def test_a_run_of_the_scripts(general_run, monkeypatch):
    monkeypatch.chdir(general_run.parent.parent)
    (finished,), _ = read_all("P", [general_run.name])
    assert finished.flags["embed_dim"] == 16
    assert finished.figure("macro_avg_acc") == read_results(general_run)["macro_avg_acc"]
    assert finished.figure("complexity/macs") > 0
