"""output.csv of a submission: a row per recording, with the most probable scene and the probability of each scene."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from torch import Tensor

from dcase.data.labels import SCENES
from dcase.data.tau22 import leaves_folder
from dcase.errors import UserError
from dcase.files import regular, replace_file

HEADER = ["filename", "scene_label", *SCENES]
SUM_TOLERANCE = 1e-3  # of a row's probabilities
SHOWN = 3  # rows that are named of one kind of problem


def evaluation_list(folder: Path) -> pd.DataFrame:
    """Return the columns filename and device_id of the challenge's evaluation list.

    Raises `UserError` where it is missing, empty, or names files outside the folder.
    """
    path = folder / "evaluation_setup" / "fold1_test.csv"
    try:
        table = pd.read_csv(regular(path), sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--eval_dir {folder}: {path} cannot be read; it lists filename and device_id") from error
    problem = ""
    if missing := [column for column in ("filename", "device_id") if column not in table]:
        problem = f"has no column {missing[0]} (columns are separated by tabs)"
    elif not len(table):
        problem = "lists no recording"
    elif outside := [name for name in table["filename"] if leaves_folder(name)]:
        problem = f"lists {outside[0]!r}, which leaves the folder"
    if problem:
        raise UserError(f"--eval_dir {folder}: {path} {problem}")
    return table[["filename", "device_id"]]


def write_output(path: Path, names: list[str], logits: Tensor) -> None:
    """Write the output for recordings with logits (n, n_classes). Raises `UserError` where these are not finite."""
    if bad := [name for name, finite in zip(names, logits.isfinite().all(1).tolist(), strict=True) if not finite]:
        raise UserError(f"{path} is not written: the model's output for {bad[0]} is NaN or infinite: train another one")
    probabilities = logits.double().softmax(1)
    rows = zip(names, probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True)

    def write(beside: Path) -> None:
        with open(beside, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows([name, SCENES[scene], *values] for name, scene, values in rows)

    replace_file(path, write)


def check_output(path: Path, listed: list[str] | None = None) -> list[str]:
    """Return the problems of an output: columns, labels, probabilities, and its files against ``listed``, if given."""
    problems = defaultdict(list)  # kind -> lines
    rows_of = defaultdict(list)  # file -> numbers of its rows
    try:
        with open(path, newline="") as file:
            rows = csv.reader(file, delimiter="\t")
            header = next(rows, [])
            if header != HEADER:
                return [f"{path}, row 1: {_of_header(header)}"]
            for number, row in enumerate(rows, 2):
                for kind, problem in _of_row(row):
                    problems[kind].append(f"{path}, row {number}{problem}")
                for name in row[:1]:
                    rows_of[name].append(number)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [f"{path} cannot be read ({error}): make it again with python -m dcase.submit"]
    problems["twice"] = [
        f"{path}, row {numbers[1]}: {name} is there already, in row {numbers[0]}: leave one"
        for name, numbers in rows_of.items()
        if len(numbers) > 1
    ]
    if listed is not None:
        wanted = set(listed)
        problems["missing"] = [
            f"{path}: {name} of the evaluation list is missing" for name in listed if name not in rows_of
        ]
        problems["foreign"] = [
            f"{path}, row {rows_of[name][0]}: {name} is not in the evaluation list"
            for name in rows_of
            if name not in wanted
        ]
    elif not rows_of:
        problems["empty"] = [f"{path} has no row but the header"]
    shown = []
    for lines in problems.values():
        more = len(lines) - SHOWN
        shown += lines[:SHOWN] + ([f"{path}: {more} more like the last one"] if more > 0 else [])
    return shown


def _of_header(header: list[str]) -> str:
    if len(header) == 1 and "," in header[0]:
        return "columns are separated by commas: use tabs"
    for number, (got, wanted) in enumerate(zip(header, HEADER, strict=False), 1):
        if got != wanted:
            return f"column {number} is {got!r}, not {wanted!r}: the columns are {', '.join(HEADER)}"
    return f"{len(header)} columns, not {len(HEADER)}: {', '.join(HEADER)}"


def _of_row(row: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, what follows "row N") of each problem of a row."""
    if len(row) != len(HEADER):
        yield "fields", f": {len(row)} fields, not {len(HEADER)}"
        return
    values = {}
    for scene, text in zip(SCENES, row[2:], strict=True):
        try:
            value = float(text)
        except ValueError:
            yield "number", f", column {scene}: {text!r} is no number"
            continue
        if not math.isfinite(value):
            yield "finite", f", column {scene}: {text} is not finite"
        elif not 0 <= value <= 1:
            yield "range", f", column {scene}: {text} is no probability, 0 to 1: take the softmax"
        else:
            values[scene] = value
    label = row[1]
    if label not in SCENES:
        yield "label", f", column scene_label: {label!r} is no scene: one of {', '.join(SCENES)}"
    if len(values) == len(SCENES):
        total, best = sum(values.values()), max(values, key=values.get)
        if abs(total - 1) > SUM_TOLERANCE:
            yield "sum", f": the probabilities sum to {total:.4f}, not 1: take the softmax"
        if label in SCENES and values[label] < values[best]:
            yield "best", f", column scene_label: {label}, but {best} is more probable"
