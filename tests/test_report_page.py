"""The page of a run: its figures, its HTML, and what a browser makes of it."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from browser import LAPTOP, PHONE, Browser, find_browser
from conftest import RATE, refusal, tone
from made_up_run import COMPLEXITY, made_up, write_run
from matplotlib.image import imread

from dcase.data.labels import DEVICE_GROUPS, DEVICES, SCENES
from dcase.model.metrics import mean_and_error
from dcase.report import bootstrap, comparison, mistakes, sounds, tested
from dcase.report import page as page_module
from dcase.report.__main__ import main
from dcase.report.bootstrap import BINS, Figures, reliability
from dcase.report.comparison import write_comparison
from dcase.report.groups import Group, grouped
from dcase.report.mistakes import Blame, blame, same_sound
from dcase.report.page import write_page
from dcase.report.predictions import Predictions, read_predictions, write_predictions
from dcase.report.run_files import read_finished
from dcase.report.svg import axis
from dcase.report.tables import own_models
from dcase.report.words import percent, title
from dcase.runs.config import DeviceConfig
from dcase.runs.folder import Run

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The tables of a page as text, and everything that names something else."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.ids: list[str] = []
        self.references: list[str] = []  # ids that something points to
        self.addresses: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.captions: dict[str, str] = {}
        self._open: list[str] = []
        self._table = ""
        self.feed(self.text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.references += attributes.get("aria-labelledby", "").split()
        for name in ("href", "src"):
            address = attributes.get(name, "")
            self.references += [address[1:]] if address.startswith("#") else []
            self.addresses += [address] if address and not address.startswith("#") else []
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = attributes["id"]
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("th", "td"):
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> where {self._open[-3:]} is open"
        self._open.pop()

    def handle_data(self, data):
        if "caption" in self._open:
            self.captions[self._table] = self.captions.get(self._table, "") + data
        elif "td" in self._open or "th" in self._open:
            self.tables[self._table][-1][-1] += data if not self._open[-1] == "small" else f" {data}"

    def rows(self, table: str) -> dict[str, list[str]]:
        """By the first cell of each row, without the header."""
        return {row[0]: row[1:] for row in self.tables[table][1:]}

    def check(self) -> None:
        """Whole, of one piece, and readable by a screen reader."""
        assert self.text.startswith("<!doctype html>")
        assert len(self.ids) == len(set(self.ids))
        assert set(self.references) <= set(self.ids)
        for address in self.addresses:
            assert re.match(r"data:|\.\./\w+/report/index\.html$", address), address[:80]
        assert "url(" not in self.text and "@import" not in self.text
        assert {tag for tag, _ in self.elements} & {"link", "script", "iframe", "object"} <= {"link", "script"}
        assert not [a for tag, a in self.elements if tag == "script" and "src" in a]
        assert all(a.get("alt") for tag, a in self.elements if tag == "img")
        assert all(a.get("aria-label") and a["preload"] == "none" for tag, a in self.elements if tag == "audio")
        assert set(self.captions) == set(self.tables) and all(self.captions.values())
        assert all(a.get("scope") in ("row", "col") for tag, a in self.elements if tag == "th")
        headings = [int(tag[1]) for tag, _ in self.elements if re.fullmatch("h[1-6]", tag)]
        assert headings.count(1) == 1 and headings[0] == 1
        assert all(b - a <= 1 for a, b in zip(headings, headings[1:], strict=False)), headings


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Pages of 400 draws are made four times as fast, and look the same."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (page_module, comparison):
            patch.setattr(module, "Figures", partial(Figures, draws=400))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Three tested runs on the same clips, with the recordings of them all: "one", "two" of another seed, and "other"
    with another learning rate."""
    project = tmp_path_factory.mktemp("report") / "P"
    data = project.parent / "data"
    predictions = made_up()
    (data / "audio").mkdir(parents=True)
    sound = io.BytesIO()
    soundfile.write(sound, tone("park", "a", 0), RATE, format="WAV", subtype="PCM_16")
    for name in predictions.filenames:
        (data / name).write_bytes(sound.getvalue())
    write_run(project / "one", predictions, data, experiment_name="One <b>& only</b>")
    rng = np.random.default_rng(1)
    for name, seed in (("two", 1), ("other", 0)):
        logits = np.round(predictions.logits + rng.normal(0, 1, predictions.logits.shape), 4)
        write_run(project / name, replace(predictions, logits=logits), data, seed)
    change(project / "other", "config.json", lambda c: c["config"]["fit"].update(lr=0.001))
    return project


def change(run: Path, file: str, how) -> None:
    content = json.loads((run / file).read_text())
    how(content)
    (run / file).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def page(project) -> Path:
    return write_page(read_finished(project / "one"))


@pytest.fixture(scope="module")
def parsed(page) -> Page:
    return Page(page)


@pytest.fixture(scope="module")
def compared(project) -> Path:
    """The comparison of the three runs."""
    return compare(project / "one", project / "two", project / "other")


def compare(*runs: Path) -> Path:
    return write_comparison([read_finished(run) for run in runs], runs[0].parent / "comparison")


def results_of(page: Path) -> dict:
    return json.loads((page.parent.parent / "results.json").read_text())


# The page


def test_the_page_is_of_one_piece(page, parsed):
    parsed.check()
    assert "One &lt;b&gt;&amp; only&lt;/b&gt;" in parsed.text and "<b>& only" not in parsed.text
    assert page.stat().st_size < 5e6


