"""Learning curves from metrics.csv: of the general model, or of each device's."""

from dcase.report import svg
from dcase.report.html import Html, el, join
from dcase.report.run_files import Finished
from dcase.report.words import percent

LOSS, ACCURACY, LR = "train/loss", "val/macro_avg_acc", "lr"


def learning_curves(run: Finished) -> Html:
    trained = run.training
    models = _models(trained)
    if not models:
        return el("p", "There is no metrics.csv of a training beside this run: only a test was made.", class_="note")
    said = [el("p", f"Of run {trained.id}, which trained the model.", class_="hint")] if trained is not run else []
    return join(*said, *(_charts(trained, model, prefixes) for model, prefixes in models.items()))


def _models(run: Finished) -> dict[str, list[str]]:
    """What was trained ("": the general model; a device) -> the beginnings of its metrics' names, one per attempt."""
    found: dict[str, list[str]] = {}
    for name in run.curves:
        prefix = name.removesuffix(LOSS)
        if name.endswith(LOSS):
            found.setdefault(prefix.partition("/")[0], []).append(prefix)
    return found


def _charts(run: Finished, model: str, prefixes: list[str]) -> Html:
    best = [max(run.curves[f"{p}{ACCURACY}"][1]) for p in prefixes if f"{p}{ACCURACY}" in run.curves]
    charts = [
        _chart(run, model, prefixes, LOSS, "Training loss", "loss, mean of the epoch"),
        _chart(run, model, prefixes, ACCURACY, "Validation macro-average accuracy", "accuracy (%)", 100),
        _chart(run, model, prefixes, LR, "Learning rate", "rate") if not model else "",
    ]
    shown = el("div", *charts, class_="grid")
    heading = el("h3", f"Device {model.upper()}") if model else ""
    said = el("p", f"Best validation accuracy: {percent(max(best))} %.", class_="hint") if best else ""
    return join(heading, said, shown)


def _chart(
    run: Finished, model: str, prefixes: list[str], metric: str, title: str, unit: str, scale: float = 1
) -> Html:
    series = []
    for prefix in prefixes:
        if f"{prefix}{metric}" in run.curves:
            steps, values = run.curves[f"{prefix}{metric}"]
            name = prefix.strip("/").partition("/")[2] or title
            series.append(svg.Series(name.replace("_", " "), steps, [scale * value for value in values]))
    if not series:
        return Html("")
    x = svg.axis("optimiser step", [0, *(step for line in series for step in line.x)])
    y = svg.axis(unit, [value for line in series for value in line.y])
    kind = metric.replace("/", "-")
    return svg.lines(f"curve-{f'{model}-' if model else ''}{kind}", title, x, y, series)
