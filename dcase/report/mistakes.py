"""A model's mistakes: the most confident ones, the scenes that a device confuses, and whether the device is the cause.

TAU22's devices recorded at the same time and place: names that are equal but for the device are the same second of
sound. Where a clip is right on most other devices, the device caused the mistake; where it is wrong on most, the sound
is hard.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcase.data.labels import SCENES
from dcase.report.predictions import Predictions


def most_confident(predictions: Predictions, n: int, device: int | None = None) -> list[int]:
    """Return the rows of the ``n`` mistakes with the highest confidence, of all devices or of one."""
    wrong = ~predictions.correct
    return surest(predictions, wrong if device is None else wrong & (predictions.device == device), n)


def surest(predictions: Predictions, among: np.ndarray, n: int) -> list[int]:
    """Return the ``n`` rows ``among`` (clips,) bool with the highest confidence, at most one of a recording location,
    whose clips are alike."""
    rows = np.flatnonzero(among)
    chosen: dict[str, int] = {}
    for row in rows[np.argsort(-predictions.confidence[rows], kind="stable")].tolist():
        chosen.setdefault(predictions.location[row], row)
    return list(chosen.values())[:n]


def same_sound(predictions: Predictions) -> list[list[int]]:
    """Return, for each clip, the rows of the same second on other devices."""
    together: dict[str, list[int]] = {}
    keys = []
    for row, (name, device) in enumerate(zip(predictions.filenames.tolist(), predictions.device.tolist(), strict=True)):
        stem, _, suffix = name.rpartition(".")[0].rpartition("-")
        keys.append(stem if suffix == predictions.labels.devices[device] else name)
        together.setdefault(keys[-1], []).append(row)
    return [[row for row in together[key] if row != i] for i, key in enumerate(keys)]


class Blame(NamedTuple):
    """The causes of the mistakes on one device, in clips."""

    device: int  # most other devices are right
    sound: int  # at least half of the other devices are wrong too
    alone: int  # no other device recorded the sound

    @property
    def known(self) -> int:
        return self.device + self.sound

    @property
    def share(self) -> float | None:
        """The device's share of the mistakes whose cause is known."""
        return self.device / self.known if self.known else None


def blame(predictions: Predictions, others: list[list[int]], device: int) -> Blame:
    """``others``: from `same_sound`."""
    rows = np.flatnonzero(~predictions.correct & (predictions.device == device)).tolist()
    shares = [predictions.correct[others[row]].mean() for row in rows if others[row]]
    lost = sum(share > 0.5 for share in shares)
    return Blame(lost, len(shares) - lost, len(rows) - len(shares))


class Mixed(NamedTuple):
    """A scene that is predicted as another on some devices."""

    true: str
    predicted: str
    n_clips: int  # so predicted
    of: int  # of the scene
    elsewhere: float | None  # the share on all other devices

    @property
    def share(self) -> float:
        return self.n_clips / self.of

    @property
    def more(self) -> float | None:
        return None if self.elsewhere is None else self.share - self.elsewhere


def mixed_up(confusion: np.ndarray, others: np.ndarray | None, n: int, scenes: Sequence[str] = SCENES) -> list[Mixed]:
    """Return the ``n`` most costly confusions: by clips beyond those at the others' rate, where there are others.

    ``confusion`` (scenes, scenes) of the devices in question, and of the ``others``: true by predicted, in clips.
    """
    found = []
    for true, predicted in zip(*np.nonzero(confusion), strict=True):
        if true != predicted:
            known = others is not None and others[true].sum() > 0
            elsewhere = float(others[true, predicted] / others[true].sum()) if known else None
            clips, of = int(confusion[true, predicted]), int(confusion[true].sum())
            found.append(Mixed(scenes[true], scenes[predicted], clips, of, elsewhere))
    return sorted(found, key=lambda m: m.of * (m.elsewhere or 0) - m.n_clips)[:n]
