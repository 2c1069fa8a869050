"""report.md, which is printed too, and the two charts beside it."""

from pathlib import Path

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.files import replace_file
from dcase.report.baseline import BASELINE_NOTE, CHECKER_NOTE
from dcase.report.charts import CONFUSION_PNG, DEVICES_PNG, confusion_png, device_png
from dcase.report.tables import class_table, complexity_comparison, device_table, fine_tuning_rows, markdown, own_models
from dcase.report.words import loss, with_unit

REPORT_MD = "report.md"


def write_report(
    results: dict,
    folder: Path,
    name: str,
    note: str | None = None,
    beside_baseline: bool = False,
    complexity: dict | None = None,
    labels: Labels = TAU22_LABELS,
) -> str:
    """Write report.md, confusion.png and devices.png into ``folder``; return the text to print.

    Args:
        name: the name of the model or run, for its row and the titles.
        note: a line under every title, e.g. that the data are synthetic.
        beside_baseline: show the DCASE baseline's published figures too; only where the data are TAU22.
        complexity: as in `complexity_comparison`; None leaves that table out.
        labels: of the data.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    confusion_png(results, folder / CONFUSION_PNG, f"{name}: confusion of scenes", note)
    device_png(results, folder / DEVICES_PNG, f"{name}: accuracy per device", note, labels)
    text = _text(results, name, note, beside_baseline, complexity, labels)
    charts = f"![Confusion of scenes]({CONFUSION_PNG})\n\n![Accuracy per device]({DEVICES_PNG})\n"
    replace_file(folder / REPORT_MD, lambda temporary: temporary.write_text(f"{text}\n\n{charts}", encoding="utf-8"))
    return f"{text}\n\nPlots: {folder / CONFUSION_PNG}, {folder / DEVICES_PNG}"


def _text(
    results: dict, name: str, note: str | None, beside_baseline: bool, complexity: dict | None, labels: Labels
) -> str:
    macro, acc = with_unit(results["macro_avg_acc"]), with_unit(results["acc"])
    parts = [f"# Results of {name}"]
    if note:
        parts.append(f"**{note}**")
    parts += [
        f"Macro-average accuracy **{macro}** (mean over scenes), overall accuracy {acc}, "
        f"log loss {loss(results['loss'])}, {results['n_clips']:,} clips. The tables below are in percent.",
        "## Class-wise Results",
        class_table(results, name, beside_baseline, labels),
        "## Device-wise Results",
        device_table(results, name, beside_baseline, labels),
    ]
    if "fine_tuning" in results:
        outcomes = results["fine_tuning"]
        parts += ["## Fine-Tuning per Device", own_models(outcomes), markdown(*fine_tuning_rows(outcomes))]
    if complexity is not None:
        title = "Comparison with the DCASE2025 Baseline and Limits" if beside_baseline else "Complexity"
        table = complexity_comparison(complexity, name, beside_baseline, results["macro_avg_acc"])
        parts += [f"## {title}", table, CHECKER_NOTE]
    if beside_baseline:
        parts.append(BASELINE_NOTE)
    return "\n\n".join(parts)
