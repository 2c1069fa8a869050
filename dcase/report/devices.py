"""Devices: all of them in one table, and a panel for each with what goes wrong on it."""

from collections.abc import Callable

import numpy as np

from dcase.data.tau22 import DEVICE_GROUPS, DEVICES, SCENES
from dcase.report.baseline import BASELINE
from dcase.report.content import Content
from dcase.report.html import Html, bar_cell, cell, el, join, link, section, table
from dcase.report.mistakes import blame, mixed_up
from dcase.report.words import aside, brackets, difference, interval, locations, members, percent, title, with_unit

MIXED_UP = 6  # rows of what is mixed up most
KINDS = {device: group for group, devices in DEVICE_GROUPS.items() for device in devices}
LEGEND = {"real": "real", "seen": "simulated, heard in training", "unseen": "simulated, never heard in training"}


def overview(content: Content) -> Html:
    """The accuracy per device, each with a link to its panel, and per group."""
    run, figures = content.run, content.figures
    beside = BASELINE if run.comparable else ()
    rows = []
    for device in run.devices:
        accuracy = run.results["device_acc"][device]
        estimate = figures("device", device) if figures else None
        name = link(f"device-{device}", device.upper()) if figures else device.upper()
        row = [name, KINDS[device], cell(percent(accuracy), class_="strong")]
        row.append(bar_cell(accuracy, estimate, KINDS[device]))
        if figures:
            gap = figures("gap", device)
            row += [interval(estimate), cell(difference(gap.value), sort=gap.value), f"{interval(gap)}{_mark(gap)}"]
            row += [percent(figures(name, device).value) for name in ("confidence", "calibration_error")]
        row += [f"{published.device_acc[DEVICES.index(device)]:.2f}" for published in beside]
        rows.append(row)
    header, caption = ["Device", "Group", "Accuracy", ""], "Accuracy per device, in percent"
    if figures:
        header += ["95 % interval", "Against the others", "95 % interval", "Mean confidence", "Calibration error"]
        caption += "; *: more than chance; a device's name leads to what goes wrong on it"
    header += [published.name for published in beside]
    shown = table("device-table", caption, header, rows, data_sortable=True)
    entries = (el("li", el("i", class_=f"fill {kind}"), f" {LEGEND[kind]}") for kind in run.groups)
    return join(shown, el("ul", *entries, class_="legend"), _groups(content))


def _mark(estimate) -> str:
    return " *" if estimate.clear else ""


def _groups(content: Content) -> Html:
    run, figures = content.run, content.figures
    beside = BASELINE if run.comparable else ()
    rows = []
    for group in run.groups:
        accuracy = run.results["device_group_acc"][group]
        estimate = figures("group", group) if figures else None
        row = [f"{title(group)} ({members(group)})", cell(percent(accuracy), class_="strong")]
        row.append(bar_cell(accuracy, estimate, group))
        row += [interval(estimate)] if figures else []
        i = list(DEVICE_GROUPS).index(group)
        rows.append([*row, *(f"{published.group_acc[i]:.2f}" for published in beside)])
    header = ["Group", "Accuracy", "", *(["95 % interval"] if figures else []), *(row.name for row in beside)]
    return table("group-table", "Accuracy per group of devices, in percent", header, rows)


# Panels


def panels(content: Content) -> Html:
    """One for all clips, for each group, and for each device. With the script on, one is shown at a time."""
    if not content.figures:
        confusion = np.array(content.run.results["confusion"])
        return join(matrix("all", confusion, "all devices"))
    counts = content.run.predictions.confusion
    chosen = [("all", "All", np.arange(len(DEVICES)))]
    chosen += [(g, title(g), np.array([DEVICES.index(d) for d in devices])) for g, devices in DEVICE_GROUPS.items()]
    chosen += [(d, d.upper(), np.array([i])) for i, d in enumerate(DEVICES)]
    chosen = [(name, text, rows) for name, text, rows in chosen if counts[rows].sum()]
    tabs = el("ul", *(el("li", link(f"device-{name}", text)) for name, text, _ in chosen))
    shown = [_panel(content, name, rows) for name, _, rows in chosen]
    return join(el("nav", tabs, class_="tabs", aria_label="Devices"), *shown)


def _panel(content: Content, name: str, rows: np.ndarray) -> Html:
    counts = content.run.predictions.confusion
    ours = counts[rows].sum(0)
    rest = np.delete(counts, rows, axis=0).sum(0)
    others = rest if rest.sum() else None
    device = name in DEVICES
    heading = f"Device {name.upper()}" if device else "All devices"
    if name in DEVICE_GROUPS:
        heading = f"{title(name)} devices ({members(name)})"
    if name == "all":
        confusion = np.array(content.run.results["confusion"])  # exact, where a logit's rounding may have moved a clip
    else:
        confusion = ours
    parts = [_lead(content, name, ours), _mixed_table(name, ours, others)]
    if device:
        parts.append(_scene_table(content, name))
    parts.append(matrix(name, confusion, heading[0].lower() + heading[1:]))
    if device and content.gallery:
        parts.append(content.gallery.spectrum(DEVICES.index(name)))
        if content.device_mistakes[name]:
            cards = content.gallery.cards(content.device_mistakes[name])
            parts += [el("h4", f"Most confident mistakes on {name.upper()}"), cards]
    return section(f"device-{name}", heading, *parts, level=3, class_="panel")


