"""What the user sees at the end of a test: tables as aligned Markdown, and two charts as PNG.

Everything starts from a ``results`` dict, the content of ``results.json`` (see `dcase.metrics`): ``macro_avg_acc``,
``acc``, ``loss``, ``scene_acc``, ``device_acc``, ``device_group_acc``, ``n_clips`` and ``confusion`` (rows: true scene,
columns: predicted scene, in clips). Accuracies are fractions of 1, and None where there was no clip: tables and charts
show that as "-", never as 0. They print percent.

The DCASE baseline's published rows stand beside ours only where the caller says that the data are TAU22.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dcase.files import replace_file
from dcase.tau22 import DEVICE_GROUPS, DEVICES, SCENES

CONFUSION_PNG, DEVICES_PNG, REPORT_MD = "confusion.png", "devices.png", "report.md"


class PublishedRow(NamedTuple):
    """Accuracies in percent, as printed."""

    name: str
    scene_acc: tuple[float, ...]
    device_acc: tuple[float, ...]
    macro_avg_acc: float
    deviation: float  # of macro_avg_acc, over the runs


BASELINE = (
    PublishedRow(
        "Baseline, general",
        (38.94, 62.28, 40.60, 50.72, 72.03, 29.20, 56.04, 34.76, 73.21, 49.42),
        (62.80, 52.87, 54.23, 48.52, 47.29, 52.86, 48.14, 47.23, 42.60),
        50.72,
        0.47,
    ),
    PublishedRow(
        "Baseline, device-specific",
        (44.43, 64.81, 43.87, 48.22, 72.75, 32.04, 53.14, 34.43, 74.10, 51.08),
        (63.98, 55.85, 59.09, 48.68, 48.74, 52.72, 48.14, 47.23, 42.60),
        51.89,
        0.05,
    ),
)
BASELINE_NOTE = (
    "Baseline: DCASE2025 Task 1's CP-Mobile, as published (github.com/CPJKU/dcase2025_task1_baseline): "
    "mean of 4 runs on TAU22's development-test split, trained on the 25 % split."
)
BASELINE_PARAMS, BASELINE_MACS, BASELINE_BYTES = 61_148, 29_419_156, 122_296  # its parameters in 16 bit
BASELINE_BYTES_IN_BITS = {16: 127_712, 8: 71_980}  # by our count, BatchNorm's statistics and scales too
CHECKER_NOTE = (
    "MACs count every multiplication, the scan's too. The challenge's checker (torchinfo) counts a Linear layer once "
    "instead of once per token, and misses whatever is not a module; for CP-Mobile, all convolutions, both agree."
)


# Tables


def class_table(results: dict, name: str, beside_baseline: bool) -> str:
    """Markdown table of the accuracy per scene and their mean, in percent; ``name`` labels the row."""
    header = ["Model", *(_title(scene) for scene in SCENES), "Macro Avg. Accuracy"]
    ours = [name, *(_percent(results["scene_acc"][scene]) for scene in SCENES), _percent(results["macro_avg_acc"])]
    theirs = [[row.name, *map(_points, row.scene_acc), _macro(row)] for row in BASELINE if beside_baseline]
    return markdown(header, [*theirs, ours])


def fine_tuning_table(outcomes: dict[str, dict]) -> str:
    """Markdown table of what stage 2 came to: macro-average accuracy on each device's validation clips, in percent.

    ``outcomes``: device_id -> {"n_train", "n_val", "general", "fine_tuned", "kept", "reason"}.
    """
    header = ["Device", "Training Clips", "Validation Clips", "General", "Fine-Tuned", "Own Model Kept"]
    rows = []
    for device_id, outcome in outcomes.items():
        kept = f"{'yes' if outcome['kept'] else 'no'}: {outcome['reason']}"
        clips = [f"{outcome[name]:,}" for name in ("n_train", "n_val")]
        accuracies = [_percent(outcome[name]) for name in ("general", "fine_tuned")]
        rows.append([device_id, *clips, *accuracies, kept])
    return markdown(header, rows)


def device_table(results: dict, name: str, beside_baseline: bool) -> str:
    """Two Markdown tables, in percent: the accuracy per device, and per group of devices.

    "Macro Avg. Accuracy" is the mean over scenes here too, as in the class-wise table.
    """
    header = ["Model", *(device.upper() for device in DEVICES), "Macro Avg. Accuracy"]
    ours = [name, *(_percent(results["device_acc"][device]) for device in DEVICES), _percent(results["macro_avg_acc"])]
    theirs = [[row.name, *map(_points, row.device_acc), _macro(row)] for row in BASELINE if beside_baseline]
    return f"{markdown(header, [*theirs, ours])}\n\n{_group_table(results, name, beside_baseline)}"


def _group_table(results: dict, name: str, beside_baseline: bool) -> str:
    header = ["Model", *(f"{_title(group)} ({_members(group)})" for group in DEVICE_GROUPS)]
    ours = [name, *(_percent(results["device_group_acc"][group]) for group in DEVICE_GROUPS)]
    theirs = [[row.name, *map(_points, _group_means(row))] for row in BASELINE if beside_baseline]
    return markdown(header, [*theirs, ours])


def _group_means(row: PublishedRow) -> list[float]:
    """The published table has no groups: the mean over a group's devices, whose clips are equally many within 1 %."""
    accuracy = dict(zip(DEVICES, row.device_acc, strict=True))
    return [sum(accuracy[device] for device in group) / len(group) for group in DEVICE_GROUPS.values()]