def test_tables_match_the_results(page, parsed):
    results = results_of(page)
    predictions = read_predictions(page.parent.parent / "predictions.csv")
    scenes = parsed.rows("scene-table")
    for i, scene in enumerate(SCENES):
        row, confusion = scenes[title(scene)], np.array(results["confusion"])
        assert row[0] == percent(results["scene_acc"][scene])
        assert row[3:5] == [f"{confusion[i].sum():,}", f"{confusion[:, i].sum():,}"]
    assert scenes["Macro average"][0] == percent(results["macro_avg_acc"])
    devices = parsed.rows("device-table")
    assert {d: devices[d.upper()][1] for d in DEVICES} == {d: percent(a) for d, a in results["device_acc"].items()}
    groups = parsed.rows("group-table")
    assert [row[0] for row in groups.values()] == [percent(results["device_group_acc"][g]) for g in DEVICE_GROUPS]
    figures = parsed.rows("figures")
    assert figures["Accuracy over all clips"][0] == percent(results["acc"])
    assert figures["Log loss"][0] == f"{results['loss']:.4f}"
    expected = {"all": np.array(results["confusion"])}
    for group, members in DEVICE_GROUPS.items():
        expected[group] = predictions.confusion[[DEVICES.index(d) for d in members]].sum(0)
    expected |= {device: predictions.confusion[i] for i, device in enumerate(DEVICES)}
    for name, counts in expected.items():
        shares = 100 * counts / counts.sum(1, keepdims=True)
        for i, row in enumerate(parsed.tables[f"matrix-{name}"][1:]):
            assert row[0] == f"{title(SCENES[i])} {counts[i].sum():,}"
            assert row[1:] == [f"{share:.1f} {n:,}" for share, n in zip(shares[i], counts[i], strict=True)]


def test_complexity_configuration_and_environment(parsed):
    complexity = parsed.rows("complexity-table")
    assert complexity["MACs"] == ["31,459,876", "30,000,000", "1.05 x, over"]
    assert complexity["Memory (as stored)"] == ["109,280 B", "128,000 B", "0.854 x, within"]
    assert parsed.rows("macs")["scan"][:2] == ["30,000,000", percent(30_000_000 / COMPLEXITY["macs"])]
    assert "✗ over the limit of 30,000,000" in parsed.text and "✓ within the limit of 128,000 B" in parsed.text
    changed = parsed.rows("changed-one")
    assert changed["--lr"] == ["0.005", "0.0005"] and changed["--n_mels"] == ["64", "256"]
    assert "--n_epochs" not in changed and parsed.rows("config-one")["--n_epochs"] == ["Training", "150"]
    assert parsed.rows("config-one")["--lr"] == ["Training", "0.005 ≠"]
    environment = parsed.rows("environment-table")
    assert environment["Tested: scan backend"] == ["cpu"] and environment["Seed"] == ["0"]
    assert environment["Commit"] == ["abc123"] and environment["torch"] == ["2.11.0"]


def test_a_script_makes_page_and_predictions(general_run, learnable):
    results = json.loads((general_run / "results.json").read_text())
    p = read_predictions(general_run / "predictions.csv")
    assert p.confusion.sum(0).tolist() == results["confusion"]
    assert p.loss.mean() == pytest.approx(results["loss"], abs=1e-4)
    listed = [line.split("\t")[0] for line in (learnable / "split_setup" / "test.csv").read_text().splitlines()[1:]]
    assert p.filenames.tolist() == listed
    parsed = Page(general_run / "report" / "index.html")
    parsed.check()
    assert parsed.rows("scene-table")["Macro average"][0] == percent(results["macro_avg_acc"])
    assert parsed.rows("device-table")["B"][1] == percent(results["device_acc"]["b"])
    assert set(parsed.rows("device-table")) == {"A", "B", "S1", "S4"}  # what has no clip has no row
    assert {"curve-train-loss", "curve-val-macro_avg_acc", "curve-lr"} <= set(parsed.ids)
    tested_on = results["tested_on"]
    assert tested_on["accelerator"] == "cpu" and tested_on["scan_backend"] in ("cpu", "torch") and tested_on["name"]


def test_an_older_run_has_a_page_that_says_how_to_get_the_rest(tmp_path):
    run = write_run(tmp_path / "old", made_up(), tmp_path / "nowhere")
    (run / "predictions.csv").unlink()
    parsed = Page(write_page(read_finished(run)))
    parsed.check()
    assert "no predictions.csv" in parsed.text and "test_only.py" in parsed.text
    assert parsed.rows("device-table")["A"][1] == percent(results_of(run / "report" / "index.html")["device_acc"]["a"])
    assert "matrix-all" in parsed.tables and "matrix-a" not in parsed.tables and "95 % interval" not in parsed.text


def test_a_test_shows_how_its_checkpoint_was_trained(tmp_path):
    kept = {"kept": True, "reason": "it beats the general one", "n_train": 1840, "n_val": 210}
    outcomes = {"a": {**kept, "general": 0.5, "fine_tuned": 0.5125}}
    trained = write_run(tmp_path / "trained", made_up(), tmp_path / "nowhere", seed=3)
    change(trained, "results.json", lambda r: r.update(fine_tuning=outcomes))
    run = write_run(tmp_path / "tested", made_up(), tmp_path / "nowhere")
    (run / "metrics.csv").unlink()
    for part in ("split", "fit", "augment", "distill"):
        change(run, "config.json", lambda c, part=part: c["config"].pop(part))
    change(run, "config.json", lambda c: c["config"].update(ckpt_path=str(trained / "checkpoints" / "best.ckpt")))
    parsed = Page(write_page(read_finished(run)))
    parsed.check()
    assert "curve-train-loss" in parsed.ids and "From run trained" in parsed.text and "seed 3" in parsed.text
    assert "test of run trained (general model) · run tested" in parsed.text
    assert "<title>aum_small (test): run tested</title>" in parsed.text
    assert "1 of 1 fine-tuned devices has a model of its own: A. " in parsed.text
    accuracies = ["50.00", "51.25", "yes: it beats the general one"]
    assert parsed.rows("fine-tuning-table")["A"] == ["1,840", "210", *accuracies]
    assert "changed-trained" in parsed.tables and "--ckpt_path" in parsed.rows("changed-tested")


