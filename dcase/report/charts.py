"""Two charts as PNG, drawn from a ``results`` dict."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.files import replace_file
from dcase.report.words import simulated, with_unit

CONFUSION_PNG, DEVICES_PNG = "confusion.png", "devices.png"
INK, FAINT = "#262626", "#6b6b6b"
# From Okabe and Ito's palette, told apart with every common colour-vision deficiency (jfly.uni-koeln.de/color).
GROUP_COLOURS = {"real": "#0072B2", "seen": "#E69F00", "unseen": "#CC79A7"}
DPI = 200


def confusion_png(results: dict, path: Path, title: str, note: str | None = None) -> None:
    """Draw the confusion matrix, each row in percent of the true scene's clips. ``note``: a subtitle."""
    counts = np.asarray(results["confusion"], dtype=float)
    totals = counts.sum(1)
    share = 100 * counts / np.where(totals, totals, np.nan)[:, None]  # NaN where a scene has no clip
    merit = f"macro-average accuracy {with_unit(results['macro_avg_acc'])}"
    figure, axes = _figure(8.6, 8.4, title, merit, results, note)
    axes.set_facecolor("#f0f0f0")  # shows where a scene has no clip
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    centred = {"ha": "center", "va": "center"}
    for (true, predicted), percent in np.ndenumerate(share):
        colour = "white" if percent > 65 else INK if percent >= 1 else FAINT
        style = {"fontsize": 10, "fontweight": "bold"} if true == predicted else {"fontsize": 9}
        if not np.isnan(percent):
            axes.text(predicted, true, f"{percent:.1f}", color=colour, **style, **centred)
    for true in np.flatnonzero(totals == 0):
        axes.text(len(totals) / 2 - 0.5, true, "no clips", color=FAINT, fontsize=9, **centred)

    names = [scene.replace("_", " ") for scene in results["scene_acc"]]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name} ({int(n):,})" for name, n in zip(names, totals, strict=True)])
    axes.set_xlabel("predicted scene")
    axes.set_ylabel("true scene (clips)")
    edges = np.arange(len(names) - 1) + 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    beside = axes.inset_axes((1.025, 0, 0.03, 1))
    figure.colorbar(image, cax=beside, ticks=range(0, 101, 20), format="%d %%").outline.set_visible(False)
    beside.tick_params(length=0, labelsize=9, labelcolor=INK)
    _save(figure, path)


def device_png(results: dict, path: Path, title: str, note: str | None = None, labels: Labels = TAU22_LABELS) -> None:
    """Draw the accuracy per device, by group, with each group's own accuracy and chance. ``note``: a subtitle."""
    accuracy = results["device_acc"]
    top = min(100, max(30, 118 * max((value for value in accuracy.values() if value is not None), default=0)))
    merit = f"accuracy over all devices {with_unit(results['acc'])}"
    figure, axes = _figure(8.6, 5.4, title, merit, results, note)
    shown = [device for device in labels.devices if accuracy[device] is not None] or labels.devices
    for group, devices in labels.device_groups.items():
        if places := {shown.index(device): device for device in devices if device in shown}:
            _group(axes, group, places, results, labels)

    chance = 100 / len(labels.scenes)
    axes.axhline(chance, color=INK, linestyle=(0, (4, 3)), linewidth=1, zorder=3)
    axes.text(len(shown) - 0.36, chance, f"chance\n{chance:.0f} %", va="center", color=INK, fontsize=9)
    values = ["no clips" if accuracy[device] is None else f"{100 * accuracy[device]:.1f}" for device in shown]
    labels = [f"{device.upper()}\n{value}" for device, value in zip(shown, values, strict=True)]
    axes.set_xticks(range(len(shown)), labels, linespacing=1.4)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_ylim(0, 1.12 * top)  # room for the groups' names
    axes.set_yticks(range(0, int(top) + 1, 10))
    axes.set_xlabel("recording device, and its accuracy (%); line: all clips of the group", labelpad=8)
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="#e0e0e0", linewidth=0.8)
    axes.set_axisbelow(True)
    _save(figure, path)


def _group(axes: Axes, group: str, devices: dict[int, str], results: dict, labels: Labels) -> None:
    """Draw one group's bars, its name above them and a line at its accuracy. ``devices``: place -> device."""
    places, heights = list(devices), [100 * (results["device_acc"][device] or 0) for device in devices.values()]
    axes.bar(places, heights, width=0.72, color=GROUP_COLOURS[group], zorder=2)
    accuracy = results["device_group_acc"][group]
    if accuracy is not None:
        axes.hlines(100 * accuracy, places[0] - 0.44, places[-1] + 0.44, color=INK, linewidth=1.6, zorder=4)
    label = f"{simulated(group, labels)}{group}\n{'no clips' if accuracy is None else f'{100 * accuracy:.1f} %'}"
    transform = axes.get_xaxis_transform()  # x in devices, y as a fraction of the axes
    axes.text(np.mean(places), 0.99, label, transform=transform, ha="center", va="top", color=INK, fontsize=10)


def _figure(width: float, height: float, title: str, merit: str, results: dict, note: str | None):
    """Return a figure (inches) with a bold title and lines below it, and its axes.

    pyplot's global state does not know the figure, so it is freed, and can be drawn in any thread.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    below = [f"{merit}  ·  {results['n_clips']:,} clips", *([note] if note else [])]
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


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
