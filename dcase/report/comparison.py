"""Several runs side by side, each against the first: differences with intervals, and the spread over seeds.

Runs that have been tested on the same clips are drawn together (see `bootstrap`): the interval of a difference is much
narrower than those of its two figures, as a hard location is hard for both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dcase.data.tau22 import DEVICE_GROUPS, DEVICES, SCENES
from dcase.files import replace_file
from dcase.report import setup, svg
from dcase.report.bootstrap import FEWEST, Estimate, Figures, reliability
from dcase.report.devices import matrix_table
from dcase.report.gallery import Gallery
from dcase.report.groups import grouped
from dcase.report.html import Html, cell, el, join, link, section, table
from dcase.report.learning import overlaid
from dcase.report.page import Part, document, how_intervals, main, navigation
from dcase.report.predictions import Predictions
from dcase.report.run_files import Finished
from dcase.report.sounds import data_folder
from dcase.report.tables import own_models
from dcase.report.words import difference, interval, members, percent, title
from dcase.runs.config import EvalConfig, from_plain

LOST = 4  # clips shown of each run: right in the first, wrong in it
MOST_IN_NAME = 8  # ids in the file's name
DEEPEST = 25  # points of change


@dataclass(frozen=True, eq=False)
class Compared:
    """A run, and its predictions in the order that all runs share."""

    run: Finished
    predictions: Predictions | None  # None: not of the same clips as the first run's
    figures: Figures | None

    @property
    def label(self) -> str:
        kind = f"{self.run.kind}, " if self.run.kind else ""
        seed = "" if self.run.seed is None else f", seed {self.run.seed}"
        return f"{self.run.name} ({kind}{self.run.id}{seed})"

    def same_as(self, other: "Compared") -> bool:
        """Every clip has the same prediction, to the last digit that is written."""
        if self.predictions is None or other.predictions is None:
            return False
        return np.array_equal(self.predictions.logits, other.predictions.logits)


def write_comparison(runs: Sequence[Finished], folder: Path, data: Path | None = None, with_audio: bool = True) -> Path:
    """Write <folder>/ID_ID.html; the first run is what the others are compared with. ``data``: folder of the
    recordings; None: what the first run's configuration says.

    Raises `UserError` where the file cannot be written.
    """
    compared = compare(runs)
    ids = [run.id for run in runs]
    more = f"_and_{len(ids) - MOST_IN_NAME}_more" if len(ids) > MOST_IN_NAME else ""
    path = folder / f"{'_'.join(ids[:MOST_IN_NAME])}{more}.html"
    text = document(f"Comparison of {', '.join(ids)}", body(compared, path, _lost_clips(compared, data, with_audio)))
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path


def compare(runs: Sequence[Finished]) -> list[Compared]:
    first: Predictions | None = None
    compared = []
    for run in runs:
        p = run.predictions
        p = None if p is None else p.select(np.argsort(p.filenames, kind="stable"))
        if first is None:
            first = p
        same = first is not None and p is not None and np.array_equal(p.filenames, first.filenames)
        compared.append(Compared(run, p, Figures(p)) if same else Compared(run, None, None))
    return compared


def body(runs: list[Compared], path: Path, lost: dict[str, Html]) -> Html:
    parts: list[Part] = [
        ("headline", "Results", "Results", headline(runs)),
        ("seeds", "Seeds", "Mean and Deviation over Seeds", seeds(runs)),
        ("devices", "Devices", "Devices", by_device(runs)),
        ("scenes", "Scenes", "Scenes", by_scene(runs)),
        ("changes", "Changes", "What Has Changed", changes(runs, lost)),
        ("calibration", "Calibration", "Calibration", calibration(runs)),
        ("learning", "Learning", "Learning Curves", overlaid([(one.label, one.run) for one in runs])),
        ("complexity", "Complexity", "Complexity", complexity(runs)),
        ("configuration", "Configuration", "Configuration: What Differs", configuration(runs)),
        ("environment", "Environment", "Environment", environment(runs)),
    ]
    return join(_header(runs, path), navigation(parts), main(parts))


def _header(runs: list[Compared], path: Path) -> Html:
    entries = []
    for compared in runs:
        page = compared.run.folder / "report" / "index.html"
        there = page.is_file() and compared.run.folder.parent.resolve() == path.parent.parent.resolve()
        to = f"../{compared.run.id}/report/index.html"
        entries.append(el("li", el("a", compared.label, href=to) if there else compared.label))
    notes = dict.fromkeys(compared.run.results["note"] for compared in runs)
    others = [compared.run.id for compared in runs if compared.predictions is None]
    if others:
        notes[
            f"No intervals for {', '.join(others)}: without predictions.csv (test_only.py writes it), or tested on "
            f"other clips than {runs[0].run.id}."
        ] = None
    if len({compared.run.tested_on for compared in runs}) > 1:
        notes["These runs were tested on different data: their figures cannot be compared."] = None
    for compared in runs[1:]:
        if compared.same_as(runs[0]):
            why = f" {own_models(compared.run.fine_tuning)}" if compared.run.fine_tuning else ""
            notes[f"{compared.label}: every prediction is equal to the first run's, so no figure differs.{why}"] = None
    return join(
        el("a", "Skip to the results", href="#main", class_="skip"),
        el(
            "header",
            el("h1", f"Comparison of {len(runs)} runs"),
            el("p", f"Each against the first, {runs[0].label}. Differences in points of percent; *: more than chance."),
            el("ol", *entries, class_="runs"),
            *(el("p", note, class_="note", role="note") for note in notes if note),
        ),
    )


# Figures


def against_first(runs: list[Compared], i: int, value: float | None, first: float | None, *name: str) -> Estimate:
    """The difference of a figure to the first run's, with its interval where both have predictions of the same clips;
    nothing where they were tested on different data."""
    if runs[i].run.tested_on != runs[0].run.tested_on:
        return Estimate(None)
    if runs[i].figures and runs[0].figures:
        drawn = runs[i].figures.minus(runs[0].figures, *name)
        if value is not None and first is not None:
            return drawn._replace(value=value - first)  # exact, where rounding may have moved a clip
        return drawn
    return Estimate(None if value is None or first is None else value - first)


def headline(runs: list[Compared]) -> Html:
    rows = []
    for i, compared in enumerate(runs):
        results = compared.run.results
        macro, base = (one.run.results["macro_avg_acc"] for one in (compared, runs[0]))
        row: list[object] = [compared.label, cell(percent(macro), class_="strong")]
        row.append(interval(compared.figures("macro_avg_acc")) if compared.figures else "-")
        row += _difference_cells(against_first(runs, i, macro, base, "macro_avg_acc"), i)
        loss, first = results["loss"], runs[0].run.results["loss"]
        row.append("-" if loss is None else f"{loss:.4f}")
        less = against_first(runs, i, loss, first, "loss")
        row.append("-" if less.value is None or not i else f"{less.value:+.4f}{' *' if less.clear else ''}")
        row.append(percent(compared.figures("calibration_error").value) if compared.figures else "-")
        rows.append(row)
    header = ["Run", "Macro-average accuracy", "95 % interval", "Difference", "95 % interval", "Log loss", "Difference"]
    shown = table("runs", "Accuracies in percent", [*header, "Calibration error"], rows)
    if not runs[0].figures:
        return shown
    together = el("p", "The interval of a difference draws the same locations for both runs.", class_="hint")
    there = len(runs[0].figures.locations) >= FEWEST
    return join(shown, how_intervals(runs[0].figures), together if there else "")


def _difference_cells(estimate: Estimate, i: int) -> list[object]:
    if not i:
        return ["-", "-"]
    mark = " *" if estimate.clear else ""
    return [cell(f"{difference(estimate.value)}{mark}", sort=estimate.value), interval(estimate)]


def seeds(runs: list[Compared]) -> Html:
    groups = grouped([compared.run for compared in runs])
    if all(len(group.runs) == 1 for group in groups):
        return Html("")
    places = ["macro_avg_acc", *(f"device_group_acc/{group}" for group in DEVICE_GROUPS)]
    rows, first = [], groups[0]
    for group in groups:
        found = [_spread(group.mean(place), group.deviation(place), percent) for place in places]
        loss = _spread(group.mean("loss"), group.deviation("loss"), lambda value: f"{value:.4f}")
        mean, base = group.mean("macro_avg_acc"), first.mean("macro_avg_acc")
        other = group is not first and group.tested_on == first.tested_on and None not in (mean, base)
        given = ", ".join("?" if run.seed is None else str(run.seed) for run in group.runs)
        label = f"{group.name} ({', '.join(group.ids)})"
        rows.append([label, given, *found, loss, difference(mean - base) if other else "-"])
    groups_of = [f"{title(group)} ({members(group)})" for group in DEVICE_GROUPS]
    header = ["Configuration", "Seeds", "Macro-average accuracy", *groups_of]
    caption = (
        "Runs whose configuration is the same but for the seed (of stage 2 also for the general model): mean ± "
        "standard deviation over seeds, in percent; Difference: of the means, to the first"
    )
    return table("seed-table", caption, [*header, "Log loss", "Difference"], rows)


def _spread(mean, deviation, text) -> str:
    if mean is None:
        return "-"
    return text(mean) + ("" if deviation is None else f" ± {text(deviation)}")


def by_device(runs: list[Compared]) -> Html:
    groups = _side_by_side(
        runs, "group-table", "Accuracy per group of devices, in percent", "Group", "device_group_acc", "group",
        {group: f"{title(group)} ({members(group)})" for group in _heard(runs, "groups", DEVICE_GROUPS)},
    )  # fmt: skip
    names = {device: device.upper() for device in _heard(runs, "devices", DEVICES)}
    caption = "Accuracy per device, in percent"
    return join(groups, _side_by_side(runs, "device-table", caption, "Device", "device_acc", "device", names))


def _heard(runs: list[Compared], what: Literal["devices", "groups"], names: Iterable[str]) -> list[str]:
    """Those that a run has clips of, in their order."""
    there = {name for compared in runs for name in getattr(compared.run, what)}
    return [name for name in names if name in there]


def by_scene(runs: list[Compared]) -> Html:
    names = {scene: title(scene) for scene in SCENES}
    return _side_by_side(runs, "scene-table", "Accuracy per scene, in percent", "Scene", "scene_acc", "scene", names)


def _side_by_side(
    runs: list[Compared], name: str, caption: str, first: str, key: str, figure: str, rows: dict[str, str]
) -> Html:
    """A row per scene or device; of each run its accuracy, and of all but the first the difference."""
    header: list[object] = [first]
    for i, compared in enumerate(runs):
        header += [compared.label, *(["Difference", "95 % interval"] if i else [])]
    shown = []
    for row, text in rows.items():
        cells: list[object] = [text]
        base = runs[0].run.results[key][row]
        for i, compared in enumerate(runs):
            value = compared.run.results[key][row]
            cells.append(cell(percent(value), class_="strong"))
            if i:
                cells += _difference_cells(against_first(runs, i, value, base, figure, row), i)
        shown.append(cells)
    return table(name, caption, header, shown, data_sortable=True)


# What has changed


def changes(runs: list[Compared], lost: dict[str, Html]) -> Html:
    """Of each run but the first: which clips it has won and lost, and how its confusions differ."""
    panels, tabs = [], []
    for compared in runs[1:]:
        name = f"run-{compared.run.id}"
        tabs.append(el("li", link(name, compared.label)))
        if compared.run.tested_on != runs[0].run.tested_on:
            parts = [el("p", f"It was tested on other data than {runs[0].run.id}.")]
        elif compared.same_as(runs[0]):
            parts = [el("p", f"Nothing: every prediction is equal to that of {runs[0].run.id}.")]
        else:
            parts = [_won_and_lost(runs[0], compared), _confusions(runs[0], compared)]
            parts.append(lost.get(compared.run.id, Html("")))
        panels.append(section(name, compared.label, *parts, level=3, class_="panel"))
    return join(el("nav", el("ul", *tabs), class_="tabs", aria_label="Runs"), *panels)


def _won_and_lost(first: Compared, other: Compared) -> Html:
    if first.predictions is None or other.predictions is None:
        return Html("")
    before, after = first.predictions.correct, other.predictions.correct
    rows = []
    for i, device in enumerate([None, *DEVICES]):
        these = np.ones(len(before), bool) if device is None else first.predictions.device == i - 1
        if not these.any():
            continue
        counts = [(before & after), (before & ~after), (~before & after), (~before & ~after)]
        text = [f"{int((count & these).sum()):,}" for count in counts]
        rows.append(["All" if device is None else device.upper(), *text, f"{int(these.sum()):,}"])
    header = ["Device", "Both right", "Lost: right before", "Won: right now", "Both wrong", "Clips"]
    caption = f"Clips that {first.run.id} and {other.run.id} get right"
    return table(f"won-{other.run.id}", caption, header, rows)


def _confusions(first: Compared, other: Compared) -> Html:
    """Difference of the confusions' shares, over all clips and per group of devices."""
    name = other.run.id
    before, after = (np.array(compared.run.results["confusion"]) for compared in (first, other))
    shown = [_difference_matrix(f"{name}-all", "all devices", before, after)]
    if first.predictions is not None and other.predictions is not None:
        for group, devices in DEVICE_GROUPS.items():
            rows = [DEVICES.index(device) for device in devices]
            before, after = (c.predictions.confusion[rows].sum(0) for c in (first, other))
            if before.sum():
                drawn = _difference_matrix(f"{name}-{group}", f"{group} devices ({members(group)})", before, after)
                shown.append(el("details", el("summary", f"{title(group)} devices ({members(group)})"), drawn))
    return join(*shown)


