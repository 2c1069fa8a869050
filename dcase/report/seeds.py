"""Runs that differ in nothing but their seed: mean and deviation over them."""

import json
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from dcase.report.alike import configuration, flat, seeds
from dcase.report.run_files import Finished


class Spread(NamedTuple):
    mean: float
    deviation: float | None  # of the sample; None of one run alone

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """None where a run has no value."""
        if any(value is None for value in values):
            return None
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def per_seed(values: Sequence[float | None], seeds: Sequence[Hashable]) -> list[float | None]:
    """A value per seed: of runs of one seed, their mean, as a run that is repeated tells nothing of other seeds."""
    if None in values:
        return list(values)
    by_seed: dict[Hashable, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        by_seed.setdefault(seed, []).append(value)
    return [sum(of_seed) / len(of_seed) for of_seed in by_seed.values()]


def seeds_of(run: Finished) -> Hashable:
    """What tells a run from others of its configuration."""
    training = run.training
    return seeds(flat(training.config), str(training.folder.parent)) if training.config else run.id


def by_configuration(runs: Sequence[Finished]) -> list[list[Finished]]:
    """The runs in groups of one configuration, in their order. A run without config.json is alone."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    return list(groups.values())


def _key(run: Finished) -> str:
    training = run.training
    if not training.config:
        return run.id
    alike = configuration(flat(training.config), str(training.folder.parent))
    tested = run.config.get("storage")  # a test may store in other bits than the training did
    return json.dumps([alike, tested, run.tested_on], sort_keys=True)