def test_predictions_of_another_test_are_not_shown(tmp_path):
    run = write_run(tmp_path / "mixed", made_up(), tmp_path / "nowhere")
    write_predictions(made_up(seed=5), run / "predictions.csv")
    assert "comes from another test" in read_finished(run).missing
    change(run, "results.json", lambda r: r.update(n_clips=7))
    assert "comes from another test" in read_finished(run).missing


def test_without_recordings_there_are_words_alone(project, tmp_path):
    run = write_run(tmp_path / "away", made_up(), tmp_path / "nowhere")
    parsed = Page(write_page(read_finished(run)))
    parsed.check()
    assert "No pictures and no sound" in parsed.text and "--dataset_dir" in parsed.text
    assert not {"img", "audio"} & {tag for tag, _ in parsed.elements} and "% confidence" in parsed.text
    parsed = Page(write_page(read_finished(run), project.parent / "data"))
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("img") == tags.count("audio") == 12 + 4 * len(DEVICES)
    parsed = Page(write_page(read_finished(run), project.parent / "data", with_audio=False))
    assert "audio" not in {tag for tag, _ in parsed.elements} and "img" in {tag for tag, _ in parsed.elements}


def test_a_page_that_fails_does_not_fail_the_test(project, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no\nsuch luck")

    monkeypatch.setattr(tested, "write_page", broken)
    tested.make_page(Run(project / "one"), project.parent / "data", True)
    out = capsys.readouterr().out
    assert out.startswith(
        "The report's page could not be made (no such luck): python -m dcase.report one --project_name"
    )


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.1 + 0.2, 0.3], [1e-20], [1, 12], [-3.0, 1e6]])
def test_an_axis_has_room_for_its_values_and_no_two_ticks_that_read_the_same(values):
    made = axis("loss", values)
    assert made.low <= min(values) and max(values) <= made.high
    assert made.low < made.high
    words = [made.text(tick) for tick in made.ticks]
    assert len(set(words)) == len(words)


def test_runs_without_clips_of_a_scene_or_with_one_device(tmp_path):
    p = made_up()
    run = write_run(tmp_path / "few", p.select((p.device == 2) & (p.scene != 3)), tmp_path / "nowhere")
    parsed = Page(write_page(read_finished(run)))
    parsed.check()
    assert parsed.rows("scene-table")[title(SCENES[3])][:3] == ["-", "", "-"]
    assert list(parsed.rows("device-table")) == ["C"] and "matrix-c" in parsed.tables
    assert list(parsed.rows("group-table")) == ["Real (A, B, C)"] and "Weakest scene" in parsed.text
    assert "Weakest device" not in parsed.text and "Seen devices" not in parsed.text and "simulated," not in parsed.text
    both = [write_run(tmp_path / "P" / name, p.select(p.device < 2), tmp_path / "nowhere") for name in ("x", "y")]
    parsed = Page(compare(*both))
    assert list(parsed.rows("device-table")) == ["A", "B"] and list(parsed.rows("group-table")) == ["Real (A, B, C)"]


def test_nothing_is_the_weakest_where_all_is_right_or_equally_wrong(tmp_path):
    p = made_up()
    run = write_run(tmp_path / "right", p.select(p.correct), tmp_path / "nowhere")
    text = write_page(read_finished(run)).read_text()
    assert "There is no mistake." in text and "Every clip is right." in text and "Weakest" not in text
    wrong = replace(p, logits=np.eye(len(SCENES))[(p.scene + 1) % len(SCENES)])
    text = write_page(read_finished(write_run(tmp_path / "wrong", wrong, tmp_path / "nowhere"))).read_text()
    assert "Weakest" not in text and "Every clip" not in text


def test_clips_of_one_name_are_told_apart_by_their_folders(page, tmp_path):
    names = re.findall("<code>(.*?)</code>", page.read_text())
    assert names and not any("/" in name for name in names)
    p = made_up(n=90)
    named = replace(p, filenames=np.array([f"audio/{i % 45}/clip{i // 45}.wav" for i in range(90)]))
    run = write_run(tmp_path / "named", named, tmp_path / "nowhere")
    names = re.findall("<code>(.*?)</code>", write_page(read_finished(run)).read_text())
    assert names and all(re.fullmatch(r"\d+/clip[01]\.wav", name) for name in names)


# Predictions


def test_predictions_come_back_as_they_were_written(tmp_path):
    p = made_up(n=50)
    write_predictions(p, tmp_path / "predictions.csv")
    again = read_predictions(tmp_path / "predictions.csv")
    for column in ("filenames", "scene", "device", "location", "logits"):
        assert np.array_equal(getattr(again, column), getattr(p, column))
    first = (tmp_path / "predictions.csv").read_text().splitlines()[0]
    assert first == "filename,scene_label,device_id,location," + ",".join(SCENES)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("filename,", "file,", "its columns are not"),
        (",a,", ",z9,", "device_id 'z9' is not one of"),
        (f",{SCENES[made_up(n=50).scene[0]]},", ",airpot,", "scene_label 'airpot' is not one of airport"),
        (None, None, "cannot be read"),
        ("-", "", "cannot be read"),
    ],
)
def test_bad_predictions_are_refused(tmp_path, old, new, said):
    path = tmp_path / "predictions.csv"
    write_predictions(made_up(n=50), path)
    head, _, rows = path.read_text().partition("\n")
    if old == "filename,":
        path.write_text(f"{head.replace(old, new)}\n{rows}")
    elif old == "-":
        path.write_text(f"{head}\n{rows.splitlines()[0].rpartition(',')[0]},nan\n")
    elif old:
        path.write_text(f"{head}\n{rows.replace(old, new)}")
    else:
        path.unlink()
    message = refusal(read_predictions, path)
    assert str(path) in message and said in message and "test_only.py" in message


