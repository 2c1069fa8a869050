"""Confidence intervals of a test's figures, by drawing recording locations anew.

Clips of one location sound alike, so that a test of thousands of clips knows only as much as its dozens of locations:
a location is drawn with all its clips. Every figure is a function of sums over clips, so a draw is a row of a matrix
product. Source: Field and Welsh, J. R. Statist. Soc. B 69(3), 2007 (of clusters); the interval is `expanded`.
"""

import math
from collections.abc import Hashable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dcase.data.tau22 import DEVICE_GROUPS, DEVICES, SCENES
from dcase.report.predictions import Predictions

DRAWS, SEED, LEVEL = 5000, 0, 0.95
FEWEST, FEW = 5, 20  # locations: with fewer there is no interval; it is a rough one
BINS = 15  # of confidence, equally wide


class Estimate(NamedTuple):
    """A figure and its interval; None where nothing can be said: no clip, or clips of fewer than `FEWEST` locations."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Of a difference: its interval leaves out 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


class Figures:
    """Every figure of a test: (1 + draws,), as it is and in each draw, by name.

    Names: "macro_avg_acc", "acc", "device_avg_acc", "loss", "calibration_error", "confidence" (the mean of it);
    ("scene", s), ("device", d), ("group", g): accuracies; ("gap", d): that of device d minus that of all others;
    ("scene", s, d): of scene s on device d; ("calibration_error", d), ("confidence", d).
    """

    def __init__(self, predictions: Predictions, draws: int = DRAWS, seed: int = SEED):
        p, self.draws = predictions, draws
        self.locations, location = np.unique(p.location, return_inverse=True)
        n, scenes, devices = len(self.locations), len(SCENES), len(DEVICES)
        anew = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
        times = np.vstack([np.ones((1, n)), anew])  # the first row: the test as it is

        def sums(cell: np.ndarray, shape: tuple[int, ...], values: np.ndarray | None = None) -> np.ndarray:
            """(1 + draws, *shape): over clips, by cell, of 1 or of their values."""
            size = int(np.prod(shape))
            by_location = np.bincount(location * size + cell, values, minlength=n * size).reshape(n, size)
            return (times @ by_location).reshape(-1, *shape)

        cell, shape = p.device * scenes + p.scene, (devices, scenes)
        total, correct = sums(cell, shape), sums(cell, shape, p.correct.astype(float))
        every, every_correct = total.sum((1, 2)), correct.sum((1, 2))
        by_scene = _ratio(correct.sum(1), total.sum(1))  # (1 + draws, scenes)
        by_device = _ratio(correct.sum(2), total.sum(2))
        bins = np.minimum((p.confidence * BINS).astype(int), BINS - 1)
        cell, shape = p.device * BINS + bins, (devices, BINS)
        clips, sure, right = (sums(cell, shape, v) for v in (None, p.confidence, p.correct.astype(float)))

        self._values: dict[Hashable, np.ndarray] = {
            "macro_avg_acc": _mean(by_scene),
            "acc": _ratio(every_correct, every),
            "device_avg_acc": _mean(by_device),
            "loss": _ratio(sums(np.zeros(len(p), int), (1,), p.loss)[:, 0], every),
            "calibration_error": _calibration_error(clips.sum(1), sure.sum(1), right.sum(1)),
            "confidence": _ratio(sure.sum((1, 2)), every),
        }
        for i, scene in enumerate(SCENES):
            self._values["scene", scene] = by_scene[:, i]
        for i, device in enumerate(DEVICES):
            self._values["device", device] = by_device[:, i]
            others = _ratio(every_correct - correct[:, i].sum(1), every - total[:, i].sum(1))
            self._values["gap", device] = by_device[:, i] - others
            self._values["calibration_error", device] = _calibration_error(clips[:, i], sure[:, i], right[:, i])
            self._values["confidence", device] = _ratio(sure[:, i].sum(1), total[:, i].sum(1))
            for j, scene in enumerate(SCENES):
                self._values["scene", scene, device] = _ratio(correct[:, i, j], total[:, i, j])
        for group, members in DEVICE_GROUPS.items():
            rows = [DEVICES.index(device) for device in members]
            self._values["group", group] = _ratio(correct[:, rows].sum((1, 2)), total[:, rows].sum((1, 2)))
        self._places = self._count_places(location, p)

    def _count_places(self, location: np.ndarray, p: Predictions) -> dict[Hashable, int]:
        """Locations that the clips of a figure come from."""
        there = np.zeros((len(self.locations), len(DEVICES), len(SCENES)), dtype=bool)
        there[location, p.device, p.scene] = True
        places: dict[Hashable, int] = {}
        for i, device in enumerate(DEVICES):
            for name in ("device", "gap", "calibration_error", "confidence"):
                places[name, device] = int(there[:, i].any(1).sum())
            for j, scene in enumerate(SCENES):
                places["scene", scene, device] = int(there[:, i, j].sum())
        for j, scene in enumerate(SCENES):
            places["scene", scene] = int(there[:, :, j].any(1).sum())
        for group, members in DEVICE_GROUPS.items():
            places["group", group] = int(there[:, [DEVICES.index(d) for d in members]].any((1, 2)).sum())
        return places

    def n_locations(self, *name: str) -> int:
        return self._places.get(_key(name), len(self.locations))

    def drawn(self, *name: str) -> np.ndarray:
        """A figure in each draw (draws,); NaN where a draw has no clip of it."""
        return self._values[_key(name)][1:]

    def __call__(self, *name: str) -> Estimate:
        """The estimate of ``name``: figures("macro_avg_acc"), figures("scene", "bus")."""
        return self._estimate(self._values[_key(name)], name)

    def minus(self, other: "Figures", *name: str) -> Estimate:
        """The difference to the same figure of another test of the same clips: both are drawn together."""
        return self._estimate(self._values[_key(name)] - other._values[_key(name)], name)

    def _estimate(self, values: np.ndarray, name: tuple[str, ...]) -> Estimate:
        if not np.isfinite(values[0]):
            return Estimate(None)
        drawn = values[1:][np.isfinite(values[1:])]  # a draw can lack a scene
        if self.n_locations(*name) < FEWEST or not len(drawn):
            return Estimate(float(values[0]))
        low, high = expanded(drawn, self.n_locations(*name))
        return Estimate(float(values[0]), float(low), float(high))


def _key(name: tuple[str, ...]) -> Hashable:
    return name if len(name) > 1 else name[0]


def expanded(drawn: np.ndarray, n: int) -> np.ndarray:
    """Ends (2, ...) of the interval of a figure from ``n`` locations, of its ``drawn`` values (draws, ...).

    Draws vary less than the figure does, by the square root of (n - 1) / n, and a percentile interval takes their
    deviation for known. So it is too narrow for few locations, and percentiles further out are taken: by as much as
    Student's t interval is wider than the draws' normal one. Of fewer than `FEWEST` locations these would lie beyond
    the lowest and highest draw, which are of one location alone.

    Source: the expanded percentile interval of Hesterberg, What Teachers Should Know About the Bootstrap, The American
    Statistician 69(4), 2015 (arXiv:1411.5279).
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))
    return np.quantile(drawn, [tail, 1 - tail], axis=0)


