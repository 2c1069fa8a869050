"""Runs that differ only in their seed, as one line of a table: mean and deviation over seeds."""

import json
import statistics
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcase.errors import UserError
from dcase.report.run_files import Finished, read_unfinished
from dcase.runs.config import FREE_ON_RESUME
from dcase.runs.folder import RunConfig, find_run, run_of

# Flags that change no figure (or only by rounding), and names. The number of processes does count.
NO_MATTER = (FREE_ON_RESUME - {"devices", "num_nodes"}) | {"seeds", *RunConfig.__dataclass_fields__}
_OTHER_RUNS = ("ckpt_id", "init_from")  # flags that name another run, which has its own seed


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    runs: list[Finished]

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def tested_on(self) -> tuple[str, int]:
        return self.runs[0].tested_on

    @property
    def ids(self) -> list[str]:
        return [run.id for run in self.runs]

    @property
    def n_seeds(self) -> int:
        return len(set(map(seeds, self.runs)))

    def values(self, place: str) -> list[float | None]:
        """Return a figure (see `Finished.figure`) per seed: the mean of a seed's runs, as repeating a run tells nothing
        about other seeds."""
        values = [run.figure(place) for run in self.runs]
        if None in values:
            return values
        by_seed: dict[Hashable, list[float]] = {}
        for run, value in zip(self.runs, values, strict=True):
            by_seed.setdefault(seeds(run), []).append(value)
        return [sum(of_seed) / len(of_seed) for of_seed in by_seed.values()]

    def mean(self, place: str) -> float | None:
        """Return the mean over seeds; None where a run has no value."""
        values = self.values(place)
        return None if None in values else round(statistics.fmean(values), 9)  # else rounding would decide ties

    def deviation(self, place: str) -> float | None:
        """Return the sample deviation over seeds; None for a single seed."""
        values = self.values(place)
        return None if None in values or len(values) < 2 else statistics.stdev(values)


def grouped(runs: Sequence[Finished]) -> list[Group]:
    """Return the runs grouped by test data and configuration, in the order of each group's first run."""
    groups: dict[tuple, list[Finished]] = {}
    for run in runs:
        key = configuration(run) if run.config else run.id  # a run without config.json stands alone
        groups.setdefault((run.tested_on, key), []).append(run)
    return [Group(together) for together in groups.values()]


def configuration(run: Finished) -> str:
    """Return a text that is equal for runs that differ only in their seed and in those of the runs they start from."""
    counted = {name: value for name, value in run.flags.items() if name not in NO_MATTER | {"seed"}}
    if run.trained_by:  # whose flags are here too; which of its files was tested matters
        tested = Path(run.flags["ckpt_path"]).absolute()
        if tested.is_relative_to(folder := run_of(run.flags["ckpt_path"]).folder):
            counted["ckpt_path"] = str(tested.relative_to(folder))
    return json.dumps(counted | {name: configuration(other) for name, other in _started_from(run)}, sort_keys=True)


def seeds(run: Finished) -> Hashable:
    """Return the seeds of the run and of the runs it starts from; its id where they are not known."""
    return (run.seed, *(seeds(other) for _, other in _started_from(run))) if run.config else run.id


def _started_from(run: Finished) -> list[tuple[str, Finished]]:
    """Return the flags that name another run, each with that run. A run that is gone is left out: its id must do."""
    found = []
    for name in _OTHER_RUNS:
        if run.flags.get(name):
            with suppress(UserError):
                other = find_run(str(run.training.folder.parent), run.flags[name], f"--{name}")
                found.append((name, read_unfinished(other.folder)))
    return [(name, other) for name, other in found if other.config]