# Intervals and calibration


def test_intervals_hold_the_figures_and_agree_with_the_standard_error():
    p = made_up()
    figures = Figures(p)
    names = [
        ("macro_avg_acc",),
        ("acc",),
        ("loss",),
        *(("scene", s) for s in SCENES),
        *(("device", d) for d in DEVICES),
    ]
    for name in names:
        estimate = figures(*name)
        assert estimate.low <= estimate.value <= estimate.high
    mean, error = mean_and_error(p.correct, p.location)
    acc = figures("acc")
    assert acc.value == pytest.approx(mean)
    assert (acc.high - acc.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)
    over_clips = Figures(replace(p, location=p.filenames))("acc")
    assert acc.high - acc.low > 1.5 * (over_clips.high - over_clips.low)  # clips of a location are alike
    assert Figures(p)("acc") == acc  # the draws are the same every time
    gap = figures("gap", "a")
    others = p.correct[p.device != 0].mean()
    assert gap.value == pytest.approx(p.correct[p.device == 0].mean() - others)


def of_locations(p: Predictions, n: int) -> Predictions:
    return p.select(np.isin(p.location, np.unique(p.location)[:n]))


def test_fewer_than_five_locations_have_no_interval():
    p = made_up()
    for n in (1, 4):
        alone = Figures(of_locations(p, n))
        assert alone("acc").value is not None and alone("acc").low is None and not alone("acc").clear
        assert alone.minus(alone, "acc") == (0, None, None)
    assert Figures(of_locations(p, 5))("acc").low is not None
    assert Figures(p.select(p.device == 0))("device", "b") == (None, None, None)


def test_a_difference_of_a_few_places_or_without_a_width_is_not_clear():
    """Every clip won is the same difference in each draw: that says nothing about other places."""
    p = made_up()
    for n, clear in ((5, False), (12, True)):
        q = of_locations(p, n)
        won, lost = (Figures(replace(q, logits=logits_of(q, right))) for right in (0.9, 0.2))
        estimate = won.minus(lost, "acc")
        assert estimate.low > 0 and estimate.clear is clear
    all_won, all_lost = (Figures(replace(q, logits=logits_of(q, right))) for right in (1, 0))
    estimate = all_won.minus(all_lost, "acc")
    assert estimate == (1, 1, 1) and not estimate.clear


def logits_of(p: Predictions, share: float) -> np.ndarray:
    """Logits of which that share is right, in every location alike."""
    right = np.random.default_rng(0).random(len(p)) < share
    return 9.0 * np.eye(len(SCENES), dtype=np.float32)[np.where(right, p.scene, (p.scene + 1) % len(SCENES))]


def test_an_axis_of_percent_ends_at_100():
    for values in ([100.0], [0.0], [96.0, 100.0], [0.0, 100.0], [3.0]):
        made = axis("accuracy (%)", values)
        assert 0 <= made.low <= min(values) <= max(values) <= made.high <= 100 and made.low < made.high


@pytest.mark.parametrize(
    "n, percentile, expanded", [(6, 0.853, 0.916), (10, 0.893, 0.929), (30, 0.920, 0.935), (200, 0.942, 0.942)]
)
def test_how_often_an_interval_holds_the_truth(n, percentile, expanded):
    """Tests of n locations, drawn again and again; a location's clips are alike, and it has more or fewer of them."""
    rng = np.random.default_rng(n)
    tests, truth = 2000, 0.75
    clips = rng.integers(10, 40, (n, tests))
    right = rng.binomial(clips, rng.beta(6 * truth, 6 * (1 - truth), (n, tests)))
    times = rng.multinomial(n, np.full(n, 1 / n), size=1000).astype(float)
    drawn = (times @ right) / (times @ clips)  # (draws, tests)

    def coverage(low: np.ndarray, high: np.ndarray) -> float:
        return ((low <= truth) & (truth <= high)).mean()

    assert coverage(*np.quantile(drawn, [0.025, 0.975], axis=0)) == pytest.approx(percentile, abs=0.01)
    assert coverage(*bootstrap.expanded(drawn, n)) == pytest.approx(expanded, abs=0.01)


def test_quantiles_of_students_t():
    exact = {4: 2.7764, 5: 2.5706, 9: 2.2622, 29: 2.0452, 199: 1.9720}  # of any table
    assert {degrees: bootstrap._student(degrees) for degrees in exact} == pytest.approx(exact, rel=3e-3)


def test_the_draws_of_a_figure():
    p = made_up()
    figures = Figures(p, draws=50, seed=1)
    drawn = figures.drawn("scene", "bus")
    assert drawn.shape == (50,) and drawn.std() > 0 and figures.draws == 50
    assert np.array_equal(drawn, Figures(p, 50, 1).drawn("scene", "bus"))
    assert not np.array_equal(drawn, Figures(p, 50, 2).drawn("scene", "bus"))
    ends = bootstrap.expanded(figures.drawn("acc"), figures.n_locations("acc"))
    assert figures("acc")[1:] == pytest.approx(ends)
    assert len(Figures(p).drawn("acc")) == bootstrap.DRAWS


