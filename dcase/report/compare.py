"""Runs side by side on the terminal.

Runs that differ in nothing but their seed stand together, as a mean and the deviation over seeds. The best value of
each figure is marked, and differences are to the first line; neither between runs that were tested on different clips.
"""

import csv
import io
import json
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcase.data.tau22 import DEVICE_GROUPS, DEVICES, SCENES
from dcase.errors import UserError, one_line
from dcase.files import replace_file
from dcase.report import markdown
from dcase.report.alike import NO_MATTER, configuration, flags_of, seeds
from dcase.report.seeds import per_seed
from dcase.runs.folder import Run, find_run, kind_of

MAX_COLUMNS = 8  # of the table of scenes and devices, which has a column for each line of the first one
COUNTS = {"size": "complexity/total_param_bytes", "macs": "complexity/macs"}  # less is better
GROUPS = {name: f"device_group_acc/{name}" for name in DEVICE_GROUPS}
FIGURES = {"macro_avg_acc": "macro_avg_acc", **GROUPS, **COUNTS}  # of the first table: name -> place in results.json
DETAILS = {name: f"scene_acc/{name}" for name in SCENES} | {name: f"device_acc/{name}" for name in DEVICES}


@dataclass(frozen=True)
class Finished:
    """A run that has been tested."""

    run: Run
    kind: str  # `runs.kind_of`
    flags: dict  # the whole configuration, flat
    commit: str  # of the code, short; "-" where it is not known
    results: dict
    seeds: Hashable  # `alike.seeds`

    @property
    def name(self) -> str:
        return self.flags["experiment_name"] or self.flags["model"]

    @property
    def tested_on(self) -> tuple[str | None, int | None]:
        """The data, and how many clips. Runs where it is not the same cannot be compared."""
        return self.results.get("data"), self.results.get("n_clips")

    def figure(self, place: str) -> float | None:
        """One of results.json's: "macro_avg_acc", "scene_acc/bus", ..."""
        part, _, name = place.partition("/")
        return self.results[part][name] if name else self.results[part]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone: a line of the tables."""

    runs: list[Finished]

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def kind(self) -> str:
        return self.runs[0].kind

    @property
    def ids(self) -> str:
        return " ".join(finished.run.id for finished in self.runs)

    @property
    def tested_on(self) -> tuple[str | None, int | None]:
        return self.runs[0].tested_on

    @property
    def n_seeds(self) -> int:
        return len({finished.seeds for finished in self.runs})

    def values(self, place: str) -> list[float | None]:
        """One per seed."""
        found = [finished.figure(place) for finished in self.runs]
        return per_seed(found, [finished.seeds for finished in self.runs])

    def mean(self, place: str) -> float | None:
        values = self.values(place)
        return None if None in values else round(statistics.fmean(values), 9)  # else ties would be decided by roundings

    def deviation(self, place: str) -> float:
        """Of the sample. For more than one seed."""
        return statistics.stdev(self.values(place))

    def flag(self, name: str) -> str:
        """Its value, or the values of all runs."""
        values = [_shown(finished.flags.get(name, "-")) for finished in self.runs]
        return values[0] if len(set(values)) == 1 else ", ".join(values)


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Reading


def read_finished(project_name: str, run_id: str) -> Finished:
    """Raises `UserError`, in one line, where there is no such run, or it has no results."""
    found = find_run(project_name, run_id, "run")
    flags, kind = flags_of(found), kind_of(found.read_config())
    path = found.folder / "results.json"
    if not path.is_file() and kind == "test":
        again = f"run test_only.py --ckpt_path {flags['ckpt_path']} again; {found.folder}/ can be deleted"
        raise UserError(f"test {run_id} has no results.json: it is not finished, and cannot go on: {again}")
    if not path.is_file():
        raise UserError(f"run {run_id} has no results.json: it is not finished (--resume it), or only trains a share")
    try:
        results = json.loads(path.read_text())
        finished = Finished(found, kind, flags, (found.commit() or "-")[:7], results, seeds(flags, project_name))
        for place in (*FIGURES.values(), *DETAILS.values()):
            finished.figure(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): test the run again with test_only.py") from error
    return finished


def read_all(project_name: str, run_ids: Sequence[str]) -> tuple[list[Finished], list[str]]:
    """The runs that have results, and a line about each that has not."""
    finished, said = [], []
    for run_id in dict.fromkeys(run_ids):
        try:
            finished.append(read_finished(project_name, run_id))
        except UserError as error:
            said.append(str(error))
    return finished, said


def grouped(runs: Sequence[Finished], project_name: str) -> list[Group]:
    """Runs by what they differ in beside their seed, in the order of their first ones."""
    groups: dict[tuple, list[Finished]] = {}
    for finished in runs:
        key = finished.tested_on, configuration(finished.flags, project_name)
        groups.setdefault(key, []).append(finished)
    return [Group(together) for together in groups.values()]


# Showing


def overview(groups: Sequence[Group]) -> str:
    """Markdown table: a line per group, its kind, accuracies in percent, bytes and MACs."""
    header = ["Runs", "Ids", "Kind", *FIGURES]
    columns = [_cells(groups, place, name in COUNTS) for name, place in FIGURES.items()]
    labels = [f"{i} {_label(group)}" for i, group in enumerate(groups, 1)]
    named = [labels, [group.ids for group in groups], [group.kind for group in groups]]
    return markdown(header, list(zip(*named, *columns, strict=True)))


def _label(group: Group) -> str:
    runs, n = len(group.runs), group.n_seeds
    if runs == 1:
        return group.name
    kinds = f"{runs} seeds" if n == runs else f"{runs} runs of {n} seed{'s' if n > 1 else ''}"
    return f"{group.name} ({kinds})"


def details(groups: Sequence[Group]) -> str:
    """Markdown table: accuracies of scenes, and of devices, in percent, a column per group."""
    header = ["", *(f"{i} {group.name}" for i, group in enumerate(groups, 1))]
    rows = [[name, *_cells(groups, place)] for name, place in DETAILS.items()]
    return markdown(header, [row for row in rows if set(row[1:]) != {"-"}])  # without what no run has heard


def _cells(groups: Sequence[Group], place: str, count: bool = False) -> list[str]:
    """One figure of every group: 82.53 ± 0.93 (+2.18) *; * is the best one."""
    means = [group.mean(place) for group in groups]
    known = [mean for mean in means if mean is not None]
    best = (min if count else max)(known) if len(set(known)) > 1 and not different_clips(groups) else None
    others = [group is not groups[0] and group.tested_on == groups[0].tested_on for group in groups]
    return [
        _cell(group, place, means[0] if other else None, best, count)
        for group, other in zip(groups, others, strict=True)
    ]


def _cell(group: Group, place: str, first: float | None, best: float | None, count: bool) -> str:
    mean = group.mean(place)
    if mean is None:
        return "-"
    mark = " *" if mean == best else "  " if best is not None else ""
    if count:
        return f"{mean:,.0f}{mark}"
    deviation = f" ± {100 * group.deviation(place):.2f}" if group.n_seeds > 1 else ""
    difference = f" ({100 * (mean - first):+.2f})" if first is not None else ""
    return f"{100 * mean:.2f}{deviation}{difference}{mark}"


def different_flags(groups: Sequence[Group]) -> list[str]:
    """Names of the flags whose values are not those of the first group."""
    names = dict.fromkeys(name for group in groups for name in group.runs[0].flags if name not in NO_MATTER)
    return [name for name in names if len({group.flag(name) for group in groups}) > 1]


def flags_table(groups: Sequence[Group]) -> str:
    """Markdown table of the flags that differ; "" where none does."""
    rows = [[f"--{name}", *(group.flag(name) for group in groups)] for name in different_flags(groups)]
    commits = [", ".join(dict.fromkeys(finished.commit for finished in group.runs)) for group in groups]
    if len(set(commits)) > 1 or "," in commits[0]:
        rows.append(["commit of the code", *commits])
    return markdown(["", *(f"{i} {group.name}" for i, group in enumerate(groups, 1))], rows) if rows else ""


def notes(groups: Sequence[Group]) -> list[str]:
    """What the runs say of their own figures."""
    runs = [finished for group in groups for finished in group.runs]
    said = [f"{finished.run.id}: {finished.results['note']}" for finished in runs if finished.results.get("note")]
    if len({note.partition(": ")[2] for note in said}) == 1 and len(said) == len(runs) > 1:
        said = [f"all: {said[0].partition(': ')[2]}"]
    return said


def different_clips(groups: Sequence[Group]) -> str:
    """A warning where the groups were not all tested on the same clips; else ""."""
    tested_on = dict.fromkeys(group.tested_on for group in groups)
    listed = ", ".join(f"{data} ({n} clips)" for data, n in tested_on)
    warning = f"WARNING: tested on different clips, so their figures cannot be compared: {listed}"
    return warning if len(tested_on) > 1 else ""


def report(groups: Sequence[Group]) -> str:
    """All tables of these groups."""
    warning = different_clips(groups)
    parts = [warning, overview(groups)] if warning else [overview(groups)]
    if len(groups) <= MAX_COLUMNS:
        parts.append(details(groups))
        if len(groups) > 1:
            parts.append(flags_table(groups) or "They differ in no flag.")
    else:
        parts.append(f"Scenes, devices and flags are shown of up to {MAX_COLUMNS} lines; --csv has those of all.")
    said = notes(groups)
    legend = "Accuracies in percent; * is the best, (+1.00) the difference to the first line."
    if warning:
        legend = "Accuracies in percent; (+1.00) is the difference to the first line, where the clips are the same."
    if any(group.n_seeds > 1 for group in groups):
        legend += " Mean ± deviation over seeds."
    return "\n\n".join([*parts, "\n".join([legend, *said])])


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """A line per run: every figure, and the flags that differ. Raises `UserError` where it cannot be written."""
    flags = list(dict.fromkeys(["seed", *different_flags(groups)]))
    figures = {**FIGURES, **DETAILS}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "run_id", "name", "kind", *figures, *(f"--{name}" for name in flags), "commit"])
    for i, group in enumerate(groups, 1):
        for finished in group.runs:
            values = [finished.figure(place) for place in figures.values()]
            given = [_shown(finished.flags.get(name, "-")) for name in flags]
            writer.writerow([i, finished.run.id, finished.name, finished.kind, *values, *given, finished.commit])
    replace_file(path, lambda beside: beside.write_text(text.getvalue()))


def in_order(groups: list[Group], by: str) -> list[Group]:
    """The best first; those without the figure last."""
    if by == "given":
        return groups
    if by == "name":
        return sorted(groups, key=lambda group: group.name)
    sign = 1 if by in COUNTS else -1

    def place(group: Group) -> tuple[bool, float]:
        mean = group.mean(FIGURES[by])
        return mean is None, sign * (mean or 0)

    return sorted(groups, key=place)
