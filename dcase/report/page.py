"""The page of one run: a file that needs no network, made of the run's folder and, for sound, its data folder."""

from pathlib import Path

from dcase.data.tau22 import SCENES
from dcase.files import replace_file
from dcase.report import devices, setup
from dcase.report.baseline import BASELINE, BASELINE_NOTE, CHECKER_NOTE
from dcase.report.bootstrap import BINS, FEW, FEWEST, Figures, reliability
from dcase.report.content import Content, compute
from dcase.report.html import Html, bar_cell, cell, el, escape, join, link, section, table
from dcase.report.learning import learning_curves
from dcase.report.run_files import Finished
from dcase.report.svg import Axis, lines, place
from dcase.report.tables import complexity_rows, fine_tuning_rows, own_models
from dcase.report.words import aside, brackets, interval, locations, members, percent, title, with_unit

INDEX_HTML = "index.html"
Part = tuple[str, str, str, Html]  # name, in the navigation, heading, content
HERE = Path(__file__).parent
KINDS = {"general": "general model", "device-specific": "device-specific models", "test": "test"}  # of `runs.kind_of`
HOW_TO_GET = (
    "Intervals, calibration, confusions per device and mistakes need it: test the run's checkpoint again with "
    "test_only.py, and its page has them."
)


def write_page(run: Finished, folder: Path | None = None, with_audio: bool = True) -> Path:
    """Write <run>/report/index.html. ``folder``: of the data; None: the one that the run's configuration says.

    Raises `UserError` where the file cannot be written.
    """
    content = compute(run, folder, with_audio)
    path = run.folder / "report" / INDEX_HTML
    kind = f" ({run.kind})" if run.kind else ""
    text = document(f"{run.name}{kind}: run {run.id}", body(content))
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path


