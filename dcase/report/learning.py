"""Learning curves from metrics.csv: of the general model, or of each device's; of one run, or of several overlaid."""

from collections.abc import Sequence

from dcase.report import svg
from dcase.report.html import Html, el, join
from dcase.report.run_files import Finished
from dcase.report.words import percent

Source = tuple[Finished, str]  # a run, and the beginning of its metrics' names: of one model's, of one attempt
LOSS, ACCURACY, LR = "train/loss", "val/macro_avg_acc", "lr"
SHOWN = (  # metric, title, unit, what it is multiplied with
    (LOSS, "Training loss", "loss, mean of the epoch", 1),
    (ACCURACY, "Validation macro-average accuracy", "accuracy (%)", 100),
)


def learning_curves(run: Finished) -> Html:
    trained = run.training
    models = _models(trained)
    if not models:
        return el("p", "There is no metrics.csv of a training beside this run: only a test was made.", class_="note")
    said = [el("p", f"Of run {trained.id}, which trained the model.", class_="hint")] if trained is not run else []
    shown = [_general(trained)] if models.pop("", None) else []
    attempts = dict.fromkeys(_name(prefix) for prefixes in models.values() for prefix in prefixes)
    by_device = {model: {_name(prefix): (trained, prefix) for prefix in found} for model, found in models.items()}
    return join(*said, *shown, _per_device(by_device, list(attempts)))


def overlaid(runs: Sequence[tuple[str, Finished]]) -> Html:
    """Of several runs and their labels; where a device was tuned with several learning rates, the one chosen."""
    by_model: dict[str, dict[str, Source]] = {}
    for label, run in runs:
        for model, prefixes in _models(run.training).items():
            by_model.setdefault(model, {})[label] = run.training, _chosen(run.training, model, prefixes)
    labels = [label for label, _ in runs]
    general, shown = by_model.pop("", {}), []
    for metric, title, unit, scale in SHOWN:
        series = [_series(label, general.get(label), metric, scale) for label in labels]
        shown.append(_chart(metric, title, unit, series))
    return join(el("div", *shown, class_="grid") if any(shown) else "", _per_device(by_model, labels))


def _models(run: Finished) -> dict[str, list[str]]:
    """What was trained ("": the general model; a device) -> the beginnings of its metrics' names, one per attempt."""
    found: dict[str, list[str]] = {}
    for name in run.curves:
        prefix = name.removesuffix(LOSS)
        if name.endswith(LOSS):
            found.setdefault(prefix.partition("/")[0], []).append(prefix)
    return found


def _name(prefix: str) -> str:
    """a/lr_0.001/ -> lr 0.001"""
    return prefix.strip("/").partition("/")[2].replace("_", " ")


def _chosen(run: Finished, model: str, prefixes: list[str]) -> str:
    """Of the attempts with several learning rates."""
    lr = (run.results.get("fine_tuning") or {}).get(model, {}).get("lr")
    chosen = f"{model}/lr_{lr:g}/" if lr else ""
    return chosen if chosen in prefixes else prefixes[0]


def _general(run: Finished) -> Html:
    charts = [
        _chart(metric, title, unit, [_series("", (run, ""), metric, scale)]) for metric, title, unit, scale in SHOWN
    ]
    charts.append(_chart(LR, "Learning rate", "rate", [_series("", (run, ""), LR)]))
    best = run.curves[ACCURACY][1] if ACCURACY in run.curves else []
    said = el("p", f"Best validation accuracy: {percent(max(best))} %.", class_="hint") if best else ""
    return join(said, el("div", *charts, class_="grid"))


def _per_device(models: dict[str, dict[str, Source]], names: list[str]) -> Html:
    """A small chart per device and metric, of one line per name. ``models``: device -> name -> source."""
    shown = []
    for metric, title, unit, scale in SHOWN:
        lines = {
            device: [_series(name, found.get(name), metric, scale) for name in names]
            for device, found in models.items()
        }
        lines = {device: series for device, series in lines.items() if any(line.y for line in series)}
        if not lines:
            continue
        values = [value for series in lines.values() for line in series for value in line.y]
        y = svg.axis(unit, values, n=3)  # one for all devices
        charts = []
        for device, series in lines.items():
            x = svg.axis("optimiser step", [0, *(step for line in series for step in line.x)], n=2)
            name = f"curve-{device}-{metric.replace('/', '-')}"
            charts.append(svg.small(name, f"{title}, device {device.upper()}", device.upper(), x, y, series))
        every = [max((series[i] for series in lines.values()), key=lambda line: len(line.y)) for i in range(len(names))]
        heading = el("h3", f"{title}, device by device")
        said = el("p", f"Upwards {unit}, to the right the optimiser's step.", class_="hint")
        shown.append(join(heading, said, svg.legend(every), el("div", *charts, class_="multiples")))
    return join(*shown)


def _series(name: str, found: Source | None, metric: str, scale: float = 1) -> svg.Series:
    """Without a point where there is nothing."""
    steps, values = found[0].curves.get(f"{found[1]}{metric}", ([], [])) if found else ([], [])
    return svg.Series(name, steps, [scale * value for value in values])


def _chart(metric: str, title: str, unit: str, series: list[svg.Series]) -> Html:
    if not any(line.y for line in series):
        return Html("")
    x = svg.axis("optimiser step", [0, *(step for line in series for step in line.x)])
    y = svg.axis(unit, [value for line in series for value in line.y])
    return svg.lines(f"curve-{metric.replace('/', '-')}", title, x, y, series)
