"""Runs side by side on the terminal, a line per `Group`.

The best value of each figure is marked, and differences are to the first line; neither where runs were tested on
different clips.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from dcase.errors import UserError
from dcase.files import replace_file
from dcase.report.groups import NO_MATTER, Group, grouped
from dcase.report.run_files import PARTS, Finished, read_finished
from dcase.report.tables import markdown
from dcase.report.words import shown
from dcase.runs.folder import find_run

__all__ = ["COUNTS", "Group", "details_of", "figures_of", "grouped", "in_order", "read_all", "report", "write_csv"]

FEWEST_CLIPS = 50  # of a test: with fewer no accuracy is marked as the best
MAX_COLUMNS = 8  # of the table of scenes and devices, which has a column per line of the first table
COUNTS = {"size": "complexity/total_param_bytes", "macs": "complexity/macs"}  # less is better


def figures_of(groups: Sequence[Group]) -> dict[str, str]:
    """Return the figures of the first table: name -> place in results.json."""
    return {"macro_avg_acc": "macro_avg_acc", **_accuracies(groups, *PARTS[2:]), **COUNTS}


def details_of(groups: Sequence[Group]) -> dict[str, str]:
    """Return the accuracies of scenes and of devices: name -> place in results.json."""
    return _accuracies(groups, *PARTS[:2])


def _accuracies(groups: Sequence[Group], *parts: str) -> dict[str, str]:
    runs = [run for group in groups for run in group.runs]
    return {name: f"{part}/{name}" for part in parts for run in runs for name in run.results[part]}


def read_all(project_name: str, run_ids: Sequence[str]) -> tuple[list[Finished], list[str]]:
    """Return the runs that have results, and a line about each run that has none."""
    finished, said = [], []
    for run_id in dict.fromkeys(run_ids):
        try:
            run = find_run(project_name, run_id, "run")
            run.read_config()  # raises UserError where it is damaged: there would be nothing to group by
            found = read_finished(run.folder)
            found.flags  # noqa: B018  raises UserError where a flag is refused
            finished.append(found)
        except UserError as error:
            said.append(str(error))
    return finished, said


def report(groups: Sequence[Group]) -> str:
    """Return all tables of these groups."""
    warning = different_clips(groups)
    parts = [warning, overview(groups)] if warning else [overview(groups)]
    if len(groups) <= MAX_COLUMNS:
        parts.append(details(groups))
        if len(groups) > 1:
            parts.append(flags_table(groups) or "They differ in no flag.")
    else:
        parts.append(f"Scenes, devices and flags are shown for up to {MAX_COLUMNS} lines; --csv writes those of all.")
    legend = "Accuracies in percent; * is the best, (+1.00) the difference to the first line."
    if warning:
        legend = "Accuracies in percent; (+1.00) is the difference to the first line, where the clips are the same."
    elif few := _few_clips(groups):
        legend = f"Accuracies in percent, none marked: {few} clips are too few; (+1.00) is the difference to the first."
    if any(group.n_seeds > 1 for group in groups):
        legend += " Mean ± deviation over seeds."
    return "\n\n".join([*parts, "\n".join([legend, *notes(groups)])])


def _few_clips(groups: Sequence[Group]) -> int:
    """Return the number of test clips where that is too small to mark the best accuracy; else 0."""
    n_clips = min(group.tested_on[1] for group in groups)
    return n_clips if n_clips < FEWEST_CLIPS else 0


def overview(groups: Sequence[Group]) -> str:
    """Return a Markdown table: a line per group with its kind, accuracies in percent, bytes and MACs."""
    figures = figures_of(groups)
    columns = [_cells(groups, place, name in COUNTS) for name, place in figures.items()]
    labels = [f"{i} {_label(group)}" for i, group in enumerate(groups, 1)]
    named = [labels, [" ".join(group.ids) for group in groups], [group.runs[0].kind for group in groups]]
    return markdown(["Runs", "Ids", "Kind", *figures], list(zip(*named, *columns, strict=True)))


def _label(group: Group) -> str:
    runs, n = len(group.runs), group.n_seeds
    if runs == 1:
        return group.name
    kinds = f"{runs} seeds" if n == runs else f"{runs} runs of {n} seed{'s' if n > 1 else ''}"
    return f"{group.name} ({kinds})"


def details(groups: Sequence[Group]) -> str:
    """Return a Markdown table: accuracies of scenes and of devices, in percent, a column per group."""
    rows = [[name, *_cells(groups, place)] for name, place in details_of(groups).items()]
    with_clips = [row for row in rows if set(row[1:]) != {"-"}]
    return markdown(["", *(f"{i} {group.name}" for i, group in enumerate(groups, 1))], with_clips)


def _cells(groups: Sequence[Group], place: str, count: bool = False) -> list[str]:
    """Return one figure of every group as "82.53 ± 0.93 (+2.18) *"; * marks the best."""
    means = [group.mean(place) for group in groups]
    known = [mean for mean in means if mean is not None]
    marked = len(set(known)) > 1 and not different_clips(groups) and not _few_clips(groups)
    best = (min if count else max)(known) if marked else None
    cells = []
    for group, mean in zip(groups, means, strict=True):
        if mean is None:
            cells.append("-")
            continue
        text = f"{mean:,.0f}" if count else f"{100 * mean:.2f}"
        if not count and group.n_seeds > 1:
            text += f" ± {100 * group.deviation(place):.2f}"
        other = group is not groups[0] and group.tested_on == groups[0].tested_on
        if not count and other and means[0] is not None:
            text += f" ({100 * (mean - means[0]):+.2f})"
        cells.append(text + (" *" if mean == best else "  " if best is not None else ""))
    return cells


def _flag(group: Group, name: str) -> str:
    """Return a flag's value, or the values of all runs where they differ."""
    values = [shown(run.flags.get(name, "-")) for run in group.runs]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def _different_flags(groups: Sequence[Group]) -> list[str]:
    names = dict.fromkeys(name for group in groups for name in group.runs[0].flags if name not in NO_MATTER)
    return [name for name in names if len({_flag(group, name) for group in groups}) > 1]


