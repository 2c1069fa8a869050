"""A run's folder ``<project_name>/<run_id>/``, and which run a path belongs to.

    config.json          the whole configuration, versions and command, written before the first step
    checkpoints/         last.ckpt (every epoch), previous.ckpt (the one before), best.ckpt (highest validation
                         macro_avg_acc)
    cross_fit/           teachers of the run's own, and their logits (`training.cross_fit`), with --cross_fit
    stored/              the models in the bits that they are counted with (`runs.stored`), with --weight_bits
    metrics.csv          logged metrics, one row each
    results.json         the figures of the test, plain and repeatable: no times, no paths
    predictions.csv      the logits of every test clip
    report/              index.html, a page with all tables and charts
    export/              files of dcase.export

Files that matter are written beside their place and renamed, so a kill leaves the old file or the new one, never half
of one. Checkpoints are read with ``weights_only=True``: a file that would run code is refused.
"""

import re
import secrets
import string
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from dcase.data.labels import Labels
from dcase.errors import UserError, command
from dcase.schema import Count, Name, Schema, Share, read_json

CHECKPOINTS, STORED = "checkpoints", "stored"  # subfolders of a run that hold models
CROSS_FIT = "cross_fit"  # subfolder with its own teachers
_FIRST_ROWS = 20  # of metrics.csv: a run that went on longer tells something
_BEGUN = {"config.json", ".lock", "metrics.csv", "wandb", "tensorboard", CHECKPOINTS, CROSS_FIT}


@dataclass(frozen=True)
class RunConfig:
    project_name: str = "DCASE25_Task1"
    """Folder that holds the run's folder, and name of the W&B project."""
    experiment_name: str | None = None
    """Name of the run in W&B and in the report; None: the model's name."""
    run_id: str | None = None
    """Id of a new run, which no other run may have; None: draw one."""
    wandb_mode: str = "auto"
    """Weights & Biases: online, offline, disabled, or auto: online where you are logged in, else offline."""
    logger: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Log to W&B, to TensorBoard files in the run's folder, or to neither; metrics.csv is always written."""
    log_checkpoints: bool = False
    """Upload the run's checkpoints to W&B after each validation and at the end: a machine without the run's folder
    fetches them for --resume and --ckpt_id."""
    report_audio: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Embed the sound of the most confident mistakes in the report's page; False: show pictures only."""

    def __post_init__(self):
        if self.wandb_mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"--wandb_mode is auto, online, offline or disabled; got {self.wandb_mode}")
        if self.log_checkpoints and (self.logger != "wandb" or self.wandb_mode == "disabled"):
            raise UserError("--log_checkpoints uploads to W&B: give --logger wandb, and --wandb_mode not disabled")
        if not self.project_name or Path(self.project_name).name in ("", ".."):
            raise UserError(f"--project_name must name a folder; got {self.project_name!r}")
        if self.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w-]{0,63}", self.run_id, re.ASCII):
            raise UserError(
                f"--run_id is 1 to 64 letters, digits, _ and -, beginning with a letter or digit; got {self.run_id!r}"
            )


class _Config(Schema):
    """Where a run began; `config.from_plain` reads the rest."""

    ckpt_path: str = ""
    ckpt_id: str = ""


class Made(Schema):
    """config.json. Runs from before a key was recorded lack it."""

    config: _Config
    scenes: list[Name] | None = None
    teachers: list[dict[str, str]] | None = None
    command: list[str] = []
    commit: Name | None = None
    versions: dict[str, Name] = {}


class _Complexity(Schema):
    params: Count
    total_param_bytes: Count
    bytes_in_16_bit: Count
    bytes_in_8_bit: Count
    macs: Annotated[Count, Field(ge=1)]
    macs_by_part: dict[str, Count] = {}
    torchinfo_macs: Count
    max_param_bytes: Annotated[Count, Field(ge=1)]
    max_macs: Annotated[Count, Field(ge=1)]
    weight_bits: int = 32


class _Outcome(Schema):
    kept: bool
    reason: str
    n_train: Count
    n_val: Count
    general: Share | None
    fine_tuned: Share | None
    lr: float | None = None


class Results(Schema):
    """results.json: `model.metrics.results`, and what the test adds."""

    data: Name = ""
    note: str = ""
    macro_avg_acc: Share | None
    acc: Share | None
    loss: float | None
    device_avg_acc: Share | None = None
    n_clips: Count
    scene_acc: dict[str, Share | None]
    device_acc: dict[str, Share | None]
    device_group_acc: dict[str, Share | None]
    confusion: list[list[Count]]
    device_models: list[str] = []
    complexity: _Complexity | None = None
    tested_on: dict[str, str | int | None] | None = None
    fine_tuning: dict[str, _Outcome] | None = None


