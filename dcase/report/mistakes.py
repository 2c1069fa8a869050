"""What a model got wrong: the mistakes it was surest of, which scenes it mixes up on a device, and whose fault it is.

TAU22's devices have recorded at the same time and place: what is the same in two names but for the device is the same
second of sound. A clip that is right on most other devices was lost by the device; one that is wrong on most is hard.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcase.data.tau22 import DEVICES, SCENES
from dcase.report.predictions import Predictions


def most_confident(predictions: Predictions, n: int, device: int | None = None) -> list[int]:
    """Rows of the ``n`` mistakes with the highest confidence, at most one of a recording location, whose clips are
    alike; ``device``: of that one alone."""
    wrong = ~predictions.correct
    if device is not None:
        wrong &= predictions.device == device
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(-predictions.confidence[rows], kind="stable")]
    chosen: dict[str, int] = {}
    for row in rows.tolist():
        chosen.setdefault(predictions.location[row], row)
        if len(chosen) == n:
            break
    return list(chosen.values())


def same_sound(predictions: Predictions) -> list[list[int]]:
    """Of each clip, the rows of the same second on other devices."""
    together: dict[str, list[int]] = {}
    keys = []
    for row, (name, device) in enumerate(zip(predictions.filenames.tolist(), predictions.device.tolist(), strict=True)):
        stem, _, suffix = name.rpartition(".")[0].rpartition("-")
        keys.append(stem if suffix == DEVICES[device] else name)
        together.setdefault(keys[-1], []).append(row)
    return [[row for row in together[key] if row != i] for i, key in enumerate(keys)]


@dataclass(frozen=True)
class Blame:
    """The mistakes on one device that other devices have recorded too, in clips."""

    device: int  # most other devices are right: the device's
    sound: int  # most, or half, are wrong too: the sound's
    alone: int  # of the device's mistakes, those that no other device has recorded

    @property
    def share(self) -> float | None:
        """Of the mistakes that can be told, the device's."""
        known = self.device + self.sound
        return self.device / known if known else None


def blame(predictions: Predictions, others: list[list[int]], device: int) -> Blame:
    """``others``: of `same_sound`."""
    rows = np.flatnonzero(~predictions.correct & (predictions.device == device)).tolist()
    shares = [predictions.correct[others[row]].mean() for row in rows if others[row]]
    lost = sum(share > 0.5 for share in shares)
    return Blame(lost, len(shares) - lost, len(rows) - len(shares))


class Mixed(NamedTuple):
    """A scene that is taken for another, on some devices, and how often it is on the others."""

    true: str
    predicted: str
    n_clips: int  # taken for it
    of: int  # of the scene
    elsewhere: float | None  # the share on all other devices

    @property
    def share(self) -> float:
        return self.n_clips / self.of


def mixed_up(confusion: np.ndarray, others: np.ndarray | None, n: int) -> list[Mixed]:
    """The ``n`` confusions that cost most: by how many more clips than at the others' rate, where there are others.

    ``confusion`` (scenes, scenes) of the devices in question, and of the ``others``: true by predicted, in clips.
    """
    found = []
    for true, predicted in zip(*np.nonzero(confusion), strict=True):
        if true != predicted:
            elsewhere = None
            if others is not None and others[true].sum():
                elsewhere = float(others[true, predicted] / others[true].sum())
            clips, of = int(confusion[true, predicted]), int(confusion[true].sum())
            found.append(Mixed(SCENES[true], SCENES[predicted], clips, of, elsewhere))
    return sorted(found, key=lambda m: m.of * (m.elsewhere or 0) - m.n_clips)[:n]