def document(name: str, content: Html) -> str:
    """A whole page, with its style and script inside."""
    style, script = ((HERE / file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{content}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def body(content: Content) -> Html:
    run = content.run
    parts: list[Part] = [
        ("headline", "Results", "Results", headline(content)),
        ("devices", "Devices", "Devices", devices.overview(content)),
        ("scenes", "Scenes", "Scenes", scenes(content)),
        ("confusion", "Confusion", "What Goes Wrong, Device by Device", devices.panels(content)),
        ("mistakes", "Mistakes", "Most Confident Mistakes", mistakes(content)),
        ("calibration", "Calibration", "Calibration", calibration(content)),
        ("fine-tuning", "Fine-Tuning", "Fine-Tuning per Device", fine_tuning(run)),
        ("learning", "Learning", "Learning Curves", learning_curves(run)),
        ("complexity", "Complexity", "Complexity", complexity(run)),
        ("configuration", "Configuration", "Configuration", setup.configuration(run)),
        ("environment", "Environment", "Environment", setup.environment(run)),
    ]
    return join(header(run), navigation(parts), main(parts))


def navigation(parts: list[Part]) -> Html:
    """Links to the parts that have a content."""
    links = (el("li", link(name, text)) for name, text, _, content in parts if content)
    return el("nav", el("ul", *links), aria_label="Parts of this page")


def main(parts: list[Part]) -> Html:
    return el("main", *(section(name, heading, content) for name, _, heading, content in parts if content), id="main")


def header(run: Finished) -> Html:
    facts = [f"run {run.id}", f"{run.results['n_clips']:,} test clips", run.results["data"] or "data not named"]
    if run.kind:
        facts.insert(0, KINDS[run.kind])
    if run.trained_by and run.trained_by.kind:
        facts[0] += f" of run {run.trained_by.id} ({KINDS[run.trained_by.kind]})"
    if run.seed is not None:
        facts.append(f"seed {run.seed}")
    missing = f"{run.missing} {HOW_TO_GET}" if run.missing else ""
    notes = [el("p", note, class_="note", role="note") for note in (run.results["note"], missing) if note]
    return join(
        el("a", "Skip to the results", href="#main", class_="skip"),
        el("header", el("h1", run.name), el("p", " · ".join(facts), class_="facts"), *notes, _own_models(run)),
    )


def _own_models(run: Finished) -> Html:
    if not run.fine_tuning:
        return Html("")
    return el("p", f"{own_models(run.fine_tuning)} ", link("fine-tuning", "Fine-tuning per device"), class_="lead")


# Results


def headline(content: Content) -> Html:
    run, figures = content.run, content.figures
    results = run.results
    macro = with_unit(results["macro_avg_acc"])
    tiles = [_tile("Macro-average accuracy", macro, _range(figures, "macro_avg_acc"), "big")]
    for group in run.groups:
        name = f"{title(group)} devices ({members(group)})"
        tiles.append(_tile(name, with_unit(results["device_group_acc"][group]), _range(figures, "group", group)))
    loss = "-" if results["loss"] is None else f"{results['loss']:.4f}"
    tiles.append(_tile("Log loss", loss, _range(figures, "loss", plain=True)))
    if figures:
        error = figures("calibration_error")
        tiles.append(_tile("Calibration error", with_unit(error.value), _range(figures, "calibration_error")))
    tiles += _limits(results.get("complexity"))
    how = how_intervals(figures) if figures else ""
    return join(el("ul", *tiles, class_="tiles"), _figures_table(run, figures), how, worst(content))


def _tile(name: str, value: str, below: object, kind: str | None = None) -> Html:
    return el("li", el("span", name, class_="name"), el("b", value), el("span", below, class_="below"), class_=kind)


def _range(figures: Figures | None, *name: str, plain: bool = False) -> str:
    estimate = figures(*name) if figures else None
    return f"95 %: {interval(estimate, plain)}" if estimate and estimate.low is not None else ""


def _limits(complexity: dict | None) -> list[Html]:
    if not complexity:
        return []
    tiles = []
    for name, value, limit, unit in (
        ("Size", complexity["total_param_bytes"], complexity["max_param_bytes"], " B"),
        ("MACs", complexity["macs"], complexity["max_macs"], ""),
    ):
        within = value <= limit
        verdict = f"{'✓ within' if within else '✗ over'} the limit of {limit:,}{unit}"
        tiles.append(_tile(name, f"{value:,}{unit}", verdict, "within" if within else "over"))
    return tiles


def _figures_table(run: Finished, figures: Figures | None) -> Html:
    results = run.results
    lines = [("Macro-average accuracy (mean over scenes)", results["macro_avg_acc"], ("macro_avg_acc",), False)]
    lines += [("Accuracy over all clips", results["acc"], ("acc",), False)]
    if "device_avg_acc" in results:
        lines += [("Mean over devices", results["device_avg_acc"], ("device_avg_acc",), False)]
    for group in run.groups:
        name = f"{title(group)} devices ({members(group)})"
        lines.append((name, results["device_group_acc"][group], ("group", group), False))
    lines.append(("Log loss", results["loss"], ("loss",), True))
    if figures:
        for name, key in (("Calibration error", "calibration_error"), ("Mean confidence", "confidence")):
            lines.append((name, figures(key).value, (key,), False))
    rows = []
    for name, value, key, plain in lines:
        shown = percent(value) if not plain else "-" if value is None else f"{value:.4f}"
        rows.append([name, shown, *([interval(figures(*key), plain)] if figures else [])])
    header = ["Figure", "Value", *(["95 % interval"] if figures else [])]
    shown = table("figures", "All figures, in percent but for the log loss", header, rows)
    return el("details", el("summary", "All figures in a table"), shown)


def how_intervals(figures: Figures) -> Html:
    """Of how many locations the intervals are, and what that means for them."""
    n = len(figures.locations)
    if n < FEWEST:
        text = f"The test has clips of {locations(n)}: of fewer than {FEWEST} no interval can be told."
        return el("p", text, class_="note", role="note")
    per_scene = [figures.n_locations("scene", scene) for scene in SCENES if figures("scene", scene).value is not None]
    low, high = min(per_scene), max(per_scene)
    text = (
        f"95 % intervals from {figures.draws:,} draws of the {locations(n)} with all their clips, not of single "
        "clips, which sound alike within a location. They are widened for the number of locations that a figure is of "
        f"(a scene's: {low if low == high else f'{low} to {high}'}): expanded percentile intervals, Hesterberg 2015. "
        f"Where a figure's clips come from fewer than {FEWEST} locations, it is shown without an interval."
    )
    few = f"These are clips of {locations(n)} only: the intervals are rough, and rather too narrow."
    return join(el("p", few, class_="note", role="note") if n < FEW else "", el("p", text, class_="hint"))


def worst(content: Content) -> Html:
    """Where to look first: the weakest device and scene, where they differ."""
    results = content.run.results
    if results["acc"] == 1:
        return el("p", "Every clip is right.", class_="lead")
    said: list[object] = [_weakest_device(content)]
    accuracy = {s: a for s, a in results["scene_acc"].items() if a is not None}
    if len(set(accuracy.values())) > 1:
        scene = min(accuracy, key=accuracy.get)
        said.append(f"Weakest scene: {title(scene)} with {percent(accuracy[scene])} %.")
    return el("p", *said, class_="lead") if any(said) else Html("")


def _weakest_device(content: Content) -> Html:
    accuracy = {d: a for d, a in content.run.results["device_acc"].items() if a is not None}
    if len(set(accuracy.values())) < 2:
        return Html("")
    device = min(accuracy, key=accuracy.get)
    name = link(f"device-{device}", device.upper()) if content.figures else device.upper()
    said: list[object] = ["Weakest device: ", name, f" with {percent(accuracy[device])} %"]
    if content.figures:
        gap = content.figures("gap", device)
        chance = ", which can be chance" if gap.low is not None and not gap.clear else ""
        said.append(f", {aside(gap)} all others together{chance}")
    return join(*said, ". ")


# Scenes


def scenes(content: Content) -> Html:
    run, figures = content.run, content.figures
    confusion = run.results["confusion"]
    beside = BASELINE if run.comparable else ()
    rows = []
    for i, scene in enumerate(SCENES):
        accuracy = run.results["scene_acc"][scene]
        estimate = figures("scene", scene) if figures else None
        clips, said = sum(confusion[i]), sum(row[i] for row in confusion)
        row = [title(scene), cell(percent(accuracy), class_="strong")]
        row.append(bar_cell(accuracy, estimate))
        row += [interval(estimate)] if figures else []
        row += [cell(f"{clips:,}", sort=clips), cell(f"{said:,}", sort=said)]
        row += [f"{figures.n_locations('scene', scene):,}"] if figures else []
        row += [f"{published.scene_acc[i]:.2f}" for published in beside]
        rows.append(row)
    mean = ["Macro average", cell(percent(run.results["macro_avg_acc"]), class_="strong")]
    mean.append(bar_cell(run.results["macro_avg_acc"], figures("macro_avg_acc") if figures else None))
    mean += [interval(figures("macro_avg_acc"))] if figures else []
    mean += [cell(f"{run.results['n_clips']:,}")] * 2
    mean += [f"{len(figures.locations):,}"] if figures else []
    mean += [published.macro for published in beside]
    header = ["Scene", "Accuracy", "", *(["95 % interval"] if figures else []), "Clips", "Predicted"]
    header += ["Locations"] if figures else []
    header += [published.name for published in beside]
    caption = "Accuracy per scene, in percent; Predicted: clips that are taken for the scene"
    shown = table("scene-table", caption, header, [*rows, mean], data_sortable=True)
    return join(shown, el("p", BASELINE_NOTE, class_="hint") if beside else "")


# Mistakes and calibration


def mistakes(content: Content) -> Html:
    if not content.gallery:
        return Html("")
    if not content.mistakes:
        return el("p", "There is no mistake.")
    return join(content.gallery.note(), content.gallery.cards(content.mistakes))


def calibration(content: Content) -> Html:
    if not content.figures:
        return Html("")
    bins = reliability(content.run.predictions)
    error, confidence, acc = (content.figures(name) for name in ("calibration_error", "confidence", "acc"))
    word = "too sure" if confidence.value > acc.value else "not sure enough"
    lead = (
        f"The model is {percent(confidence.value)} % sure on average, and right in {percent(acc.value)} %: {word} by "
        f"{abs(100 * (confidence.value - acc.value)):.2f} points. Its expected calibration error is the mean distance "
        f"of the two over {BINS} bins of confidence: {percent(error.value)} %{brackets(error)}."
    )
    rows = []
    for b in bins:
        edges = f"{100 * b.low:.0f} to {100 * b.high:.0f}"
        rows.append([edges, f"{b.n_clips:,}", percent(b.confidence), percent(b.acc)])
    header = ["Confidence (%)", "Clips", "Mean confidence", "Accuracy"]
    shown = table("reliability", "Reliability, in percent", header, rows)
    more = el("details", el("summary", "The diagram as a table"), shown)
    return join(el("p", lead, class_="lead"), el("div", _reliability_chart(bins), more, class_="side"))


def _reliability_chart(bins: list) -> Html:
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    x, y = (Axis(label, 0, 1, ticks, lambda v: f"{100 * v:.0f}") for label in ("confidence (%)", "accuracy (%)"))
    drawn = []
    (x0, y0), (x1, y1) = place(x, y, 0, 0), place(x, y, 1, 1)
    most = max(b.n_clips for b in bins)
    for b in (b for b in bins if b.n_clips):
        (left, top), (right, bottom) = place(x, y, b.low, b.acc), place(x, y, b.high, 0)
        sizes = {"x": left + 1, "width": right - left - 2, "y": top, "height": bottom - top}
        box = {side: f"{value:.1f}" for side, value in sizes.items()}
        text = el("title", f"{percent(b.acc)} % right at {percent(b.confidence)} %, {b.n_clips:,} clips")
        drawn.append(el("rect", text, **box, class_="right", fill_opacity=f"{0.35 + 0.65 * b.n_clips / most:.2f}"))
    drawn.append(el("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_="ideal"))
    caption = (
        "Reliability: where a bar ends at the broken line, the model is as often right as it is sure; where it ends "
        "below the line, it is too sure. The stronger a bar's colour, the more clips it stands for."
    )
    return lines("reliability-chart", caption, x, y, [], *drawn)


# The rest


def fine_tuning(run: Finished) -> Html:
    if not run.fine_tuning:
        return Html("")
    header, rows = fine_tuning_rows(run.fine_tuning)
    rows = [[device.upper(), *others] for device, *others in rows]
    caption = "Macro-average accuracy on the device's validation clips, in percent"
    return table("fine-tuning-table", caption, header, rows)


def complexity(run: Finished) -> Html:
    measured = run.results.get("complexity")
    if not measured:
        return Html("")
    header, rows = complexity_rows(measured, run.name, run.comparable, run.results["macro_avg_acc"])
    parts = measured.get("macs_by_part", {})
    shares = []
    for part, macs in parts.items():
        share = macs / measured["macs"]
        shares.append([part, f"{macs:,}", percent(share), bar_cell(share)])
    caption = "MACs by part of the model, and their share in percent"
    by_part = table("macs", caption, ["Part", "MACs", "Share", ""], shares)
    return join(
        table("complexity-table", "One forward pass of one clip, against the challenge's limits", header, rows),
        el("p", CHECKER_NOTE, class_="hint"),
        el("details", el("summary", "MACs by part"), by_part) if parts else "",
    )