def flags_table(groups: Sequence[Group]) -> str:
    """Return a Markdown table of the flags that differ; "" where none does."""
    rows = [[f"--{name}", *(_flag(group, name) for group in groups)] for name in _different_flags(groups)]
    commits = [", ".join(dict.fromkeys(run.commit for run in group.runs)) for group in groups]
    if len(set(commits)) > 1 or "," in commits[0]:
        rows.append(["commit of the code", *commits])
    return markdown(["", *(f"{i} {group.name}" for i, group in enumerate(groups, 1))], rows) if rows else ""


def notes(groups: Sequence[Group]) -> list[str]:
    """Return the runs' own notes on their figures; a note that all share once."""
    runs = [run for group in groups for run in group.runs]
    said = {run.id: run.results["note"] for run in runs if run.results["note"]}
    if len(said) == len(runs) > 1 and len(set(said.values())) == 1:
        return [f"all: {runs[0].results['note']}"]
    return [f"{run_id}: {note}" for run_id, note in said.items()]


def different_clips(groups: Sequence[Group]) -> str:
    """Return a warning where the groups were not all tested on the same clips; else ""."""
    tested_on = dict.fromkeys(group.tested_on for group in groups)
    listed = ", ".join(f"{data} ({n} clips)" for data, n in tested_on)
    warning = f"WARNING: tested on different clips, so their figures cannot be compared: {listed}"
    return warning if len(tested_on) > 1 else ""


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """Write a line per run: every figure, and the flags that differ. Raise `UserError` where that fails."""
    flags = list(dict.fromkeys(["seed", *_different_flags(groups)]))
    figures = figures_of(groups) | details_of(groups)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "run_id", "name", "kind", *figures, *(f"--{name}" for name in flags), "commit"])
    for i, group in enumerate(groups, 1):
        for run in group.runs:
            values = [run.figure(place) for place in figures.values()]
            given = [shown(run.flags.get(name, "-")) for name in flags]
            writer.writerow([i, run.id, run.name, run.kind, *values, *given, run.commit])
    replace_file(path, lambda beside: beside.write_text(text.getvalue()))


def in_order(groups: list[Group], by: str) -> list[Group]:
    """Return the groups, the best first; those without the figure last."""
    if by == "given":
        return groups
    if by == "name":
        return sorted(groups, key=lambda group: group.name)
    place = COUNTS.get(by, by if by == "macro_avg_acc" else f"device_group_acc/{by}")
    means = {id(group): group.mean(place) for group in groups}
    sign = 1 if by in COUNTS else -1
    return sorted(groups, key=lambda group: (means[id(group)] is None, sign * (means[id(group)] or 0)))
