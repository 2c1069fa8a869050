"""What a test leaves in a run's folder: predictions.csv, results.json, tables, charts and the page."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dcase.data.loading import Source
from dcase.errors import command, one_line
from dcase.files import write_json
from dcase.report import wandb_media
from dcase.report.charts import CONFUSION_PNG, DEVICES_PNG
from dcase.report.page import write_page
from dcase.report.predictions import PREDICTIONS_CSV, of_clips, write_predictions
from dcase.report.run_files import read_finished
from dcase.report.sounds import Recordings
from dcase.report.summary import write_report
from dcase.runs.config import EvalConfig
from dcase.runs.folder import Run


def write_test(
    run: Run, config: EvalConfig, source: Source, results: dict, logits: np.ndarray
) -> tuple[dict[str, Path], Callable]:
    """Write and show the results of a test; ``logits`` (n, scenes) of ``source.test``.

    Returns what loggers show (`runs.loggers.show_test`): charts by name, and a function of W&B's logger.
    """
    predictions = of_clips(source.test, logits)
    write_predictions(predictions, run.folder / PREDICTIONS_CSV)
    write_json(run.folder / "results.json", results)  # last: it marks the test as done
    name = config.run.experiment_name or config.model.model
    folder = run.folder / "report"
    note, cost = results["note"], results["complexity"]
    report = write_report(results, folder, name, note, source.comparable, cost, source.labels)
    print("\n" + report)
    print(f"Figures: {run.folder / 'results.json'}, {run.folder / PREDICTIONS_CSV}")
    make_page(run, source.folder, config.run.report_audio)
    charts = {f"test/{chart.removesuffix('.png')}": folder / chart for chart in (CONFUSION_PNG, DEVICES_PNG)}
    recordings = partial(Recordings, source.folder, config.data, config.logmel)
    return charts, lambda wandb: wandb_media.show(wandb, results, name, folder, predictions, recordings)


def make_page(run: Run, folder: Path, with_audio: bool) -> None:
    """Write the run's page and print its path. A page that fails to render does not fail the test."""
    try:
        print(f"Page: {write_page(read_finished(run.folder), folder, with_audio)}")
    except Exception as error:
        again = command("python", "-m", "dcase.report", run.id, "--project_name", run.folder.parent)
        print(f"The report's page could not be made ({one_line(error)}): {again} tries again")