@dataclass(frozen=True)
class Run:
    """A run and its folder."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def stored(self) -> Path:
        return self.folder / STORED

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def trained(self) -> Path:
        """The checkpoint that the run was tested with: the best one, or the last where no clips were held out."""
        return trained_checkpoint(self.checkpoints)

    def has_config(self) -> bool:
        return (self.folder / "config.json").is_file()

    def has_only_begun(self) -> bool:
        """Return whether the folder holds nothing but what a run's start writes: nothing to go on from or to keep, no
        checkpoint, and metrics of the first steps at most."""
        trained = chain(self.checkpoints.rglob("*"), (self.folder / CROSS_FIT).rglob("*"))
        names = {path.name for path in self.folder.iterdir()}
        metrics = self.folder / "metrics.csv"
        n_rows = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        return names <= _BEGUN and n_rows <= _FIRST_ROWS and not any(path.is_file() for path in trained)

    def commit(self) -> str | None:
        """Return the git commit of the code that began the run; None where that was no checkout."""
        return self.made().get("commit")

    def labels(self) -> Labels:
        """Return the scenes and devices that the run began with. Raises `UserError` where they cannot be used."""
        return Labels.from_plain(self.made(), f"{self.folder}/config.json")

    def teachers(self) -> list[dict] | None:
        """Return the teachers that the run began with, each with its "sha256"; None where none were recorded."""
        return self.made().get("teachers")

    def made(self) -> dict:
        """Return config.json, which is a `Made`. Raises `UserError` where the file is damaged."""
        left = "its checkpoints can still be tested (--ckpt_path) and fine-tuned (--ckpt_id)"
        return read_json(Made, self.folder / "config.json", f"without it the run cannot go on; {left}")

    def read_config(self) -> dict:
        """Return config.json's "config". Raises `UserError` where the file is damaged."""
        return self.made()["config"]

    def results(self) -> dict | None:
        """Return results.json; None where there is none. Raises `UserError` where it is damaged."""
        path = self.folder / "results.json"
        if not path.is_file():
            return None
        advice = "test the checkpoint again with test_only.py, or move the file away"
        return {"data": "", "note": "", **read_json(Results, path, advice)}

    def tested(self) -> "Run | None":
        """Return the run whose model this run, a test, has tested; None where that is gone or this is no test.

        Raises `UserError` where config.json is damaged.
        """
        given = self.read_config().get("ckpt_path")
        if not given:
            return None
        # A relative path starts where the test was started: as a rule, in the folder that holds the test's project.
        found = run_of(given) or run_of(str(self.folder.absolute().parent.parent / given))
        return found if found and found.folder.resolve() != self.folder.resolve() else None

    def lineage(self) -> list["Run"]:
        """Return this run and those it started from, the latest first: a test, its fine-tuning, the general model's.

        Raises `UserError` where a config.json is damaged.
        """
        runs: list[Run] = []
        run: Run | None = self
        while run and run.has_config() and run.folder not in [other.folder for other in runs]:
            runs.append(run)
            general = run.read_config().get("ckpt_id")
            run = run.tested() or (Run(run.folder.parent / general) if general else None)
        return runs


SCRIPTS = {"general": "train_base.py", "device-specific": "train_device_specific.py", "test": "test_only.py"}


def kind_of(saved: dict) -> Literal["general", "device-specific", "test"]:
    """Return which script of `SCRIPTS` made a run of this configuration."""
    return "device-specific" if "ckpt_id" in saved else "test" if "ckpt_path" in saved else "general"


def resume_command(script: str, run_id: str, project_name: str) -> str:
    """Return the shell command that goes on with a run."""
    project = [] if project_name == RunConfig.project_name else ["--project_name", project_name]
    return command("python", script, "--resume", run_id, *project)


def run_of(ckpt_path: str) -> Run | None:
    """Return the run that <run>/checkpoints/best.ckpt, <run>/stored or <run>/stored/general.safetensors lies in.

    None for a path that lies in no run's folder. Of several checkpoints, separated by commas, the first counts.
    """
    path = Path(ckpt_path.split(",")[0]).absolute()
    places = (path, path.parent, path.resolve(), path.resolve().parent)
    runs = [Run(place.parent) for place in places if place.name in (CHECKPOINTS, STORED)]
    return next((run for run in runs if run.has_config()), None)


def new_run(project_name: str, run_id: str | None = None) -> Run:
    """Make the folder of a new run, of that id or of one that is drawn.

    Raises `UserError` where another run has the id, or the folder cannot be made.
    """
    run = Run(Path(project_name) / (run_id or new_id()))
    if run.has_config():
        raise UserError(f"--run_id {run_id}: there is such a run in {project_name}/: --resume it, or give another id")
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=run_id is not None)  # of one that was killed before it began
    except OSError as error:
        raise UserError(
            f"--project_name {project_name}: {run.checkpoints} cannot be made ({error.strerror})"
        ) from error
    return run


def new_id() -> str:
    """Draw 8 letters and digits."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def find_run(project_name: str, run_id: str, flag: str) -> Run:
    """Return the run of that id. Raises `UserError`, naming ``flag`` and the runs there are, where there is none."""
    run = Run(Path(project_name) / run_id)
    if not run_id or Path(run_id).name != run_id or not (run.folder / "config.json").is_file():
        there = sorted(path.parent.name for path in Path(project_name).glob("*/config.json"))
        listed = ", ".join(there[-10:]) if there else "none"
        raise UserError(f"{flag} {run_id}: no such run in {project_name}/ (there is: {listed}); check --project_name")
    return run


def find_checkpoint(project_name: str, run_id: str, flag: str = "--ckpt_id") -> Path:
    """Return the file of `Run.trained`. Raises `UserError`, naming ``flag``, where there is no such run or file."""
    run = find_run(project_name, run_id, flag)
    if run.trained.is_file():
        return run.trained
    raise UserError(f"{flag} {run_id}: {run.checkpoints} holds neither best.ckpt nor last.ckpt; train it first")


def trained_checkpoint(folder: Path) -> Path:
    """Return the best checkpoint of a folder, or the last one where no clips were held out for validation."""
    best = folder / "best.ckpt"
    return best if best.is_file() else folder / "last.ckpt"
