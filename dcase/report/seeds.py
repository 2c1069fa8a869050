"""Runs that differ in nothing but their seed: mean and deviation over them."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from dcase.report.alike import configuration, flat
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
    return json.dumps([alike, tested, run.results["data"]], sort_keys=True)
