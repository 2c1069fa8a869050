"""Confidence intervals of a test's figures, by drawing recording locations with replacement.

Clips of one location sound alike, so a test of thousands of clips knows only as much as its dozens of locations: a
location is drawn with all its clips. Every figure is a function of sums over clips, so a draw is a row of a matrix
product. Source: Field and Welsh, J. R. Statist. Soc. B 69(3), 2007 (on clusters); the interval is `expanded`.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dcase.report.predictions import Predictions

DRAWS, SEED, LEVEL = 5000, 0, 0.95
FEWEST, FEW = 5, 20  # locations: with fewer there is no interval; it is a rough one
FEWEST_CLEAR = 10  # locations: with fewer no difference is called clear
BINS = 15  # of confidence, equally wide
EVERY = slice(None)


class Estimate(NamedTuple):
    """A figure and its interval; None where nothing can be said: no clip, or clips of fewer than `FEWEST` locations."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference excludes 0. One without a width says only that no draw differs."""
        return self.low is not None and self.low < self.high and (self.low > 0 or self.high < 0)


class OfFew(Estimate):
    """An estimate from fewer than `FEWEST_CLEAR` locations: with some luck all of them favour one side."""

    clear = False


class Figures:
    """Every figure of a test, as it is and in each draw, by name.

    Names: "macro_avg_acc", "acc", "device_avg_acc", "loss", "calibration_error", "confidence" (its mean);
    ("scene", s), ("device", d), ("group", g), ("scene", s, d): accuracies, the last of scene s on device d;
    ("gap", d): the accuracy of device d minus that of all others; ("calibration_error", d), ("confidence", d).
    """

    def __init__(self, predictions: Predictions, draws: int = DRAWS, seed: int = SEED):
        p, self.draws, self.labels = predictions, draws, predictions.labels
        self.locations, location = np.unique(p.location, return_inverse=True)
        n, scenes, devices = len(self.locations), len(self.labels.scenes), len(self.labels.devices)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
        times = np.vstack([np.ones((1, n)), drawn])  # the first row: the test as it is

        def sums(cell: np.ndarray, shape: tuple[int, ...], values: np.ndarray | None = None) -> np.ndarray:
            """Return the sums (1 + draws, *shape) over the clips of each cell, of 1 or of ``values``."""
            size = int(np.prod(shape))
            by_location = np.bincount(location * size + cell, values, minlength=n * size).reshape(n, size)
            return (times @ by_location).reshape(-1, *shape)

        right = p.correct.astype(float)
        cell, shape = p.device * scenes + p.scene, (devices, scenes)
        self._total, self._correct = sums(cell, shape), sums(cell, shape, right)
        self._loss = sums(np.zeros(len(p), int), (1,), p.loss)[:, 0]
        cell, shape = p.device * BINS + _bins(p), (devices, BINS)
        self._clips, self._sure, self._right = (sums(cell, shape, values) for values in (None, p.confidence, right))
        self._there = np.zeros((n, devices, scenes), dtype=bool)
        self._there[location, p.device, p.scene] = True
        self._estimates: dict[tuple[str, ...], Estimate] = {}  # pages show the same figure in several places

    def n_locations(self, *name: str) -> int:
        """Return how many locations the clips of a figure come from."""
        devices, scenes = self._cells(name)
        return int(self._there[:, devices, scenes].reshape(len(self.locations), -1).any(1).sum())

    @property
    def locations_of_scenes(self) -> list[int]:
        """The fewest and the most locations of a scene that has clips; one number where they are equal."""
        found = {n for scene in self.labels.scenes if (n := self.n_locations("scene", scene))}
        return sorted({min(found), max(found)})

    def drawn(self, *name: str) -> np.ndarray:
        """Return a figure in each draw (draws,); NaN where a draw has no clip of it."""
        return self._values(name)[1:]

    def __call__(self, *name: str) -> Estimate:
        """Return the estimate of ``name``: figures("macro_avg_acc"), figures("scene", "bus")."""
        if name not in self._estimates:
            self._estimates[name] = self._estimate(self._values(name), name)
        return self._estimates[name]

    def minus(self, other: "Figures", *name: str) -> Estimate:
        """Return the difference from the same figure of another test of the same clips: both are drawn together."""
        return self._estimate(self._values(name) - other._values(name), name)

    def _estimate(self, values: np.ndarray, name: tuple[str, ...]) -> Estimate:
        if not np.isfinite(values[0]):
            return Estimate(None)
        n = self.n_locations(*name)
        drawn = values[1:][np.isfinite(values[1:])]
        if n < FEWEST or not len(drawn):
            return Estimate(float(values[0]))
        kind = OfFew if n < FEWEST_CLEAR else Estimate
        return kind(float(values[0]), *expanded(drawn, n).tolist())

    def _values(self, name: tuple[str, ...]) -> np.ndarray:
        """Return a figure (1 + draws,), as it is and in each draw."""
        figure, (devices, scenes) = name[0], self._cells(name)
        total, correct = self._total, self._correct
        if figure in ("calibration_error", "confidence"):
            clips, sure, right = (
                x[:, devices].reshape(len(x), -1, BINS).sum(1) for x in (self._clips, self._sure, self._right)
            )
            # Expected calibration error. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
            error = np.abs(sure - right) if figure == "calibration_error" else sure
            return _ratio(error.sum(1), clips.sum(1)).clip(0, 1)  # against rounding
        if figure == "loss":
            return _ratio(self._loss, total.sum((1, 2)))
        if figure in ("macro_avg_acc", "device_avg_acc"):
            over = 1 if figure == "macro_avg_acc" else 2
            of_each = _ratio(correct.sum(over), total.sum(over))
            there = np.isfinite(of_each)
            return _ratio(np.where(there, of_each, 0).sum(1), there.sum(1).astype(float))
        ours, clips = (x[:, devices, scenes].reshape(len(x), -1).sum(1) for x in (correct, total))
        if figure == "gap":
            return _ratio(ours, clips) - _ratio(correct.sum((1, 2)) - ours, total.sum((1, 2)) - clips)
        return _ratio(ours, clips)

    def _cells(self, name: tuple[str, ...]) -> tuple[object, object]:
        """Return indices of the devices and of the scenes that a figure is about."""
        (figure, *of), labels = name, self.labels
        if figure == "scene":
            return [labels.devices.index(d) for d in of[1:]] or EVERY, labels.scenes.index(of[0])
        if figure == "group":
            return [labels.devices.index(d) for d in labels.device_groups[of[0]]], EVERY
        return labels.devices.index(of[0]) if of else EVERY, EVERY