@pytest.mark.parametrize(
    "command, said",
    [
        (["benchmarks/intervals.py", "--tests", "2"], "\n| macro-average accuracy "),
        (["benchmarks/report.py", "--help"], "--folder"),
        (["-m", "benchmarks.export", "--help"], "--checkpoints"),
    ],
)
def test_benchmarks_start_as_files_and_as_modules(command, said):
    root = Path(__file__).resolve().parent.parent
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command], cwd=root, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_a_page_says_of_how_many_locations_its_intervals_are(page, parsed, compared):
    p = made_up()
    n = len(set(p.location))
    text = page.read_text()
    assert f"draws of the {n} recording locations" in text and "clips of only" not in text
    assert parsed.rows("scenes-a")["Bus"][-1] == f"{len(set(p.location[(p.device == 0) & (p.scene == 1)]))}"
    assert f"from {n} recording locations, are right" in text
    assert f"draws of the {n} recording locations" in compared.read_text()


ROUGH = "clips of only 8 recording locations: the intervals are rough, and rather too narrow."
NONE = "The test has clips of 3 recording locations: with fewer than 5 there are no intervals."
SINGLE = "clips come from fewer than 5 locations has no interval"


@pytest.mark.parametrize(
    "n, said, unsaid", [(8, (ROUGH, SINGLE), ("(95 %: -)",)), (3, (NONE,), ("draws", "rough", "95 %: ", "Hesterberg"))]
)
def test_pages_of_few_locations_say_so(tmp_path, n, said, unsaid):
    few = of_locations(made_up(), n)
    runs = [write_run(tmp_path / "P" / name, few, tmp_path / "nowhere") for name in ("few", "again")]
    for path in (write_page(read_finished(runs[0])), compare(*runs)):
        Page(path).check()
        text = path.read_text().partition("<script>")[0]
        assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_differences_are_drawn_together():
    p = made_up()
    rng = np.random.default_rng(3)
    q = replace(p, logits=p.logits + rng.normal(0, 0.3, p.logits.shape))
    a, b = Figures(p), Figures(q)
    assert a.minus(a, "macro_avg_acc") == (0, 0, 0)
    paired, alone = b.minus(a, "acc"), b("acc")
    assert paired.value == pytest.approx(q.correct.mean() - p.correct.mean())
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_calibration_error():
    p = made_up()
    bins = reliability(p)
    assert sum(b.n_clips for b in bins) == len(p) and len(bins) == BINS
    there = [b for b in bins if b.n_clips]
    assert all(b.low <= b.confidence <= b.high for b in there)
    expected = sum(b.n_clips * abs(b.acc - b.confidence) for b in there) / len(p)
    assert Figures(p)("calibration_error").value == pytest.approx(expected)
    sure = replace(p, logits=1000 * np.eye(10)[p.predicted])
    assert Figures(sure)("calibration_error").value == pytest.approx(1 - p.correct.mean())
    assert reliability(sure)[-1].n_clips == len(p) and bootstrap.LEVEL == 0.95


# Mistakes, pictures, sound


def test_most_confident_mistakes():
    p = made_up()
    rows = mistakes.most_confident(p, 12)
    assert len(rows) == 12 == len(set(p.location[rows])) and not p.correct[rows].any()
    assert list(p.confidence[rows]) == sorted(p.confidence[rows], reverse=True)
    assert p.confidence[rows[0]] == p.confidence[~p.correct].max()
    assert set(p.device[mistakes.most_confident(p, 4, device=7)]) == {7}


def test_whose_fault_a_mistake_is():
    names = np.array([f"audio/bus-paris-1-0-{d}.wav" for d in ("a", "b", "c")] + ["audio/bus-paris-2-0-a.wav"])
    logits = np.zeros((4, 10))
    logits[[0, 3], 0] = 1  # device a is wrong: it says airport
    logits[[1, 2], SCENES.index("bus")] = 1
    p = Predictions(names, np.full(4, SCENES.index("bus")), np.array([0, 1, 2, 0]), np.array(["paris-1"] * 4), logits)
    others = mistakes.same_sound(p)
    assert others == [[1, 2], [0, 2], [0, 1], []]
    assert mistakes.blame(p, others, 0) == mistakes.Blame(device=1, sound=0, alone=1)
    (mixed,) = mistakes.mixed_up(p.confusion[0], p.confusion[1:].sum(0), 3)
    assert mixed == ("bus", "airport", 2, 2, 0.0) and mixed.share == 1


def from_uri(uri: str, kind: str) -> io.BytesIO:
    head, _, data = uri.partition(",")
    assert head == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(data))


def test_pictures_and_sound():
    log_mel = np.tile(np.linspace(0, 1, 20)[:, None], (1, 7))  # louder towards high mel bins
    image = imread(from_uri(sounds.picture(log_mel, 0, 1), "image/png"), format="png")[..., 0]
    assert image.shape == (20, 7) and np.allclose(image[::-1, 0], np.linspace(0, 1, 20), atol=0.02)
    waveform = torch.from_numpy(tone("park", "a", 0)).float()[None]
    samples, rate = soundfile.read(from_uri(sounds.audio(0.01 * waveform, RATE), "audio/mpeg"))
    assert rate == 16_000 and 0.5 <= len(samples) / rate < 0.75 and 0.5 < np.abs(samples).max() <= 1
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(1500, rel=0.12)  # the tone of a park


# Several runs


