"""A tested run, read from its folder: plain files only, no checkpoint."""

import csv
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dcase.data.labels import Labels
from dcase.data.tau22 import TEST_CLIPS
from dcase.errors import UserError, command, printable
from dcase.files import regular
from dcase.report.predictions import PREDICTIONS_CSV, Predictions, read_predictions
from dcase.runs.config import CONFIGS, from_plain, to_plain, with_all_fields
from dcase.runs.folder import Run, kind_of
from dcase.schema import WrongType

Curves = dict[str, tuple[list[int], list[float]]]  # name of a metric -> optimiser steps, values
PARTS = ("scene_acc", "device_acc", "device_group_acc")  # of results.json
_OF_TRAINING = {"batch_size", "devices", "num_nodes"}  # a test has these flags too, but they hardly change its figures


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that has been tested. Large files are read when they are first needed."""

    folder: Path
    results: dict  # results.json
    config: dict  # "config" in config.json; empty where that is missing or damaged
    made: dict  # the rest of config.json: versions, command, commit

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        run, model = self.config.get("run") or {}, self.config.get("model") or {}
        return printable(run.get("experiment_name") or model.get("model") or self.id)

    @property
    def kind(self) -> str:
        """The kind from `kind_of`; "" without a configuration."""
        return kind_of(self.config) if self.config else ""

    @property
    def seed(self) -> int | None:
        return (self.training.config.get("fit") or {}).get("seed")

    @property
    def commit(self) -> str:
        """The short git commit of the code; "-" where it is not known."""
        return (self.made.get("commit") or "-")[:7]

    @property
    def tested_on(self) -> tuple[str, int]:
        """The data and the number of clips. Runs where these differ cannot be compared."""
        return self.results["data"], self.results["n_clips"]

    @property
    def comparable(self) -> bool:
        """Whether the test covers TAU22's whole test split, like the published figures."""
        return self.tested_on == ("TAU22", TEST_CLIPS)

    @property
    def devices(self) -> list[str]:
        """Devices with test clips."""
        return [device for device, acc in self.results["device_acc"].items() if acc is not None]

    @property
    def groups(self) -> list[str]:
        """Groups of devices with test clips."""
        return [group for group, acc in self.results["device_group_acc"].items() if acc is not None]

    @property
    def fine_tuning(self) -> dict[str, dict]:
        """Stage 2's outcome per device (see `tables.fine_tuning_rows`); empty for a general model."""
        return self.results.get("fine_tuning") or self.training.results.get("fine_tuning") or {}

    @cached_property
    def labels(self) -> Labels:
        """The scenes and devices of the data. Raises `UserError` where config.json has them and they are damaged."""
        return Labels.from_plain(self.made, str(self.folder / "config.json"))

    def figure(self, place: str) -> float | None:
        """Return a figure of results.json by its place, as "loss" or "scene_acc/bus"; None where it is missing."""
        part, _, name = place.partition("/")
        value = self.results.get(part)
        return (value or {}).get(name) if name else value

    @cached_property
    def trained_by(self) -> "Finished | None":
        """The run whose checkpoint this test loaded, where that run is still there."""
        tested = Run(self.folder).tested() if self.config.get("ckpt_path") else None
        return tested and read_unfinished(tested.folder)

    @property
    def training(self) -> "Finished":
        """The run that trained the model: this one, unless it is a test."""
        return self.trained_by.training if self.trained_by else self

    @cached_property
    def flags(self) -> dict:
        """Every flag and its value; a flag that is newer than the run has today's default. A test also has the flags
        of the run whose model it tested. Raises `UserError` where today's checks refuse a flag."""
        if not self.config:
            return {}
        try:
            config = to_plain(from_plain(CONFIGS[self.kind], self.config))
        except UserError as error:
            raise UserError(f"run {self.id} has flags that this code refuses: {error}") from error
        own = {}
        for name, value in config.items():
            own |= value if isinstance(value, dict) else {name: value}
        if self.trained_by is None:
            return own
        given = {name: value for name, value in own.items() if value is not None and name not in _OF_TRAINING}
        return self.trained_by.flags | given

    @property
    def predictions(self) -> Predictions | None:
        return self._predictions[0]

    @property
    def missing(self) -> str:
        """Why there are no predictions; "" where there are."""
        return self._predictions[1]

    @cached_property
    def _predictions(self) -> tuple[Predictions | None, str]:
        path = self.folder / PREDICTIONS_CSV
        if not path.is_file():
            return None, f"This run has no {PREDICTIONS_CSV}: it was tested by an earlier version."
        try:
            predictions = read_predictions(path, self.labels)
        except UserError as error:
            return None, f"{error}."
        # Rounding to four decimals can turn a tie, so one clip in a thousand may differ.
        counted = predictions.confusion.sum(0).ravel().tolist()
        kept = sum(map(min, counted, (clips for row in self.results["confusion"] for clips in row)))
        if len(predictions) != self.results["n_clips"] or kept < 0.999 * len(predictions):
            return None, f"{PREDICTIONS_CSV} comes from another test than results.json."
        return predictions, ""

    @cached_property
    def curves(self) -> Curves:
        """metrics.csv. A row that a kill cut short is left out; of a step logged twice, the last row counts."""
        found: dict[str, dict[int, float]] = {}
        try:
            with open(regular(self.folder / "metrics.csv"), newline="", encoding="utf-8") as file:
                for row in list(csv.reader(file))[1:]:
                    try:
                        step, name, value = row
                        if 0 <= int(step) < 2**40 and abs(float(value)) < 1e30:  # neither NaN nor infinite
                            found.setdefault(name, {})[int(step)] = float(value)
                    except ValueError:
                        continue
        except (OSError, ValueError, csv.Error):
            return {}
        return {name: ([*sorted(points)], [points[s] for s in sorted(points)]) for name, points in found.items()}


def read_unfinished(folder: Path) -> Finished:
    """Return a run that may have no results; a file that is missing or damaged counts as empty."""
    run, made, config, results = Run(folder), {}, {}, {}
    with suppress(UserError):
        results = run.results() or {}
    try:
        made = run.made()
        config = made["config"]
        with_all_fields(config)
    except WrongType:
        config = {}
    except UserError:  # flags that this code refuses are shown
        pass
    return Finished(folder, results, config, made)


def read_finished(folder: Path) -> Finished:
    """Raise `UserError`, naming the file, where results.json is missing or damaged."""
    run, path = read_unfinished(folder), folder / "results.json"
    if not path.is_file() and run.kind == "test":
        again = command("test_only.py", "--ckpt_path", run.config["ckpt_path"])
        again = f"run {again} again; {folder}/ can be deleted"
        raise UserError(f"test {run.id} has no results.json: it did not finish and cannot be resumed: {again}")
    if not path.is_file():
        how = "test its checkpoint with test_only.py" if run.config.get("only_devices") else "--resume it"
        raise UserError(f"run {run.id} has no results.json: it has not been tested to its end: {how}")
    results, ours = Run(folder).results(), run.labels
    for part, names in zip(PARTS, (ours.scenes, ours.devices, ours.device_groups), strict=True):
        if other := set(results[part]) ^ set(names):
            raise UserError(f"{path} cannot be read ({part} of {min(other):.50}): test the run again with test_only.py")
    if {len(ours.scenes)} != {len(results["confusion"]), *map(len, results["confusion"])}:
        raise UserError(f"{path} cannot be read (confusion is of another size): test the run again with test_only.py")
    return Finished(folder, results, run.config, run.made)