def complexity_comparison(
    complexity: dict, name: str, beside_baseline: bool, macro_avg_acc: float | None = None
) -> str:
    """Markdown table of the model's complexity against the challenge's limits.

    ``complexity`` is plain: ``params``, ``total_param_bytes``, ``macs``, ``torchinfo_macs``, ``max_param_bytes`` and
    ``max_macs``. ``beside_baseline`` adds CP-Mobile's figures, the difference to them, and ``macro_avg_acc`` (a
    fraction of 1) against the baseline's.
    """
    params, macs, checker = complexity["params"], complexity["macs"], complexity["torchinfo_macs"]
    max_bytes, max_macs = complexity["max_param_bytes"], complexity["max_macs"]
    lines = [  # metric, ours, unit, limit, the baseline's
        ("Parameters", params, "", None, BASELINE_PARAMS),
        ("MACs", macs, "", max_macs, BASELINE_MACS),
        ("MACs as the challenge's checker counts", checker, "", max_macs, BASELINE_MACS),
        ("Memory (as stored)", complexity["total_param_bytes"], " B", max_bytes, BASELINE_BYTES),
        ("Memory (16-bit)", complexity["bytes_in_16_bit"], " B", max_bytes, BASELINE_BYTES_IN_BITS[16]),
        ("Memory (8-bit)", complexity["bytes_in_8_bit"], " B", max_bytes, BASELINE_BYTES_IN_BITS[8]),
    ]
    header = ["Metric", name, "Limit", "Of the Limit"]
    rows = [[metric, f"{ours:,}{unit}", *_against_limit(ours, unit, limit)] for metric, ours, unit, limit, _ in lines]
    if beside_baseline:
        header += ["CP-Mobile Baseline", "Difference"]
        for row, (_, ours, unit, _, baseline) in zip(rows, lines, strict=True):
            row += [f"{baseline:,}{unit}", f"{100 * (ours / baseline - 1):+,.1f} %"]
        rows = [*_accuracy_rows(macro_avg_acc), *rows]
    return markdown(header, rows)


def _against_limit(value: int, unit: str, limit: int | None) -> list[str]:
    if limit is None:
        return ["-", "-"]
    return [f"{limit:,}{unit}", f"{value / limit:,.3g} x, {'over' if value > limit else 'within'}"]