def test_comparison(project, compared):
    runs = [read_finished(project / name) for name in ("one", "two", "other")]
    assert compared == project / "comparison" / "one_two_other.html"
    parsed = Page(compared)
    parsed.check()
    one, two, other = (run.results for run in runs)
    rows = parsed.tables["runs"][1:]
    for row, results in zip(rows, (one, two, other), strict=True):
        assert row[1] == percent(results["macro_avg_acc"])
    less = 100 * (two["macro_avg_acc"] - one["macro_avg_acc"])
    assert rows[1][3].rstrip(" *") == f"{less:+.2f}"
    low, high = map(float, rows[1][4].split(" to "))
    assert low < less < high and (rows[1][3].endswith("*")) == (high < 0 or low > 0)
    tram = parsed.rows("scene-table")["Tram"]
    assert [tram[0], tram[1], tram[4]] == [percent(r["scene_acc"]["tram"]) for r in (one, two, other)]
    device = parsed.rows("device-table")["S4"]
    assert device[2].rstrip(" *") == f"{100 * (two['device_acc']['s4'] - one['device_acc']['s4']):+.2f}"
    accuracies = [one["macro_avg_acc"], two["macro_avg_acc"]]
    spread = f"{percent(np.mean(accuracies))} ± {percent(np.std(accuracies, ddof=1))}"
    assert parsed.tables["seed-table"][1][1:3] == ["0, 1", spread]
    assert parsed.tables["seed-table"][2][2] == percent(other["macro_avg_acc"])
    assert parsed.rows("differing") == {
        "--seed": ["0", "1", "0"], "--lr": ["0.005", "0.005", "0.001"],
        "--experiment_name": ["One <b>& only</b>", "none", "none"],
    }  # fmt: skip
    before, after = (run.predictions.correct for run in runs[:2])
    won = parsed.rows("won-two")["All"]
    assert won[1] == f"{(before & ~after).sum():,}" and won[2] == f"{(~before & after).sum():,}"
    counts = np.array(two["confusion"]) - np.array(one["confusion"])
    assert parsed.tables["matrix-two-all"][1][1].split()[1] == (f"{counts[0, 0]:+,}" if counts[0, 0] else "0")


def tuned_run(folder: Path, data: Path, curves: dict[str, tuple[float, float]], lr: float) -> Path:
    """A run of stage 2. ``curves``: the beginning of a model's metrics -> its first and last training loss."""
    run = write_run(folder, made_up(), data, of=DeviceConfig(ckpt_id="one"))
    outcome = {"n_train": 9, "n_val": 9, "general": 0.5, "fine_tuned": 0.5, "kept": False, "reason": "luck", "lr": lr}
    change(run, "results.json", lambda r: r.update(fine_tuning={device: outcome for device in ("a", "b")}))
    lines = [f"{step},{name}train/loss,{loss}" for name, losses in curves.items() for step, loss in enumerate(losses)]
    lines += [f"1,{name}val/macro_avg_acc,{0.9 - losses[1] / 10}" for name, losses in curves.items()]
    (run / "metrics.csv").write_text("step,name,value\n" + "\n".join(lines) + "\n")
    return run


@pytest.fixture(scope="module")
def tuned_page(tuned) -> Path:
    return write_page(read_finished(tuned[0]))


@pytest.fixture(scope="module")
def tuned(project, tmp_path_factory) -> list[Path]:
    """Two runs of stage 2: one with two learning rates, the second of them chosen, one with a single one."""
    folder, data = tmp_path_factory.mktemp("tuned") / "P", project.parent / "data"
    tried = {f"{device}/lr_{lr}/": (2.0, 1.0 + lr) for device in ("a", "b") for lr in (0.1, 0.5)}
    once = {"a/": (3.0, 1.25), "s1/": (3.0, 1.75)}
    return [tuned_run(folder / "tried", data, tried, 0.5), tuned_run(folder / "once", data, once, 0.2)]


def drawn_lines(path: Path, chart: str) -> tuple[str, list[str]]:
    """What a chart's title says, and the styles of its lines."""
    (figure,) = re.findall(rf'<figure id="{chart}".*?</figure>', path.read_text(), re.S)
    (said,) = re.findall("<title[^>]*>(.*?)</title>", figure)
    return said, re.findall(r'<path d="M[^"]*L[^"]*" class="(line\d)"', figure)


def test_curves_of_stage_2_are_overlaid_device_by_device(project, tuned):
    path = compare(*tuned, project / "one")
    Page(path).check()
    labels = ["aum_small (device-specific, tried, seed 0)", "aum_small (device-specific, once, seed 0)"]
    said, lines = drawn_lines(path, "curve-a-train-loss")
    assert said == f"Training loss, device A. {labels[0]}: 2 to 1.5, {labels[1]}: 3 to 1.25" and lines == [
        "line0",
        "line1",
    ]
    assert drawn_lines(path, "curve-b-train-loss")[1] == ["line0"]
    said, lines = drawn_lines(path, "curve-s1-train-loss")  # the same run has the same style everywhere
    assert said == f"Training loss, device S1. {labels[1]}: 3 to 1.75" and lines == ["line1"]
    assert f"{labels[1]}: 77.5 to 77.5" in drawn_lines(path, "curve-a-val-macro_avg_acc")[0]
    said, lines = drawn_lines(path, "curve-train-loss")  # the general model's is drawn for itself, and named
    assert said.startswith("Training loss. One &lt;b&gt;") and lines == ["line2"]
    (legend,) = re.findall('id="curve-train-loss".*?<ul class="legend">(.*?)</ul>', path.read_text(), re.S)
    assert legend.count("<li>") == 1 and "One" in legend and "line2" in legend


def test_curves_of_stage_2_stand_together(tuned_page):
    Page(tuned_page).check()
    said, lines = drawn_lines(tuned_page, "curve-b-train-loss")
    assert said == "Training loss, device B. lr 0.1: 2 to 1.1, lr 0.5: 2 to 1.5" and lines == ["line0", "line1"]
    assert "curve-s1-train-loss" not in tuned_page.read_text()


def test_a_chart_says_to_those_who_do_not_see_it_where_its_line_begins_and_ends(page, tuned):
    assert drawn_lines(page, "curve-train-loss")[0] == "Training loss. 1.852 to 0.1548"  # of 1.851851..., 0.154798...
    said, _ = drawn_lines(write_page(read_finished(tuned[1])), "curve-a-train-loss")
    assert said == "Training loss, device A. 3 to 1.25"  # one learning rate has no name


