"""output.csv of a submission: a row a recording, with the most probable scene and the probability of each."""

import csv
import math
from collections import defaultdict
from pathlib import Path

import pandas as pd
from torch import Tensor

from dcase.data.labels import SCENES
from dcase.data.tau22 import leaves_folder
from dcase.errors import UserError
from dcase.files import replace_file

HEADER = ["filename", "scene_label", *SCENES]
SUM_TOLERANCE = 1e-3  # of a row's probabilities
SHOWN = 3  # rows of one kind of problem


def evaluation_list(folder: Path) -> pd.DataFrame:
    """Columns filename and device_id of the challenge's evaluation set. Raises `UserError` without such a list."""
    path = folder / "evaluation_setup" / "fold1_test.csv"
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--eval_dir {folder}: {path} cannot be read; it lists filename and device_id") from error
    for column in ("filename", "device_id"):
        if column not in table:
            raise UserError(f"--eval_dir {folder}: {path} has no column {column} (columns are separated by tabs)")
    if not len(table):
        raise UserError(f"--eval_dir {folder}: {path} lists no recording")
    for name in table["filename"]:
        if leaves_folder(name):
            raise UserError(f"--eval_dir {folder}: {path} lists {name!r}, which leaves the folder")
    return table[["filename", "device_id"]]


def write_output(path: Path, names: list[str], logits: Tensor) -> None:
    """Write the output of recordings with the logits (n, n_classes)."""
    probabilities = logits.double().softmax(1)
    rows = zip(names, probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True)

    def write(beside: Path) -> None:
        with open(beside, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows([name, SCENES[scene], *values] for name, scene, values in rows)

    replace_file(path, write)


def check_output(path: Path, listed: list[str] | None = None) -> list[str]:
    """Problems of an output: columns, labels, probabilities, and its files against ``listed``, where given."""
    problems = defaultdict(list)  # kind -> lines
    names = []
    try:
        with open(path, newline="") as file:
            rows = csv.reader(file, delimiter="\t")
            header = next(rows, [])
            if header != HEADER:
                return [f"{path}, row 1: {_of_header(header)}"]
            for number, row in enumerate(rows, 2):
                for kind, problem in _of_row(row):
                    problems[kind].append(f"{path}, row {number}{problem}")
                names += row[:1]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [f"{path} cannot be read ({error}): make it again with python -m dcase.submit"]
    rows_of = defaultdict(list)
    for number, name in enumerate(names, 2):
        rows_of[name].append(number)
    problems["twice"] = [
        f"{path}, row {numbers[1]}: {name} is there already, in row {numbers[0]}: leave one"
        for name, numbers in rows_of.items()
        if len(numbers) > 1
    ]
    if listed is not None:
        there, wanted = set(names), set(listed)
        problems["missing"] = [
            f"{path}: {name} of the evaluation list is missing" for name in listed if name not in there
        ]
        problems["foreign"] = [
            f"{path}, row {rows_of[name][0]}: {name} is not in the evaluation list"
            for name in rows_of
            if name not in wanted
        ]
    elif not names:
        problems["empty"] = [f"{path} has no row but the header"]
    return [line for lines in problems.values() for line in _shortened(lines, path)]


def _shortened(lines: list[str], path: Path) -> list[str]:
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"{path}: {more} more like the last one"] if more > 0 else [])


def _of_header(header: list[str]) -> str:
    if len(header) == 1 and "," in header[0]:
        return "columns are separated by commas: use tabs"
    for number, (got, wanted) in enumerate(zip(header, HEADER, strict=False), 1):
        if got != wanted:
            return f"column {number} is {got!r}, not {wanted!r}: the columns are {', '.join(HEADER)}"
    return f"{len(header)} columns, not {len(HEADER)}: {', '.join(HEADER)}"


def _of_row(row: list[str]) -> list[tuple[str, str]]:
    """(kind, what follows "row N") of each problem of a row."""
    if len(row) != len(HEADER):
        return [("fields", f": {len(row)} fields, not {len(HEADER)}")]
    problems, probabilities = [], []
    for scene, text in zip(SCENES, row[2:], strict=True):
        try:
            value = float(text)
        except ValueError:
            problems.append(("number", f", column {scene}: {text!r} is no number"))
            continue
        if not math.isfinite(value):
            problems.append(("finite", f", column {scene}: {text} is not finite"))
        elif not 0 <= value <= 1:
            problems.append(("range", f", column {scene}: {text} is no probability, 0 to 1: take the softmax"))
        else:
            probabilities.append(value)
    label = row[1]
    if label not in SCENES:
        problems.append(("label", f", column scene_label: {label!r} is no scene: one of {', '.join(SCENES)}"))
    if len(probabilities) == len(SCENES):
        total = sum(probabilities)
        if abs(total - 1) > SUM_TOLERANCE:
            problems.append(("sum", f": the probabilities sum to {total:.4f}, not 1: take the softmax"))
        if label in SCENES and probabilities[SCENES.index(label)] < max(probabilities):
            best = SCENES[probabilities.index(max(probabilities))]
            problems.append(("best", f", column scene_label: {label}, but {best} is more probable"))
    return problems
