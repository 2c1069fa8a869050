"""Aligned Markdown tables, of a ``results`` dict and of anything else."""

from collections.abc import Sequence

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.report.baseline import BASELINE, BASELINE_BYTES, BASELINE_BYTES_IN_BITS, BASELINE_MACS, BASELINE_PARAMS
from dcase.report.words import group, percent, points, title

Table = tuple[list[str], list[list[str]]]  # header and rows


def class_table(results: dict, name: str, beside_baseline: bool, labels: Labels = TAU22_LABELS) -> str:
    """Return a Markdown table of the accuracy per scene and their mean, in percent; ``name`` labels the row."""
    ours = [*(percent(results["scene_acc"][scene]) for scene in labels.scenes), percent(results["macro_avg_acc"])]
    theirs = [[row.name, *map(points, row.scene_acc), row.macro] for row in BASELINE if beside_baseline]
    return markdown(["Model", *map(title, labels.scenes), "Macro Avg. Accuracy"], [*theirs, [name, *ours]])


def device_table(results: dict, name: str, beside_baseline: bool, labels: Labels = TAU22_LABELS) -> str:
    """Return two Markdown tables, in percent: the accuracy per device, and per group of devices.

    "Macro Avg. Accuracy" is the mean over scenes here too, as in the class-wise table.
    """
    beside = BASELINE if beside_baseline else ()
    header = ["Model", *(device.upper() for device in labels.devices), "Macro Avg. Accuracy"]
    ours = [*(percent(results["device_acc"][device]) for device in labels.devices), percent(results["macro_avg_acc"])]
    devices = markdown(header, [*([r.name, *map(points, r.device_acc), r.macro] for r in beside), [name, *ours]])
    ours = [percent(results["device_group_acc"][name_of_group]) for name_of_group in labels.device_groups]
    header = ["Model", *(group(one, labels) for one in labels.device_groups)]
    return f"{devices}\n\n{markdown(header, [*([r.name, *map(points, r.group_acc)] for r in beside), [name, *ours]])}"


def fine_tuning_rows(outcomes: dict[str, dict]) -> Table:
    """Return stage 2's outcome: macro-average accuracy on each device's validation clips, in percent.

    ``outcomes``: device_id -> {"n_train", "n_val", "general", "fine_tuned", "kept", "reason"}.
    """
    header = ["Device", "Training Clips", "Validation Clips", "General", "Fine-Tuned", "Own Model Kept"]
    rows = []
    for device_id, outcome in outcomes.items():
        kept = f"{'yes' if outcome['kept'] else 'no'}: {outcome['reason']}"
        clips = [f"{outcome[name]:,}" for name in ("n_train", "n_val")]
        rows.append([device_id, *clips, percent(outcome["general"]), percent(outcome["fine_tuned"]), kept])
    return header, rows


def own_models(outcomes: dict[str, dict]) -> str:
    """Return a sentence: which devices stage 2 gave their own model; ``outcomes`` as in `fine_tuning_rows`."""
    kept = [device_id.upper() for device_id, outcome in outcomes.items() if outcome["kept"]]
    if not kept:
        return "No device has a model of its own: the general model stays for all of them."
    have = "has a model of its own" if len(kept) == 1 else "have a model of their own"
    return f"{len(kept)} of {len(outcomes)} fine-tuned devices {have}: {', '.join(kept)}."


def complexity_comparison(
    complexity: dict, name: str, beside_baseline: bool, macro_avg_acc: float | None = None
) -> str:
    """Return `complexity_rows` as a Markdown table."""
    return markdown(*complexity_rows(complexity, name, beside_baseline, macro_avg_acc))


def complexity_rows(complexity: dict, name: str, beside_baseline: bool, macro_avg_acc: float | None = None) -> Table:
    """Return the model's complexity against the challenge's limits.

    ``complexity`` is plain: ``params``, ``total_param_bytes``, ``macs``, ``torchinfo_macs``, ``max_param_bytes`` and
    ``max_macs``. ``beside_baseline`` adds CP-Mobile's figures, the difference from them, and ``macro_avg_acc`` (a
    fraction of 1) against the baseline's.
    """
    max_bytes, max_macs = complexity["max_param_bytes"], complexity["max_macs"]
    lines = [  # metric, ours, unit, limit, the baseline's
        ("Parameters", complexity["params"], "", None, BASELINE_PARAMS),
        ("MACs", complexity["macs"], "", max_macs, BASELINE_MACS),
        ("MACs as the challenge's checker counts", complexity["torchinfo_macs"], "", max_macs, BASELINE_MACS),
        ("Memory (as stored)", complexity["total_param_bytes"], " B", max_bytes, BASELINE_BYTES),
        ("Memory (16-bit)", complexity["bytes_in_16_bit"], " B", max_bytes, BASELINE_BYTES_IN_BITS[16]),
        ("Memory (8-bit)", complexity["bytes_in_8_bit"], " B", max_bytes, BASELINE_BYTES_IN_BITS[8]),
    ]
    header, rows = ["Metric", name, "Limit", "Of the Limit"], []
    if beside_baseline:
        header += ["CP-Mobile Baseline", "Difference"]
        for row in BASELINE:
            less = "-" if macro_avg_acc is None else f"{100 * macro_avg_acc - row.macro_avg_acc:+.2f}"
            rows.append([f"Macro Avg. Accuracy ({row.name})", percent(macro_avg_acc), "-", "-", row.macro, less])
    for metric, ours, unit, limit, baseline in lines:
        of_limit = ["-", "-"]
        if limit is not None:
            of_limit = [f"{limit:,}{unit}", f"{ours / limit:,.3g} x, {'over' if ours > limit else 'within'}"]
        beside = [f"{baseline:,}{unit}", f"{100 * (ours / baseline - 1):+,.1f} %"] if beside_baseline else []
        rows.append([metric, f"{ours:,}{unit}", *of_limit, *beside])
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up on a terminal: the first to the left, the others right."""
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        aligned = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