def test_a_page_tells_the_stages_apart(page, tuned_page):
    text, device_specific = page.read_text(), tuned_page.read_text()
    assert '<p class="facts">general model · run one ·' in text and "(general): run one</title>" in text
    assert "of its own" not in text
    assert '<p class="facts">device-specific models · run tried ·' in device_specific
    assert "<title>aum_small (device-specific): run tried</title>" in device_specific
    header = device_specific.partition("</header>")[0]
    assert "No device has a model of its own: the general model stays for all of them. " in header
    assert 'href="#fine-tuning"' in header
    own = {"a": {"kept": True}, "b": {"kept": False}, "s1": {"kept": True}}
    assert own_models(own) == "2 of 3 fine-tuned devices have a model of their own: A, S1."


def test_runs_whose_predictions_are_all_equal_are_said_to_be(project, tuned):
    parsed = Page(compare(project / "one", *tuned, project / "two"))  # one, tried and once are equal
    parsed.check()
    for name in ("tried", "once"):
        said = f"aum_small (device-specific, {name}, seed 0): every prediction is equal to the first run&#39;s, so no "
        assert f"{said}figure differs. No device has a model of its own" in parsed.text
        assert "Nothing: every prediction is equal to that of one." in parsed.text
        assert f"won-{name}" not in parsed.tables
    assert "won-two" in parsed.tables and parsed.text.count("every prediction is equal to the first") == 2


def test_runs_of_other_clips_are_compared_without_intervals(project, tmp_path):
    p = made_up()
    run = write_run(tmp_path / "half", p.select(np.arange(len(p)) % 2 == 0), tmp_path / "nowhere")
    parsed = Page(compare(project / "one", run))
    parsed.check()
    assert "No intervals for half" in parsed.text and "different data" in parsed.text
    assert parsed.tables["runs"][2][3:5] == ["-", "-"] and parsed.rows("device-table")["A"][2:] == ["-", "-"]
    assert "It was tested on other data than one." in parsed.text and "matrix-half-all" not in parsed.tables


def test_seeds_stand_together(project):
    runs = [read_finished(project / name) for name in ("one", "other", "two")]
    assert [group.ids for group in grouped(runs)] == [["one", "two"], ["other"]]
    larger = dict(runs[2].config, machine={**runs[2].config.get("machine", {}), "batch_size": 99})
    assert len(grouped([runs[0], replace(runs[2], config=larger)])) == 2  # another batch size is no other seed
    assert Group(runs[:1]).deviation("acc") is None


def test_the_command(call_main, project):
    done = call_main(main, "two", "--project_name", project, "--report_audio", "False")
    page = project / "two" / "report" / "index.html"
    assert done.code == 0 and done.out.strip() == f"report: {page}" and "<audio" not in page.read_text()
    call_main(main, "nope", "--project_name", project).refused("run nope: no such run", "one", "two")


@pytest.mark.parametrize(
    "ids, said",
    [([], "which run?"), (["two", "two"], "has a run twice"), (["two", "started"], "has not been tested to its end")],
)
def test_the_command_says_what_is_wrong(project, monkeypatch, ids, said):
    (project / "started").mkdir(exist_ok=True)
    (project / "started" / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["report", *ids, "--project_name", str(project)])
    assert said in refusal(main)


# Looks