def _student(degrees: int) -> float:
    """The upper quantile of Student's t at `LEVEL`, off by 0.1 % at 5 degrees, by 1 % at 3. Source: Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.5."""
    x = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return x + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """(draws, n) -> (draws,), of what is there."""
    there = np.isfinite(values)
    return _ratio(np.where(there, values, 0).sum(1), there.sum(1).astype(float))


def _calibration_error(clips: np.ndarray, sure: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Expected calibration error (draws,) from sums by bin of confidence (draws, bins). Source: Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017."""
    return _ratio(np.abs(sure - right).sum(1), clips.sum(1))


class Bin(NamedTuple):
    """Clips whose confidence is between ``low`` and ``high``."""

    low: float
    high: float
    n_clips: int
    confidence: float | None  # mean
    acc: float | None


def reliability(predictions: Predictions) -> list[Bin]:
    """What a reliability diagram shows, in `BINS` bins."""
    p = predictions
    bins = np.minimum((p.confidence * BINS).astype(int), BINS - 1)
    clips = np.bincount(bins, minlength=BINS)
    sure, right = (np.bincount(bins, values, minlength=BINS) for values in (p.confidence, p.correct))
    return [
        Bin(i / BINS, (i + 1) / BINS, int(n), sure[i] / n if n else None, right[i] / n if n else None)
        for i, n in enumerate(clips.tolist())
    ]