def _accuracy_rows(macro_avg_acc: float | None) -> list[list[str]]:
    ours = _percent(macro_avg_acc)
    return [
        [
            f"Macro Avg. Accuracy ({row.name})",
            ours,
            "-",
            "-",
            _macro(row),
            "-" if macro_avg_acc is None else f"{100 * macro_avg_acc - row.macro_avg_acc:+.2f}",
        ]
        for row in BASELINE
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up on a terminal: the first to the left, the others to the right."""
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        aligned = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else _points(100 * fraction)


def _with_unit(fraction: float | None) -> str:
    return "-" if fraction is None else f"{_percent(fraction)} %"


def _points(percent: float) -> str:
    return f"{percent:.2f}"


def _macro(row: PublishedRow) -> str:
    return f"{row.macro_avg_acc:.2f} ± {row.deviation:.2f}"


def _title(name: str) -> str:
    """metro_station -> Metro Station."""
    return name.replace("_", " ").title()


def _members(group: str) -> str:
    return ", ".join(device.upper() for device in DEVICE_GROUPS[group])


# Charts

INK, FAINT = "#262626", "#6b6b6b"
# From Okabe and Ito's palette, told apart with every common colour-vision deficiency (jfly.uni-koeln.de/color).
GROUP_COLOURS = {"real": "#0072B2", "seen": "#E69F00", "unseen": "#CC79A7"}
GROUP_LABELS = {"real": "real", "seen": "simulated, seen", "unseen": "simulated, unseen"}
DPI = 200


def confusion_png(results: dict, path: Path, title: str, note: str | None = None) -> None:
    """Draw the confusion matrix: of each true scene's clips, the percentage given each scene. ``note``: a subtitle."""
    counts = np.asarray(results["confusion"], dtype=float)
    totals = counts.sum(1)
    share = 100 * counts / np.where(totals, totals, np.nan)[:, None]  # NaN where a scene has no clip

    below = _below("macro-average accuracy", results["macro_avg_acc"], results, note)
    figure, axes = _figure(8.6, 8.4, title, below)
    axes.set_facecolor("#f0f0f0")  # shows where a scene has no clip
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (true, predicted), percent in np.ndenumerate(share):
        if not np.isnan(percent):
            _cell(axes, predicted, true, percent)
    for true in np.flatnonzero(totals == 0):
        axes.text(len(SCENES) / 2 - 0.5, true, "no clips", ha="center", va="center", color=FAINT, fontsize=9)

    names = [scene.replace("_", " ") for scene in SCENES]
    axes.set_xticks(range(len(SCENES)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(SCENES)), [f"{name} ({int(n):,})" for name, n in zip(names, totals, strict=True)])
    axes.set_xlabel("predicted scene")
    axes.set_ylabel("true scene (clips)")
    edges = np.arange(len(SCENES) - 1) + 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    beside = axes.inset_axes((1.025, 0, 0.03, 1))
    bar = figure.colorbar(image, cax=beside, ticks=range(0, 101, 20), format="%d %%")
    bar.outline.set_visible(False)
    beside.tick_params(length=0, labelsize=9, labelcolor=INK)
    _save(figure, path)


def _cell(axes: Axes, x: int, y: int, percent: float) -> None:
    axes.text(
        x,
        y,
        f"{percent:.1f}",
        ha="center",
        va="center",
        fontsize=10 if x == y else 9,
        fontweight="bold" if x == y else "normal",
        color="white" if percent > 65 else INK if percent >= 1 else FAINT,
    )


def device_png(results: dict, path: Path, title: str, note: str | None = None) -> None:
    """Draw the accuracy per device, by group, with each group's own accuracy and chance. ``note``: a subtitle."""
    accuracy = results["device_acc"]
    top = min(100, max(30, 118 * max((value for value in accuracy.values() if value is not None), default=0)))
    figure, axes = _figure(8.6, 5.4, title, _below("accuracy over all devices", results["acc"], results, note))
    for group, devices in DEVICE_GROUPS.items():
        _group(axes, group, [DEVICES.index(device) for device in devices], results)

    chance = 100 / len(SCENES)
    axes.axhline(chance, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=3)
    axes.text(len(DEVICES) - 0.36, chance, f"chance\n{chance:.0f} %", va="center", color=INK, fontsize=9)
    values = ["no clips" if accuracy[device] is None else f"{100 * accuracy[device]:.1f}" for device in DEVICES]
    labels = [f"{device.upper()}\n{value}" for device, value in zip(DEVICES, values, strict=True)]
    axes.set_xticks(range(len(DEVICES)), labels, linespacing=1.4)
    axes.set_xlim(-0.6, len(DEVICES) - 0.4)
    axes.set_ylim(0, 1.12 * top)  # room for the groups' names
    axes.set_yticks(range(0, int(top) + 1, 10))
    axes.set_xlabel("recording device, and its accuracy (%); line: all clips of the group", labelpad=8)
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="#e0e0e0", linewidth=0.8)
    axes.set_axisbelow(True)
    _save(figure, path)


