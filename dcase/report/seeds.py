"""Runs that differ in nothing but their seed: mean and deviation over them."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from dcase.report.run_files import Finished

# Where a run was made and what it is called; and the general model of stage 2, which has a seed of its own.
_ALIKE = {"run", "machine", "resume", "ckpt_id", "ckpt_path"}
_ALIKE_WITHIN = {"fit": {"seed", "compile"}, "data": {"dataset_dir", "read_from", "pack_dir"}}


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
    config = run.training.config
    if not config:
        return run.id
    kept = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in _ALIKE_WITHIN.get(name, ())}
        if name not in _ALIKE:
            kept[name] = value
    tested = run.config.get("storage")  # a test may store in other bits than the training did
    return json.dumps([kept, tested, run.results["data"]], sort_keys=True)
