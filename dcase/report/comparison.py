"""The page of several runs side by side, each compared with the first: differences with intervals, spread over seeds.

Runs that were tested on the same clips are drawn together (see `bootstrap`): the interval of a difference is much
narrower than those of its two figures, as a hard location is hard for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcase.errors import UserError
from dcase.report import render, setup, svg
from dcase.report.bootstrap import Estimate, Figures, reliability
from dcase.report.gallery import Card, Gallery, source_of
from dcase.report.groups import grouped
from dcase.report.learning import overlaid
from dcase.report.mistakes import surest
from dcase.report.page import INDEX_HTML
from dcase.report.predictions import Predictions
from dcase.report.run_files import PARTS, Finished
from dcase.report.tables import own_models

LOST = 4  # clips shown for each run: right in the first, wrong in it
DEEPEST = 25  # points of change
MOST_IN_NAME = 8  # ids in the file's name
NAMES = dict(zip(PARTS, ("scene", "device", "group"), strict=True))  # in `Figures`


@dataclass(frozen=True, eq=False)
class Compared:
    """A run, and its predictions in the order that all runs share."""

    run: Finished
    predictions: Predictions | None  # None: missing, or of other clips than the first run's
    figures: Figures | None

    @property
    def label(self) -> str:
        kind = f"{self.run.kind}, " if self.run.kind else ""
        seed = "" if self.run.seed is None else f", seed {self.run.seed}"
        return f"{self.run.name} ({kind}{self.run.id}{seed})"

    @property
    def own_models(self) -> str:
        return own_models(self.run.fine_tuning) if self.run.fine_tuning else ""

    def same_as(self, other: "Compared") -> bool:
        """Return whether every clip has the same prediction, to the last digit that is written."""
        if self.predictions is None or other.predictions is None:
            return False
        return np.array_equal(self.predictions.logits, other.predictions.logits)

    def minus(self, first: "Compared", place: str) -> Estimate:
        """Return the difference in a figure (see `Finished.figure`), with its interval where both runs have predictions
        of the same clips; None where they were tested on different data."""
        value, base = self.run.figure(place), first.run.figure(place)
        if self.run.tested_on != first.run.tested_on or value is None or base is None:
            return Estimate(None)
        if not self.figures or not first.figures:
            return Estimate(value - base)
        part, _, name = place.partition("/")
        drawn = self.figures.minus(first.figures, *((NAMES[part], name) if name else (part,)))
        return drawn._replace(value=value - base)  # exact, where the rounding of a logit may have moved a clip


class Change(NamedTuple):
    """Clips that a run has won and lost against the first, by device, and by true and predicted scene."""

    other: Compared
    won: list[tuple[str, list[int]]]  # device, [right in both, lost, won, wrong in both, all]
    confusions: list[tuple[str, np.ndarray, np.ndarray]]  # "all" or a group, the first's clips, the other's clips
    gallery: Gallery | None
    lost: list[Card]


def write_comparison(runs: Sequence[Finished], folder: Path, data: Path | None = None, with_audio: bool = True) -> Path:
    """Write <folder>/ID_ID.html; the other runs are compared with the first. ``data``: folder of the recordings; None:
    the one in the first run's configuration.

    Raises `UserError` where the file cannot be written.
    """
    compared = compare(runs)
    first = compared[0]
    ids = [run.id for run in runs]
    more = f"_and_{len(ids) - MOST_IN_NAME}_more" if len(ids) > MOST_IN_NAME else ""
    path = folder / f"{'_'.join(ids[:MOST_IN_NAME])}{more}.html"
    known = [one for one in compared if one.predictions is not None]
    values = {
        "linked": [one.run.id for one in compared if _has_page_beside(one.run, path)],
        "notes": list(dict.fromkeys(run.results["note"] for run in runs if run.results["note"])),
        "groups": grouped(runs),
        "devices": _any_has(runs, "devices", PARTS[1]),
        "device_groups": _any_has(runs, "groups", PARTS[2]),
        "changes": [_change(first, other, data, with_audio) for other in compared[1:]],
        "known": known,
        "reliability": _reliability_chart(known) if known else None,
        "curves": overlaid([(one.label, one.run) for one in compared]),
        "measured": [run.results.get("complexity") for run in runs],
        "differing": setup.differing(runs),
        "facts": setup.facts(runs),
        "changes_of": changes_of,
        "DEEPEST": DEEPEST,
    }
    names = {"ids": ids, "runs": compared, "first": first, "figures": first.figures}
    return render.write("comparison.html", path, first.run.labels, **names, **values)


def compare(runs: Sequence[Finished]) -> list[Compared]:
    """Return the runs, with figures where they were tested on the same clips as the first that has predictions."""
    first: Predictions | None = None
    compared = []
    for run in runs:
        p = run.predictions
        p = None if p is None else p.select(np.argsort(p.filenames, kind="stable"))
        if run.labels.scenes != runs[0].labels.scenes:
            raise UserError(
                f"runs {runs[0].id} and {run.id} were trained on other scenes: compare runs of the same data"
            )
        if first is None:
            first = p
        same = first is not None and p is not None and np.array_equal(p.filenames, first.filenames)
        compared.append(Compared(run, p, Figures(p)) if same else Compared(run, None, None))
    return compared


def _has_page_beside(run: Finished, path: Path) -> bool:
    there = (run.folder / "report" / INDEX_HTML).is_file()
    return there and run.folder.parent.resolve() == path.parent.parent.resolve()


def _any_has(runs: Sequence[Finished], what: str, part: str) -> list[str]:
    """Return the devices or groups that a run has clips of."""
    names = dict.fromkeys(name for run in runs for name in run.results[part])
    return [name for name in names if any(name in getattr(run, what) for run in runs)]


def _change(first: Compared, other: Compared, data: Path | None, with_audio: bool) -> Change:
    confusions = [("all", *(np.array(one.run.results["confusion"]) for one in (first, other)))]
    p, q = first.predictions, other.predictions
    if p is None or q is None:
        return Change(other, [], confusions, None, [])
    won = []
    for i, device in enumerate(("all", *p.labels.devices)):
        these = (p.device == i - 1) | (device == "all")
        counts = [p.correct & q.correct, p.correct & ~q.correct, ~p.correct & q.correct, ~p.correct & ~q.correct, these]
        if these.any():
            won.append((device, [int((count & these).sum()) for count in counts]))
    for group, devices in p.labels.device_groups.items():
        rows = [p.labels.devices.index(device) for device in devices]
        before, after = (predictions.confusion[rows].sum(0) for predictions in (p, q))
        if before.sum():
            confusions.append((group, before, after))
    rows = surest(q, p.correct & ~q.correct, LOST)
    gallery = Gallery(q, rows, source_of(first.run, data), with_audio) if rows else None
    return Change(other, won, confusions, gallery, [gallery.card(row) for row in rows])


def changes_of(before: np.ndarray, after: np.ndarray) -> tuple[list, list, list, list]:
    """Return what `matrix` of macros.html shows of the change in clips by true and predicted scene: of the clips' share
    of their scene, and of the clips."""
    share = [100 * clips / np.maximum(clips.sum(1, keepdims=True), 1) for clips in (before, after)]
    more, clips = share[1] - share[0], after - before
    large = [[f"{x:+.1f}" if n else "0" for x, n in zip(*row, strict=True)] for row in zip(more, clips, strict=True)]
    small = [[f"{n:+,}" if n else "0" for n in row] for row in clips]
    return after.sum(1).tolist(), large, small, 100 * np.minimum(1, np.abs(more) / DEEPEST) * (clips != 0)


def _reliability_chart(runs: list[Compared]) -> svg.Chart:
    series = []
    for one in runs:
        bins = [b for b in reliability(one.predictions) if b.n_clips]
        series.append(svg.Series(one.label, [b.confidence for b in bins], [b.acc for b in bins]))
    title = "Reliability: on the dashed line a model is right as often as it is confident; below it is overconfident"
    x, y = svg.shares("confidence (%)"), svg.shares("accuracy (%)")
    return svg.Chart("reliability-chart", title, x, y, series, rule=("ideal", (0, 0), (1, 1)))