def test_text_stands_out_in_light_and_dark():
    """Contrast of at least 4.5, as WCAG 2.2's criterion 1.4.3 has it."""
    style = (Path(sounds.__file__).parent / "templates" / "page.css").read_text()
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 2 and set(themes[0]) == set(themes[1])

    def light(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    for theme in themes:
        for ink in ("ink", "soft", "accent", "good", "bad"):
            assert contrast(theme[ink], theme["card"]) >= 4.5, ink
        assert contrast(theme["ink"], theme["heat"]) >= 4.5  # a confusion's deepest cell
        assert contrast(theme["ink"], theme["note"]) >= 4.5 and contrast(theme["card"], theme["accent"]) >= 4.5
        for line in ("l0", "l1", "l2", "l3", "l4", "l5", "real", "seen", "unseen"):
            assert contrast(theme[line], theme["card"]) >= 3, line  # of what is no text


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the PATH: `make browser` installs it where apt can")
    with Browser(path) as found:
        yield found


VISIBLE = "[...document.querySelectorAll('.panel')].filter(p => p.offsetHeight).map(p => p.id)"
TABLES = """Object.fromEntries([...document.querySelectorAll('table')].map(t =>
    [t.id, [...t.rows].map(r => [...r.cells].map(c => c.textContent))]))"""


@pytest.mark.parametrize("size, dark", [(LAPTOP, False), (PHONE, True)])
def test_a_browser_shows_it_without_a_word(browser, page, compared, size, dark):
    browser.screen(size, dark)
    for path in (page, compared):
        browser.open(path.as_uri())
        assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")  # tables scroll in their own boxes
        assert browser.run("getComputedStyle(document.body).colorScheme") == "light dark"
        assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        broken = "[...document.images].filter(i => i.loading = 'eager').map(i => i.decode())"
        assert browser.run(f"Promise.all({broken}).then(all => all.length)") > 0


def test_small_charts_stand_in_rows_and_can_be_read(browser, tuned):
    path = compare(*tuned)
    for size, columns in ((LAPTOP, 6), (PHONE, 2)):
        browser.screen(size)
        browser.open(path.as_uri())
        grid = "getComputedStyle(document.querySelector('.multiples')).gridTemplateColumns.split(' ').length"
        assert browser.run(grid) == columns
        drawn = "document.querySelector('.multiples text')"
        height = f"parseFloat(getComputedStyle({drawn}).fontSize) * {drawn}.getScreenCTM().a"
        assert browser.run(height) > 9  # CSS pixels
        outside = """[...document.querySelectorAll('.multiples svg')].filter(svg => {
            const box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
            return texts.some(text => text.right > box.right + 1 || text.left < box.left - 1); }).length"""
        assert browser.run(outside) == 0


def test_intervals_have_two_ends_and_flags_are_whole(browser, page):
    browser.screen(PHONE)
    browser.open(page.as_uri())
    ends = "(w => ['::before', '::after'].map(e => parseFloat(getComputedStyle(w, e).left)))"
    left, right = browser.run(f"{ends}(document.querySelector('#device-table .whisker'))")
    assert left == 0 < right
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    lines = """[...document.querySelectorAll('#configuration tbody th, #environment tbody th')].map(th => {
        const range = document.createRange(); range.selectNodeContents(th); return range.getClientRects().length; })"""
    assert set(browser.run(lines)) == {1}  # no name of a flag goes over two lines


def test_no_figure_breaks(browser, tmp_path):
    run = write_run(tmp_path / "large", made_up(n=900), tmp_path / "nowhere")
    large = {"macs": 1_751_572_736, "total_param_bytes": 101_369_384}
    change(run, "results.json", lambda r: r["complexity"].update(large))
    path = write_page(read_finished(run))
    tiles = """[...document.querySelectorAll('.tiles b')].map(b => {
        const range = document.createRange(); range.selectNodeContents(b);
        const box = range.getBoundingClientRect(), tile = b.parentElement.getBoundingClientRect();
        return [b.textContent, range.getClientRects().length, box.right <= tile.right - 1]; })"""
    for size in (PHONE, (360, 640), (320, 640), LAPTOP):
        browser.screen(size)
        browser.open(path.as_uri())
        found = browser.run(tiles)
        assert {"1,751,572,736", "101,369,384 B"} <= {text for text, *_ in found}
        assert all(lines == 1 and inside for _, lines, inside in found), (size, found)


def test_three_clicks_from_a_run_to_why_a_device_fails(browser, page):
    browser.screen(LAPTOP)
    browser.open(page.as_uri())
    assert browser.run(VISIBLE) == ["device-all"]
    weakest = min(results_of(page)["device_acc"], key=results_of(page)["device_acc"].get)
    browser.click(f"#headline a[href='#device-{weakest}']")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run(VISIBLE) == [f"device-{weakest}"]
    for part in (f"#mixed-{weakest}", f"#scenes-{weakest}", f"#matrix-{weakest}", f"#spectrum-{weakest}", ".cards img"):
        assert browser.run(f"document.querySelector('#device-{weakest} {part}').offsetParent !== null")
    played = f"document.querySelector('#device-{weakest} audio')"
    assert 0.4 < browser.run(f"(async a => {{ await a.play(); return a.duration; }})({played})") < 1
    assert browser.complaints() == []


def test_tables_sort_and_the_keyboard_reaches_devices(browser, page):
    browser.screen(LAPTOP)
    browser.open(page.as_uri())
    before = browser.run(TABLES)
    accuracy = "#device-table thead th:nth-child(3) button"
    browser.click(accuracy)
    shown = "[...document.querySelectorAll('#device-table tbody td:nth-child(3)')].map(c => parseFloat(c.textContent))"
    assert browser.run(shown) == sorted(float(row[2]) for row in before["device-table"][1:])
    browser.click(accuracy)
    assert browser.run(shown) == sorted((float(row[2]) for row in before["device-table"][1:]), reverse=True)
    assert browser.run("document.querySelector('#device-table th[aria-sort]').ariaSort") == "descending"
    browser.run("document.querySelector('.tabs a[href=\"#device-real\"]').focus()")
    for _ in range(3):
        browser.press("Tab")
    browser.press("Enter")
    assert browser.run(VISIBLE) == ["device-a"]


def test_without_script_everything_is_there(browser, page):
    browser.screen(PHONE)
    browser.do("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page.as_uri())
        assert len(browser.run(VISIBLE)) == 1 + len(DEVICE_GROUPS) + len(DEVICES)
        shown, parsed = browser.run(TABLES), Page(page)
        assert set(shown) == set(parsed.tables)
        for name, rows in shown.items():
            assert [[c.replace(" ", "") for c in row] for row in rows] == [
                [c.replace(" ", "") for c in row] for row in parsed.tables[name]
            ]
    finally:
        browser.do("Emulation.setScriptExecutionDisabled", value=False)


def test_a_clip_that_half_of_the_other_devices_miss_is_the_sounds_fault():
    names = np.array([f"audio/bus-lyon-1-0-0-{device}.wav" for device in ("a", "b", "c")])
    logits = np.eye(10)[[1, 0, 1]]
    predictions = Predictions(names, np.zeros(3, int), np.arange(3), np.array(["lyon-1"] * 3), logits)
    assert blame(predictions, same_sound(predictions), 0) == Blame(device=0, sound=1, alone=0)


def test_names_of_clips_and_places_are_text_and_no_html(tmp_path):
    p = made_up(n=300)
    names = np.array([f'audio/<img src=x onerror=alert({i})>"{name[6:]}' for i, name in enumerate(p.filenames)])
    places = np.array([f'"><script>alert(1)</script>{place}' for place in p.location])
    run = write_run(tmp_path / "r", replace(p, filenames=names, location=places), tmp_path, experiment_name="<b>me</b>")
    page = Page(write_page(read_finished(run)))
    page.check()
    assert "&lt;img src=x onerror=alert(" in page.text and "&lt;script&gt;" in page.text and "&lt;b&gt;me" in page.text
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