def _lead(content: Content, name: str, confusion: np.ndarray) -> Html:
    figures, clips = content.figures, int(confusion.sum())
    right = int(np.trace(confusion))
    if name not in DEVICES:
        return el("p", f"{right:,} of {clips:,} clips are right ({percent(right / clips)} %).", class_="lead")
    estimate, gap = figures("device", name), figures("gap", name)
    places = locations(figures.n_locations("device", name))
    said = [f"{right:,} of {clips:,} clips, of {places}, are right: {percent(estimate.value)} %{brackets(estimate)}"]
    if gap.value is not None:
        said.append(f", {aside(gap)} all other devices{brackets(gap)}")
    said.append(".")
    found = blame(content.run.predictions, content.gallery.others, DEVICES.index(name))
    known = found.device + found.sound
    if known:
        said.append(
            f" Of {known:,} mistakes whose sound other devices have recorded too, {found.device:,} "
            f"({with_unit(found.share)}) are right on most of these: lost by the device. The other {found.sound:,} are "
            "hard on most devices."
        )
    sure, acc = figures("confidence", name).value, estimate.value
    said.append(f" On average it is {percent(sure)} % sure here, {'more' if sure > acc else 'less'} than it is right.")
    return el("p", *said, class_="lead")


def _mixed_table(name: str, confusion: np.ndarray, others: np.ndarray | None) -> Html:
    found = mixed_up(confusion, others, MIXED_UP)
    if not found:
        return Html("")
    rows = []
    for m in found:
        row = [title(m.true), cell(title(m.predicted), class_="text"), f"{m.n_clips:,} of {m.of:,}", percent(m.share)]
        if others is not None:
            extra = None if m.elsewhere is None else m.share - m.elsewhere
            row += [percent(m.elsewhere), cell(difference(extra), class_="strong")]
        rows.append(row)
    header = ["Scene", "Taken for", "Clips", "Share", *(["On the others", "Difference"] if others is not None else [])]
    caption = "What is mixed up most" + (", against all other devices" if others is not None else "") + ", in percent"
    return table(f"mixed-{name}", caption, header, rows)


def _scene_table(content: Content, device: str) -> Html:
    """The scenes' accuracies on one device beside those over all devices."""
    figures, rows = content.figures, []
    confusion = content.run.predictions.confusion[DEVICES.index(device)]
    for i, scene in enumerate(SCENES):
        here, everywhere = figures("scene", scene, device), figures("scene", scene)
        if here.value is None:
            continue
        less = here.value - everywhere.value
        rows.append([
            title(scene),
            cell(percent(here.value), class_="strong"),
            bar_cell(here.value, here, KINDS[device]),
            interval(here),
            percent(everywhere.value),
            cell(difference(less), sort=less),
            f"{confusion[i].sum():,}",
            f"{confusion[:, i].sum():,}",
            f"{figures.n_locations('scene', scene, device):,}",
        ])  # fmt: skip
    header = ["Scene", "Here", "", "95 % interval", "All devices", "Difference", "Clips", "Predicted", "Locations"]
    caption = f"Scenes on {device.upper()}, in percent; Predicted: clips that are taken for the scene"
    return table(f"scenes-{device}", caption, header, rows, data_sortable=True)


def matrix(name: str, confusion: np.ndarray, where: str) -> Html:
    """Confusion (scenes, scenes) in clips: each cell has its share of the true scene, in percent, and its clips."""
    totals = confusion.sum(1)
    text = (
        f"Confusion on {where}: rows are the true scene and its clips, columns what is predicted; a cell is the share "
        "of the row in percent, and below it the clips"
    )

    def cell_of(i: int, j: int) -> tuple[str, str, float]:
        share = 100 * confusion[i, j] / totals[i] if totals[i] else 0
        return f"{share:.1f}" if totals[i] else "-", f"{confusion[i, j]:,}", share

    return matrix_table(name, text, [f"{n:,}" for n in totals], cell_of, lambda i, j: not confusion[i, j])


def matrix_table(
    name: str,
    text: str,
    clips: list[str],
    cell_of: Callable[[int, int], tuple[str, str, float]],
    is_nothing: Callable[[int, int], bool],
) -> Html:
    """Scenes by scenes. ``clips``: of each row; ``cell_of`` (row, column): what is printed large and small, and how
    deep its colour is, 0 to 100."""
    head = [el("th", el("span", title(scene)), scope="col") for scene in SCENES]
    rows = []
    for i, scene in enumerate(SCENES):
        cells = []
        for j in range(len(SCENES)):
            large, small, depth = cell_of(i, j)
            kinds = ("hit" * (i == j), "none" * is_nothing(i, j))
            content = (el("b", large), el("small", small))
            cells.append(el("td", *content, class_=" ".join(filter(None, kinds)) or None, style=f"--s:{depth:.0f}%"))
        rows.append(el("tr", el("th", title(scene), el("small", clips[i]), scope="row"), *cells))
    caption = el("caption", el("span", text), id=f"matrix-{name}-caption")
    head = el("thead", el("tr", el("td", "true ↓ predicted →", class_="corner"), *head))
    shown = el("table", caption, head, el("tbody", *rows), id=f"matrix-{name}", class_="matrix")
    return el("div", shown, class_="scroll", role="region", aria_labelledby=f"matrix-{name}-caption", tabindex=0)
