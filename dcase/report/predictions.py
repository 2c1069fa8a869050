"""``<run>/predictions.csv``: a test's logits for every clip, and what follows from them.

    filename,scene_label,device_id,location,airport,bus,...,tram

A row is a clip; the last columns, one per scene, are its logits, with four decimals.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.data.tau22 import Clips
from dcase.errors import UserError, one_line
from dcase.files import replace_file

PREDICTIONS_CSV = "predictions.csv"
COLUMNS = ("filename", "scene_label", "device_id", "location")  # and one per scene


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of n test clips."""

    filenames: np.ndarray  # (n,) str, relative to the data folder
    scene: np.ndarray  # (n,) int64, the true one, in labels.scenes
    device: np.ndarray  # (n,) int64, in labels.devices
    location: np.ndarray  # (n,) str
    logits: np.ndarray  # (n, scenes) float64
    labels: Labels = TAU22_LABELS

    def __len__(self) -> int:
        return len(self.filenames)

    def select(self, rows: np.ndarray) -> "Predictions":
        columns = (self.filenames, self.scene, self.device, self.location, self.logits)
        return Predictions(*(column[rows] for column in columns), self.labels)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(n, scenes)"""
        x = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return x / x.sum(1, keepdims=True)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64, in labels.scenes"""
        return self.logits.argmax(1)

    @cached_property
    def correct(self) -> np.ndarray:
        """(n,) bool"""
        return self.predicted == self.scene

    @cached_property
    def confidence(self) -> np.ndarray:
        """(n,): the probability of the predicted scene."""
        return self.probabilities.max(1)

    @cached_property
    def loss(self) -> np.ndarray:
        """(n,): cross-entropy, natural logarithm. From the logits: a probability can be so small that it is 0."""
        shifted = self.logits - self.logits.max(1, keepdims=True)
        return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(self)), self.scene]

    @cached_property
    def confusion(self) -> np.ndarray:
        """(devices, scenes, scenes) int64: clips by device, true scene and predicted scene."""
        n, devices = len(self.labels.scenes), len(self.labels.devices)
        cell = (self.device * n + self.scene) * n + self.predicted
        return np.bincount(cell, minlength=devices * n * n).reshape(devices, n, n)


def of_clips(clips: Clips, logits: np.ndarray) -> Predictions:
    """Return the predictions of clips from their ``logits`` (n, scenes), rounded as they are written."""
    filenames, location = (
        np.array([value.decode() for value in column.tolist()]) for column in (clips.filenames, clips.location)
    )
    logits = np.round(np.asarray(logits, np.float64), 4)
    return Predictions(filenames, clips.scene, clips.device, location, logits, clips.labels)


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write the file. Raise `UserError` where that fails; the old file then stays."""
    names = {
        "filename": predictions.filenames,
        "scene_label": np.array(predictions.labels.scenes)[predictions.scene],
        "device_id": np.array(predictions.labels.devices)[predictions.device],
        "location": predictions.location,
    }
    table = pd.DataFrame(names | dict(zip(predictions.labels.scenes, predictions.logits.T, strict=True)))
    replace_file(path, lambda beside: table.to_csv(beside, index=False, float_format="%.4f", lineterminator="\n"))


def read_predictions(path: Path, labels: Labels = TAU22_LABELS) -> Predictions:
    """Read the file, of data with these labels. Raise `UserError`, naming it, where it is missing or is not what
    `write_predictions` writes."""
    again = "test again with test_only.py"
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(COLUMNS, str), keep_default_na=False)
        if tuple(table.columns) != (*COLUMNS, *labels.scenes):
            raise ValueError(f"its columns are not {', '.join((*COLUMNS, *labels.scenes))}")
        logits = table[list(labels.scenes)].to_numpy(np.float64)
        if not len(table) or not np.isfinite(logits).all():
            raise ValueError("a logit is not finite" if len(table) else "it has no clip")
        scene, device = _indices(table["scene_label"], labels.scenes), _indices(table["device_id"], labels.devices)
    except (OSError, ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read ({one_line(error)}): {again}") from error
    return Predictions(table["filename"].to_numpy(str), scene, device, table["location"].to_numpy(str), logits, labels)


def _indices(column: pd.Series, names: tuple[str, ...]) -> np.ndarray:
    found = column.map({name: i for i, name in enumerate(names)})
    if found.isna().any():
        raise ValueError(f"{column.name} {column[found.isna()].iloc[0]!r} is not one of {', '.join(names)}")
    return found.to_numpy(np.int64)
