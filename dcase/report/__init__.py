"""What the user sees of a test: tables, charts, and a page per run.

    report.md, confusion.png, devices.png    from `summary.write_report`: aligned Markdown, which is printed too
    index.html                               from `page`: plain files are enough (``python -m dcase.report RUN_ID``)

Everything starts from a ``results`` dict, the content of ``results.json`` (see `dcase.model.metrics`):
``macro_avg_acc``, ``acc``, ``loss``, ``scene_acc``, ``device_acc``, ``device_group_acc``, ``n_clips`` and ``confusion``
(rows: true scene, columns: predicted scene, in clips). Accuracies are fractions of 1, and None where there is no clip:
tables and charts show that as "-", never as 0. They print percent. The page also needs ``predictions.csv``, every test
clip's logits.

The DCASE baseline's published rows stand beside ours only where the caller says that the data are TAU22.
"""

from dcase.report.baseline import BASELINE, BASELINE_NOTE, CHECKER_NOTE
from dcase.report.charts import CONFUSION_PNG, DEVICES_PNG, confusion_png, device_png
from dcase.report.summary import write_report
from dcase.report.tables import class_table, complexity_comparison, device_table, markdown

__all__ = [
    "BASELINE",
    "BASELINE_NOTE",
    "CHECKER_NOTE",
    "CONFUSION_PNG",
    "DEVICES_PNG",
    "class_table",
    "complexity_comparison",
    "confusion_png",
    "device_png",
    "device_table",
    "markdown",
    "write_report",
]
