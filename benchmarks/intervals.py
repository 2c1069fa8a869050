"""Measure how often the report's 95 % intervals contain the true figure, by the number of recording locations.

    python benchmarks/intervals.py [--tests 1000]

Tests are made up. A scene's accuracy is 55 to 90 %; a location's is drawn around its scene's (deviation 0.2), and it
has 10 to 39 clips. The table shows the percentile interval and the page's interval of the same draws.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcase import cli
from dcase.data.tau22 import DEVICES, SCENES
from dcase.errors import run
from dcase.report import markdown
from dcase.report.bootstrap import Figures
from dcase.report.predictions import Predictions

LOCATIONS = (6, 10, 30, 200)
DRAWS = 1000  # fewer than the page's: the last digit of the ends does not matter
SPREAD = 4  # a + b of the beta distribution of the locations' accuracies
FIGURES = {
    "macro-average accuracy": ("macro_avg_acc",),
    "accuracy over all clips": ("acc",),
    "accuracy on one device": ("device", "a"),
}


@dataclass(frozen=True)
class IntervalsBenchmark:
    tests: int = 1000
    """Made-up tests for each number of locations."""


def made_up_test(n: int, rng: np.random.Generator) -> tuple[Predictions, float]:
    """Return a test of ``n`` locations and its true accuracy, which is that of scenes, of clips and of each device."""
    scenes = min(n, len(SCENES))
    truth = np.linspace(0.55, 0.9, scenes)
    scene_of = np.arange(n) % scenes
    share = rng.beta(SPREAD * truth[scene_of], SPREAD * (1 - truth[scene_of]))
    place = np.repeat(np.arange(n), rng.integers(10, 40, n))
    scene, clips = scene_of[place], np.arange(len(place))
    predicted = np.where(rng.random(len(place)) < share[place], scene, (scene + 1) % len(SCENES))
    logits = 2.0 * (predicted[:, None] == np.arange(len(SCENES)))
    names, places = np.array([f"c{i}" for i in clips]), np.array([f"l{i:04d}" for i in place])
    return Predictions(names, scene, clips % len(DEVICES), places, logits), truth.mean()


def coverage(n: int, tests: int) -> dict[str, tuple[float, float]]:
    """Return the coverage of each figure in percent: by the percentile interval, and by the page's."""
    rng = np.random.default_rng(n)
    holds = {figure: [] for figure in FIGURES}
    for seed in tqdm(range(tests), desc=f"{n} locations", leave=False):
        predictions, truth = made_up_test(n, rng)
        figures = Figures(predictions, DRAWS, seed)
        for figure, name in FIGURES.items():
            ends = np.nanquantile(figures.drawn(*name), [0.025, 0.975]), figures(*name)[1:]
            holds[figure].append([low - 1e-9 <= truth <= high + 1e-9 for low, high in ends])
    return {figure: tuple(100 * np.mean(held, 0)) for figure, held in holds.items()}


def main() -> None:
    tests = cli.parse(IntervalsBenchmark, __doc__).tests
    measured = [coverage(n, tests) for n in LOCATIONS]
    rows = [[figure, *("{:.1f} -> {:.1f}".format(*of[figure]) for of in measured)] for figure in FIGURES]
    print(markdown(["Percentile -> Page, in percent", *(f"{n} locations" for n in LOCATIONS)], rows))


if __name__ == "__main__":
    run(main)
