"""The page of one run, made from the run's folder and, for pictures and sound, its data folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcase.report import render, setup, svg
from dcase.report.baseline import BASELINE, BASELINE_NOTE, CHECKER_NOTE
from dcase.report.bootstrap import Bin, Estimate, Figures, reliability
from dcase.report.gallery import Card, Gallery, source_of
from dcase.report.learning import best_accuracy, learning_curves
from dcase.report.mistakes import Blame, Mixed, blame, mixed_up, most_confident
from dcase.report.run_files import Finished
from dcase.report.tables import complexity_rows, fine_tuning_rows, own_models
from dcase.report.words import group, loss, percent, with_unit

INDEX_HTML = "index.html"
MISTAKES, MISTAKES_OF_DEVICE = 12, 4  # shown: in all, and of each device
MIXED_UP = 6  # rows of a panel's most frequent confusions


class Headline(NamedTuple):
    """A figure, as it is written in the tiles and in the table of all figures."""

    name: str
    text: str
    with_unit: str
    interval: Estimate | None
    write: object  # how the interval's ends are written
    is_tile: bool


class Panel(NamedTuple):
    """What goes wrong on a device, on a group of devices, or on all."""

    name: str
    device: bool
    clips: np.ndarray  # (scenes, scenes): true by predicted
    confusion: np.ndarray  # the same, from results.json where that has it
    has_others: bool
    mixed: list[Mixed]
    blame: Blame | None
    spectrum: svg.Chart | None
    cards: list[Card]


def write_page(run: Finished, folder: Path | None = None, with_audio: bool = True) -> Path:
    """Write <run>/report/index.html. ``folder``: of the data; None: the one in the run's configuration.

    Raises `UserError` where the file cannot be written.
    """
    p, results = run.predictions, run.results
    figures = gallery = None
    panels, bins, cards = [], [], []
    if p is not None:
        figures, bins = Figures(p), reliability(p)
        rows = most_confident(p, MISTAKES)
        by_device = [most_confident(p, MISTAKES_OF_DEVICE, device) for device in range(len(p.labels.devices))]
        gallery = Gallery(p, [*rows, *(row for rows in by_device for row in rows)], source_of(run, folder), with_audio)
        gallery.measure_spectra()
        panels = _panels(run, gallery, by_device)
        cards = [gallery.card(row) for row in rows]
    values = {
        "headlines": _headlines(run, figures),
        "weakest_device": _weakest(results["device_acc"]),
        "weakest_scene": _weakest(results["scene_acc"]),
        "published": BASELINE if run.comparable else (),
        "BASELINE_NOTE": BASELINE_NOTE,
        "CHECKER_NOTE": CHECKER_NOTE,
        "reliability": _reliability_chart(bins) if bins else None,
        "curves": learning_curves(run),
        "best_accuracy": best_accuracy(run),
        "own_models": own_models(run.fine_tuning) if run.fine_tuning else "",
        "fine_tuning": fine_tuning_rows({device.upper(): outcome for device, outcome in run.fine_tuning.items()}),
        "configured": [run, run.trained_by] if run.trained_by else [run],
        "flags": setup.flags,
        "facts": setup.facts,
        "shares": shares,
    }
    values["measured"] = measured = results.get("complexity")
    if measured:
        values["complexity"] = complexity_rows(measured, run.name, run.comparable, results["macro_avg_acc"])
    names = {"run": run, "results": results, "figures": figures, "gallery": gallery, "panels": panels, "bins": bins}
    path = run.folder / "report" / INDEX_HTML
    return render.write("page.html", path, run.labels, **names, cards=cards, **values)


def _headlines(run: Finished, figures: Figures | None) -> list[Headline]:
    results = run.results
    found = [("Macro-average accuracy (mean over scenes)", results["macro_avg_acc"], ("macro_avg_acc",), True)]
    found.append(("Accuracy over all clips", results["acc"], ("acc",), False))
    if "device_avg_acc" in results:
        found.append(("Mean over devices", results["device_avg_acc"], ("device_avg_acc",), False))
    found += [(group(g, run.labels, "devices"), results["device_group_acc"][g], ("group", g), True) for g in run.groups]
    found.append(("Log loss", results["loss"], ("loss",), True))
    if figures:
        for name, key, tile in (("Calibration error", "calibration_error", True), ("Mean confidence", "confidence", 0)):
            found.append((name, figures(key).value, (key,), tile))
    lines = []
    for name, value, key, is_tile in found:
        write, unit = (loss, loss) if key == ("loss",) else (percent, with_unit)
        lines.append(Headline(name, write(value), unit(value), figures(*key) if figures else None, write, is_tile))
    return lines


def _weakest(accuracy: dict[str, float | None]) -> str | None:
    """Return the name with the lowest accuracy; None where all are equal."""
    known = {name: value for name, value in accuracy.items() if value is not None}
    return min(known, key=known.get) if len(set(known.values())) > 1 else None


def _panels(run: Finished, gallery: Gallery, mistakes: list[list[int]]) -> list[Panel]:
    """Return a panel for all clips, for each group and for each device that has clips."""
    p, counts = run.predictions, run.predictions.confusion
    devices = p.labels.devices
    chosen = {"all": devices, **p.labels.device_groups, **{device: (device,) for device in devices}}
    panels = []
    for name, members in chosen.items():
        rows = [devices.index(device) for device in members]
        clips, others = counts[rows].sum(0), np.delete(counts, rows, axis=0).sum(0)
        if not clips.sum():
            continue
        others = others if others.sum() else None
        # Of all clips, results.json has the exact counts, where a logit's rounding may have moved a clip.
        confusion = np.array(run.results["confusion"]) if name == "all" else clips
        mixed = mixed_up(clips, others, MIXED_UP, p.labels.scenes)
        device = rows[0] if name in devices else None
        of_device = (None, None, [])
        if device is not None:
            cards = [gallery.card(row) for row in mistakes[device]]
            of_device = blame(p, gallery.others, device), gallery.spectrum(device), cards
        panels.append(Panel(name, device is not None, clips, confusion, others is not None, mixed, *of_device))
    return panels


def shares(confusion: Sequence[Sequence[int]]) -> tuple[list, list, list, list]:
    """Return what `matrix` of macros.html shows of clips by true and predicted scene, and how deep its colours are."""
    totals = [sum(row) for row in confusion]
    depth = [[100 * n / (total or 1) for n in row] for row, total in zip(confusion, totals, strict=True)]
    large = [[f"{x:.1f}" if total else "-" for x in row] for row, total in zip(depth, totals, strict=True)]
    return totals, large, [[f"{n:,}" for n in row] for row in confusion], depth


def _reliability_chart(bins: list[Bin]) -> svg.Chart:
    most = max(b.n_clips for b in bins)
    bars = []
    for b in (b for b in bins if b.n_clips):
        text = f"{percent(b.acc)} % right at {percent(b.confidence)} %, {b.n_clips:,} clips"
        bars.append(svg.Bar(b.low, b.high, b.acc, text, 0.35 + 0.65 * b.n_clips / most))
    title = (
        "Reliability: a bar that ends at the dashed line is right as often as the model is confident; one that ends "
        "below the line shows overconfidence. The deeper the colour, the more clips."
    )
    x, y = svg.shares("confidence (%)"), svg.shares("accuracy (%)")
    return svg.Chart("reliability-chart", title, x, y, bars=bars, rule=("ideal", (0, 0), (1, 1)))
