"""Learning curves from metrics.csv: the general model's or each device's, of one run or of several overlaid."""

from collections.abc import Sequence
from typing import NamedTuple

from dcase.report import svg
from dcase.report.run_files import Finished

Source = tuple[Finished, str]  # a run, and the prefix of its metrics' names: of one model, of one attempt
LOSS, ACCURACY = "train/loss", "val/macro_avg_acc"
SHOWN = (  # metric, title, unit, factor
    (LOSS, "Training loss", "loss, mean of the epoch", 1),
    (ACCURACY, "Validation macro-average accuracy", "accuracy (%)", 100),
)
LR = ("lr", "Learning rate", "rate", 1)


class Multiples(NamedTuple):
    """Small charts of one metric, one per device, with a common legend."""

    title: str
    unit: str
    legend: list[svg.Line]
    charts: list[svg.Chart]


class Curves(NamedTuple):
    charts: list[svg.Chart]  # of general models
    multiples: list[Multiples]


def learning_curves(run: Finished) -> Curves:
    """Return the curves of the run that trained the model, with a line per learning rate where several were tried."""
    models = _models(run.training)
    general = {"": (run.training, "")} if models.pop("", None) else {}
    by_device = {model: {_name(prefix): (run.training, prefix) for prefix in found} for model, found in models.items()}
    names = dict.fromkeys(name for found in by_device.values() for name in found)
    return Curves(_charts(general, [""], (*SHOWN, LR)), _multiples(by_device, list(names)))


def overlaid(runs: Sequence[tuple[str, Finished]]) -> Curves:
    """Return the curves of several runs, by label; for a device, of the learning rate that was chosen."""
    by_model: dict[str, dict[str, Source]] = {}
    for label, run in runs:
        for model, prefixes in _models(run.training).items():
            by_model.setdefault(model, {})[label] = run.training, _chosen(run.training, model, prefixes)
    labels = [label for label, _ in runs]
    return Curves(_charts(by_model.pop("", {}), labels, SHOWN), _multiples(by_model, labels))


def best_accuracy(run: Finished) -> float | None:
    """Return the general model's best validation accuracy."""
    return max(run.training.curves.get(ACCURACY, ([], []))[1], default=None)


def _models(run: Finished) -> dict[str, list[str]]:
    """Return the prefixes of the metrics' names, one per attempt, by model: "" (the general one) or a device."""
    found: dict[str, list[str]] = {}
    for name in run.curves:
        if name.endswith(LOSS):
            prefix = name.removesuffix(LOSS)
            found.setdefault(prefix.partition("/")[0], []).append(prefix)
    return found


def _name(prefix: str) -> str:
    """a/lr_0.001/ -> lr 0.001"""
    return prefix.strip("/").partition("/")[2].replace("_", " ")


def _chosen(run: Finished, model: str, prefixes: list[str]) -> str:
    lr = (run.results.get("fine_tuning") or {}).get(model, {}).get("lr")
    chosen = f"{model}/lr_{lr:g}/" if lr else ""
    return chosen if chosen in prefixes else prefixes[0]


def _charts(found: dict[str, Source], names: list[str], metrics: Sequence[tuple]) -> list[svg.Chart]:
    charts = []
    for metric, title, unit, factor in metrics:
        series = [_series(name, found.get(name), metric, factor) for name in names]
        if any(line.y for line in series):
            x, y = _axis(series), svg.axis(unit, [value for line in series for value in line.y])
            charts.append(svg.Chart(f"curve-{metric.replace('/', '-')}", title, x, y, series))
    return charts


def _multiples(models: dict[str, dict[str, Source]], names: list[str]) -> list[Multiples]:
    """``models``: device -> name of a line -> source."""
    shown = []
    for metric, title, unit, factor in SHOWN:
        lines = {device: [_series(name, found.get(name), metric, factor) for name in names]
                 for device, found in models.items()}  # fmt: skip
        lines = {device: series for device, series in lines.items() if any(line.y for line in series)}
        if not lines:
            continue
        y = svg.axis(unit, [value for series in lines.values() for line in series for value in line.y], n=3)
        charts = []
        for device, series in lines.items():
            name, of_device = f"curve-{device}-{metric.replace('/', '-')}", f"{title}, device {device.upper()}"
            x = _axis(series, n=2)
            charts.append(svg.Chart(name, of_device, x, y, series, caption=device.upper(), frame=svg.SMALL))
        drawn = {line.name: line for chart in charts for line in chart.lines}
        legend = [drawn[name] for name in names if name in drawn] if len(names) > 1 else []
        shown.append(Multiples(title, unit, legend, charts))
    return shown


def _axis(series: list[svg.Series], n: int = 5) -> svg.Axis:
    return svg.axis("optimiser step", [0, *(step for line in series for step in line.x)], n)


def _series(name: str, found: Source | None, metric: str, factor: float) -> svg.Series:
    """Return a series; it has no points where there is nothing."""
    steps, values = found[0].curves.get(f"{found[1]}{metric}", ([], [])) if found else ([], [])
    return svg.Series(name, steps, [factor * value for value in values])
