"""What a run has left in its folder, read for its page: plain files alone, no checkpoint."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from dcase.data.tau22 import TEST_CLIPS
from dcase.errors import UserError, one_line
from dcase.report.predictions import PREDICTIONS_CSV, Predictions, read_predictions
from dcase.runs.folder import kind_of, run_of

Curves = dict[str, tuple[list[int], list[float]]]  # name of a metric -> optimiser steps, values


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that has been tested."""

    id: str
    folder: Path
    results: dict  # of results.json
    config: dict  # of config.json's "config"; empty where there is none
    made: dict  # what else config.json holds: versions, command, commit
    curves: Curves
    predictions: Predictions | None
    missing: str = ""  # why there are no predictions
    trained_by: "Finished | None" = None  # of a test alone: the run whose checkpoint it tested, where it is there

    @property
    def name(self) -> str:
        run, model = self.config.get("run") or {}, self.config.get("model") or {}
        return run.get("experiment_name") or model.get("model") or self.id

    @property
    def kind(self) -> str:
        """`runs.kind_of`; "" where there is no config.json."""
        return kind_of(self.config) if self.config else ""

    @property
    def tested_on(self) -> tuple[str, int]:
        """Runs where it is not the same cannot be compared."""
        return self.results["data"], self.results["n_clips"]

    @property
    def devices(self) -> list[str]:
        """Those that the test has clips of."""
        return [device for device, acc in self.results["device_acc"].items() if acc is not None]

    @property
    def groups(self) -> list[str]:
        """Of devices: those that the test has clips of."""
        return [group for group, acc in self.results["device_group_acc"].items() if acc is not None]

    @property
    def fine_tuning(self) -> dict[str, dict]:
        """What stage 2 came to, of each device (see `tables.fine_tuning_rows`); empty of a general model."""
        return self.results.get("fine_tuning") or self.training.results.get("fine_tuning") or {}

    @property
    def comparable(self) -> bool:
        """With the published figures: TAU22, the whole test split."""
        return self.results["data"] == "TAU22" and self.results["n_clips"] == TEST_CLIPS

    @property
    def training(self) -> "Finished":
        return self.trained_by or self

    @property
    def seed(self) -> int | None:
        return (self.training.config.get("fit") or {}).get("seed")


def read_finished(folder: Path) -> Finished:
    """Raises `UserError`, naming the file, where results.json is missing or damaged."""
    return _read(folder, _read_results(folder), with_trained_by=True)


def _read(folder: Path, results: dict, with_trained_by: bool) -> Finished:
    made = _read_object(folder / "config.json")
    config = made.pop("config", None)
    config = config if isinstance(config, dict) else {}
    predictions, missing = _predictions(folder, results) if with_trained_by else (None, "")
    trained_by = _trained_by(folder, config) if with_trained_by else None
    curves = _read_curves(folder / "metrics.csv")
    return Finished(folder.name, folder, results, config, made, curves, predictions, missing, trained_by)


def _read_results(folder: Path) -> dict:
    path = folder / "results.json"
    again = "the run has not been tested to its end: --resume it, or test its checkpoint with test_only.py"
    if kind_of(_read_object(folder / "config.json").get("config") or {}) == "test":
        again = "the test has not come to its end: run test_only.py again"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for name in ("macro_avg_acc", "acc", "loss", "scene_acc", "device_acc", "device_group_acc", "n_clips"):
            results[name]
        return {"data": "", "note": "", **results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {again}") from error


def _read_object(path: Path) -> dict:
    """Of JSON; empty where it is missing or damaged: a page without it says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _predictions(folder: Path, results: dict) -> tuple[Predictions | None, str]:
    """The predictions, or why there are none."""
    path = folder / PREDICTIONS_CSV
    if not path.is_file():
        return None, f"This run has no {PREDICTIONS_CSV}: it was tested before there was one."
    try:
        predictions = read_predictions(path)
    except UserError as error:
        return None, f"{error}."
    # Rounding to four decimals can turn a tie, so a clip in a thousand may differ.
    counted = predictions.confusion.sum(0).ravel().tolist()
    kept = sum(map(min, counted, (clips for row in results["confusion"] for clips in row)))
    if len(predictions) != results["n_clips"] or kept < 0.999 * len(predictions):
        return None, f"{PREDICTIONS_CSV} is of another test than results.json."
    return predictions, ""


def _read_curves(path: Path) -> Curves:
    """Of metrics.csv. A row that a kill has cut is left out; of a step that was logged twice, the last counts."""
    found: dict[str, dict[int, float]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in list(csv.reader(file))[1:]:
                try:
                    step, name, value = row
                    found.setdefault(name, {})[int(step)] = float(value)
                except ValueError:
                    continue
    except (OSError, ValueError):
        return {}
    return {name: ([*sorted(points)], [points[s] for s in sorted(points)]) for name, points in found.items()}


def _trained_by(folder: Path, config: dict) -> Finished | None:
    tested = tested_run(folder, config)
    return _read(tested, _read_object(tested / "results.json"), with_trained_by=False) if tested else None


def tested_run(folder: Path, config: dict) -> Path | None:
    """The run of --ckpt_path, where that is another one."""
    found = run_of(config["ckpt_path"]) if config.get("ckpt_path") else None
    return found.folder if found and found.folder.resolve() != folder.resolve() else None