def _group(axes: Axes, group: str, places: list[int], results: dict) -> None:
    """The bars of one group of devices, its name above them, and a line at the accuracy of all its clips."""
    heights = [100 * (results["device_acc"][DEVICES[place]] or 0) for place in places]
    axes.bar(places, heights, width=0.72, color=GROUP_COLOURS[group], zorder=2)
    accuracy = results["device_group_acc"][group]
    if accuracy is not None:
        axes.hlines(100 * accuracy, places[0] - 0.44, places[-1] + 0.44, color=INK, linewidth=1.6, zorder=4)
    label = f"{GROUP_LABELS[group]}\n{'no clips' if accuracy is None else f'{100 * accuracy:.1f} %'}"
    transform = axes.get_xaxis_transform()  # x in devices, y as a fraction of the axes
    axes.text(np.mean(places), 0.99, label, transform=transform, ha="center", va="top", color=INK, fontsize=10)


def _figure(width: float, height: float, title: str, below: list[str]) -> tuple[Figure, Axes]:
    """A figure (inches) with a title in bold and lines below it, and its one pair of axes.

    pyplot's global state does not know the figure, so it is freed, and can be drawn in any thread.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    bold, plain = textwrap.wrap(title, 56), [line for text in below for line in textwrap.wrap(text, 90)]
    y, left = height - 0.18, 0.2  # inches
    for lines, style in ((bold, {"fontsize": 14, "fontweight": "bold"}), (plain, {"fontsize": 10, "color": FAINT})):
        for line in lines:  # a "$" in a name is a dollar, not the start of a formula
            figure.text(left / width, y / height, line, va="top", parse_math=False, **{"color": INK, **style})
            y -= style["fontsize"] * 1.5 / 72  # points to inches
        y -= 0.04
    figure.set_layout_engine("constrained", rect=(0, 0, 1, y / height), w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=11)
    return figure, axes


def _below(figure_of_merit: str, accuracy: float | None, results: dict, note: str | None) -> list[str]:
    """The lines under a chart's title."""
    return [f"{figure_of_merit} {_with_unit(accuracy)}  ·  {results['n_clips']:,} clips", *([note] if note else [])]


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))


# Report


def write_report(
    results: dict,
    folder: Path,
    name: str,
    note: str | None = None,
    beside_baseline: bool = False,
    complexity: dict | None = None,
) -> str:
    """Write report.md, confusion.png and devices.png into ``folder`` (made if need be); return the text to print.

    Args:
        name: of the model or run: the label of its row, and in the titles.
        note: a line under every title, e.g. that the data are synthetic.
        beside_baseline: show the DCASE baseline's published figures too; only where the data are TAU22.
        complexity: as in `complexity_comparison`; None leaves that table out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    confusion_png(results, folder / CONFUSION_PNG, f"{name}: confusion of scenes", note)
    device_png(results, folder / DEVICES_PNG, f"{name}: accuracy per device", note)
    text = _text(results, name, note, beside_baseline, complexity)
    charts = f"![Confusion of scenes]({CONFUSION_PNG})\n\n![Accuracy per device]({DEVICES_PNG})\n"
    replace_file(folder / REPORT_MD, lambda temporary: temporary.write_text(f"{text}\n\n{charts}", encoding="utf-8"))
    return f"{text}\n\nPlots: {folder / CONFUSION_PNG}, {folder / DEVICES_PNG}"


def _text(results: dict, name: str, note: str | None, beside_baseline: bool, complexity: dict | None) -> str:
    macro, acc = _with_unit(results["macro_avg_acc"]), _with_unit(results["acc"])
    loss = "-" if results["loss"] is None else f"{results['loss']:.4f}"
    parts = [f"# Results of {name}"]
    if note:
        parts.append(f"**{note}**")
    parts += [
        f"Macro-average accuracy **{macro}** (mean over scenes), overall accuracy {acc}, log loss {loss}, "
        f"{results['n_clips']:,} clips. The tables below are in percent.",
        "## Class-wise Results",
        class_table(results, name, beside_baseline),
        "## Device-wise Results",
        device_table(results, name, beside_baseline),
    ]
    if "fine_tuning" in results:
        parts += ["## Fine-Tuning per Device", fine_tuning_table(results["fine_tuning"])]
    if complexity is not None:
        title = "Comparison with the DCASE2025 Baseline and Limits" if beside_baseline else "Complexity"
        table = complexity_comparison(complexity, name, beside_baseline, results["macro_avg_acc"])
        parts += [f"## {title}", table, CHECKER_NOTE]
    if beside_baseline:
        parts.append(BASELINE_NOTE)
    return "\n\n".join(parts)
