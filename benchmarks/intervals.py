"""How often the report's 95 % intervals hold the truth, by the number of recording locations.

    python benchmarks/intervals.py [--tests 1000]

Tests are made up: scenes are right in 55 to 90 % of all places, a place has its own share around its scene's
(deviation 0.2), and 10 to 39 clips. Beside the page's interval stands the percentile interval of the same draws.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dcase.data.tau22 import DEVICES, SCENES
from dcase.report import markdown
from dcase.report.bootstrap import Figures
from dcase.report.predictions import Predictions

LOCATIONS = (6, 10, 30, 200)
DRAWS = 1000  # fewer than the page's: it is the ends' place that is asked for, not their last digit
SPREAD = 4  # a + b of the places' beta distribution
FIGURES = {
    "macro-average accuracy": ("macro_avg_acc",),
    "accuracy over all clips": ("acc",),
    "accuracy on one device": ("device", "a"),
}


def made_up_test(n: int, rng: np.random.Generator) -> tuple[Predictions, float]:
    """A test of ``n`` locations, and the accuracy that it estimates: of scenes, of clips and of each device alike."""
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
    """Of each figure, in percent: of the percentile interval, and of the page's."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=1000, help="made-up tests for each number of locations")
    tests = parser.parse_args().tests
    measured = [coverage(n, tests) for n in LOCATIONS]
    rows = [[figure, *("{:.1f} -> {:.1f}".format(*of[figure]) for of in measured)] for figure in FIGURES]
    print(markdown(["Percentile -> Page, in percent", *(f"{n} locations" for n in LOCATIONS)], rows))


if __name__ == "__main__":
    main()