def _bins(predictions: Predictions) -> np.ndarray:
    return np.minimum((predictions.confidence * BINS).astype(int), BINS - 1)


def expanded(drawn: np.ndarray, n: int) -> np.ndarray:
    """Return the interval's ends (2, ...) for a figure of ``n`` locations, from its ``drawn`` values (draws, ...).

    Draws vary less than the figure does, by the square root of (n - 1) / n, and a percentile interval takes their
    deviation as known. It is too narrow for few locations, so percentiles further out are taken: by as much as
    Student's t interval is wider than the draws' normal one. For fewer than `FEWEST` locations these would lie beyond
    the lowest and highest draw, which consist of one location.

    Source: the expanded percentile interval of Hesterberg, What Teachers Should Know About the Bootstrap, The American
    Statistician 69(4), 2015 (arXiv:1411.5279).
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student(n - 1))
    return np.quantile(drawn, [tail, 1 - tail], axis=0)


def _student(degrees: int) -> float:
    """Return the upper quantile of Student's t at `LEVEL`, off by 0.1 % at 5 degrees, by 1 % at 3. Source: Abramowitz
    and Stegun, Handbook of Mathematical Functions, 26.7.5."""
    x = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96, (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


class Bin(NamedTuple):
    """Clips whose confidence is between ``low`` and ``high``."""

    low: float
    high: float
    n_clips: int
    confidence: float | None  # mean
    acc: float | None


def reliability(predictions: Predictions) -> list[Bin]:
    """Return what a reliability diagram shows, in `BINS` bins."""
    bins = _bins(predictions)
    clips = np.bincount(bins, minlength=BINS)
    sure, right = (np.bincount(bins, x, minlength=BINS) for x in (predictions.confidence, predictions.correct))
    return [
        Bin(i / BINS, (i + 1) / BINS, int(n), sure[i] / n if n else None, right[i] / n if n else None)
        for i, n in enumerate(clips.tolist())
    ]