def _difference_matrix(name: str, where: str, before: np.ndarray, after: np.ndarray) -> Html:
    shares = [100 * c / np.maximum(c.sum(1, keepdims=True), 1) for c in (before, after)]
    more, clips = shares[1] - shares[0], after - before
    text = (
        f"Change of the confusion on {where}: rows are the true scene, columns what is predicted; a cell is the change "
        f"of the row's share in points, and below it that in clips; the deepest colour: {DEEPEST} points and more"
    )

    def cell_of(i: int, j: int) -> tuple[str, str, float]:
        if not clips[i, j]:
            return "0", "0", 0.0
        return f"{more[i, j]:+.1f}", f"{clips[i, j]:+,}", 100 * min(1, abs(more[i, j]) / DEEPEST)

    return matrix_table(name, text, [f"{n:,}" for n in after.sum(1)], cell_of, lambda i, j: not clips[i, j])


def _lost_clips(runs: list[Compared], data: Path | None, with_audio: bool) -> dict[str, Html]:
    """Of each run but the first, the clips it has lost with the highest confidence, at most one of a location."""
    first = runs[0].predictions
    if first is None:
        return {}
    given = {name: runs[0].run.config[name] for name in ("data", "logmel") if name in runs[0].run.config}
    config = from_plain(EvalConfig, given)
    folder = data or data_folder(config.data, runs[0].run.results["data"])
    shown = {}
    for compared in runs[1:]:
        p = compared.predictions
        if p is None:
            continue
        rows = np.flatnonzero(first.correct & ~p.correct)
        by_place: dict[str, int] = {}
        for row in rows[np.argsort(-p.confidence[rows], kind="stable")].tolist():
            by_place.setdefault(p.location[row], row)
        chosen = list(by_place.values())[:LOST]
        if chosen:
            gallery = Gallery(p, chosen, folder, config.data, config.logmel, with_audio, with_spectra=False)
            heading = el("h4", "Lost with the highest confidence")
            shown[compared.run.id] = join(heading, gallery.note(), gallery.cards(chosen))
    return shown


