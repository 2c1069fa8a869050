"""What W&B shows of a test beside its metrics: charts, tables, complexity and the most confident mistakes.

No recording is uploaded: a mistake is shown as its log-mel.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pytorch_lightning.loggers import WandbLogger

from dcase import report
from dcase.errors import UserError
from dcase.report.mistakes import most_confident
from dcase.report.predictions import Predictions
from dcase.report.sounds import Recordings

MISTAKES = 12  # at most


def show(
    logger: WandbLogger,
    results: dict,
    name: str,
    folder: Path,
    predictions: Predictions,
    recordings: Callable[[], Recordings],
) -> None:
    """Log the charts of ``folder``, tables and mistakes. ``recordings`` opens the clips."""
    import wandb

    for chart in (report.CONFUSION_PNG, report.DEVICES_PNG):
        logger.log_image(key=f"test/{chart.removesuffix('.png')}", images=[str(folder / chart)])
    for table in ("scene_acc", "device_acc"):
        columns, values = zip(*results[table].items(), strict=True)
        row = [name, *values, results["macro_avg_acc"]]
        logger.log_table(key=f"test/{table}_table", columns=["model", *columns, "macro_avg_acc"], data=[row])
    bars = [[device, accuracy] for device, accuracy in results["device_acc"].items() if accuracy is not None]
    bars = wandb.Table(columns=["device", "accuracy"], data=bars)
    scenes = {"y_true": predictions.scene.tolist(), "preds": predictions.predicted.tolist()}
    logger.experiment.log(
        {
            "test/confusion_matrix": wandb.plot.confusion_matrix(**scenes, class_names=list(predictions.labels.scenes)),
            "test/device_bars": wandb.plot.bar(bars, "device", "accuracy", title="Accuracy per device"),
        }
    )
    measured = results["complexity"]
    figures = ("params", "total_param_bytes", "macs", "torchinfo_macs", "within_limits")
    logger.experiment.summary.update({f"complexity/{figure}": measured[figure] for figure in figures})
    try:
        logger.experiment.log({"test/mistakes": mistakes(predictions, recordings())})
    except UserError as error:  # such as a pack that no longer fits; what is above is logged
        print(f"W&B gets no example mistakes: {error}")


def mistakes(predictions: Predictions, recordings: Recordings):
    """Return W&B's table of the most confident mistakes, at most one of a recording location."""
    import wandb

    table = wandb.Table(columns=["log-mel", "file", "device", "scene", "predicted", "confidence"])
    scenes, devices = predictions.labels.scenes, predictions.labels.devices
    for row in most_confident(predictions, MISTAKES):
        filename = str(predictions.filenames[row])
        scene, predicted = scenes[predictions.scene[row]], scenes[predictions.predicted[row]]
        device, confidence = devices[predictions.device[row]], float(predictions.confidence[row])
        table.add_data(_picture(filename, recordings), filename, device, scene, predicted, confidence)
    return table


def _picture(filename: str, recordings: Recordings):
    """Return W&B's image of a clip's log-mel, low mel bins at the bottom; None where the clip cannot be read."""
    import wandb

    try:
        log_mel = recordings.log_mel(recordings.read(filename))[::-1]  # (n_mels, frames)
    except UserError:
        return None
    low, high = np.percentile(log_mel, (1, 99))
    grey = np.clip((log_mel - low) / max(high - low, 1e-6), 0, 1)
    return wandb.Image(np.round(255 * grey).astype(np.uint8))