# The rest


def calibration(runs: list[Compared]) -> Html:
    known = [compared for compared in runs if compared.predictions is not None]
    if not known:
        return Html("")
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes = [svg.Axis(label, 0, 1, ticks, lambda v: f"{100 * v:.0f}") for label in ("confidence (%)", "accuracy (%)")]
    series, rows = [], []
    for compared in known:
        bins = [b for b in reliability(compared.predictions) if b.n_clips]
        series.append(svg.Series(compared.label, [b.confidence for b in bins], [b.acc for b in bins]))
        error, sure, acc = (compared.figures(name) for name in ("calibration_error", "confidence", "acc"))
        rows.append([compared.label, percent(error.value), interval(error), percent(sure.value), percent(acc.value)])
    (x0, y0), (x1, y1) = (svg.place(*axes, at, at) for at in (0, 1))
    ideal = el("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_="ideal")
    header = ["Run", "Calibration error", "95 % interval", "Mean confidence", "Accuracy"]
    shown = table("calibration-table", "Calibration, in percent", header, rows)
    caption = "Reliability: on the broken line a model is as often right as it is sure; below it, it is too sure"
    return join(shown, svg.lines("reliability-chart", caption, *axes, series, ideal))


def complexity(runs: list[Compared]) -> Html:
    measured = [compared.run.results.get("complexity") for compared in runs]
    if not all(measured):
        return Html("")
    rows = []
    for text, key, unit, limit in (
        ("Parameters", "params", "", None),
        ("MACs", "macs", "", "max_macs"),
        ("Memory (as stored)", "total_param_bytes", " B", "max_param_bytes"),
    ):
        cells = [text]
        for one in measured:
            verdict = "" if limit is None else " ✓ within" if one[key] <= one[limit] else " ✗ over"
            cells.append(f"{one[key]:,}{unit}{verdict}")
        rows.append([*cells, "-" if limit is None else f"{measured[0][limit]:,}{unit}"])
    header = ["Metric", *(compared.label for compared in runs), "Limit"]
    return table("complexity-table", "One forward pass of one clip", header, rows)


def configuration(runs: list[Compared]) -> Html:
    """The flags that the runs do not share."""
    plain = [setup.flags(compared.run.training.config) for compared in runs]
    names = dict.fromkeys((part, flag) for config in plain for part, values in config.items() for flag in values)
    rows = []
    for part, flag in names:
        values = [setup.text(config.get(part, {}).get(flag)) or "none" for config in plain]
        if len(set(values)) > 1:
            rows.append([f"--{flag}", *values])
    if not rows:
        return el("p", "Every flag is the same.")
    header = ["Flag", *(compared.label for compared in runs)]
    return table("differing", "Flags that differ", header, rows)


def environment(runs: list[Compared]) -> Html:
    facts = []
    for compared in runs:
        made, tested = compared.run.made, compared.run.results.get("tested_on") or {}
        found = {f"Tested: {name.replace('_', ' ')}": value for name, value in tested.items()}
        found |= made.get("versions") or {}
        found["Commit"], found["Seed"] = made.get("commit") or "not known", compared.run.seed
        facts.append(found)
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [[name, *(setup.text(found.get(name)) or "-" for found in facts)] for name in names]
    header = ["What", *(compared.label for compared in runs)]
    return table("environment-table", "Where and with what they ran", header, rows)
