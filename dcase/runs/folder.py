"""A run's folder ``<project_name>/<run_id>/``: its id, configuration, checkpoints, metrics and results.

    config.json          the whole configuration, versions and command, written before the first step
    checkpoints/         last.ckpt (every epoch), previous.ckpt (the one before), best.ckpt (highest validation
                         macro_avg_acc)
    metrics.csv          what was logged, a row a time
    results.json         the figures of the test, plain and repeatable: no times, no paths
    predictions.csv      every test clip's logits
    report/              index.html, a page of everything; tables and charts

Whatever matters is written beside its place and renamed, so that a kill leaves the old or the new file, never half
of one. Checkpoints are read with ``weights_only=True``: a file that would run code is refused.
"""

import json
import re
import secrets
import shlex
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dcase.errors import UserError, one_line

CHECKPOINTS, STORED = "checkpoints", "stored"  # folders of a run


@dataclass(frozen=True)
class RunConfig:
    project_name: str = "DCASE25_Task1"
    """Folder that the run's own folder is made in, and the W&B project."""
    experiment_name: str | None = None
    """Name of the run in W&B and in the report; None: the model's."""
    run_id: str | None = None
    """Id of a new run, which no other may have: to know it beforehand. None: it is drawn."""
    wandb_mode: str = "auto"
    """Weights & Biases: online, offline, disabled, or auto: online where you are logged in, else offline."""
    logger: Literal["wandb", "tensorboard", "none"] = "wandb"
    """What is logged to beside metrics.csv: W&B; TensorBoard, in the run's folder; none: nothing."""
    log_checkpoints: bool = False
    """Upload the run's checkpoints to W&B too, after each validation and at the end: a machine that has not the run's
    folder fetches them for --resume and --ckpt_id."""
    report_audio: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Sound of the most confident mistakes in the report's page; False: pictures alone."""

    def __post_init__(self):
        if self.wandb_mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"--wandb_mode is auto, online, offline or disabled; got {self.wandb_mode}")
        if self.log_checkpoints and (self.logger != "wandb" or self.wandb_mode == "disabled"):
            raise UserError("--log_checkpoints uploads to W&B: give --logger wandb, and --wandb_mode not disabled")
        if not self.project_name or Path(self.project_name).name in ("", ".."):
            raise UserError(f"--project_name is the name of a folder; got {self.project_name!r}")
        if self.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w-]{0,63}", self.run_id, re.ASCII):
            raise UserError(f"--run_id is 1 to 64 letters, digits, _ and -, the first no _ or -; got {self.run_id!r}")


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
        """The models as they are handed in, with --weight_bits."""
        return self.folder / STORED

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    def has_config(self) -> bool:
        return (self.folder / "config.json").is_file()

    def commit(self) -> str | None:
        """The git commit of the code that began the run, where that was a checkout."""
        return json.loads((self.folder / "config.json").read_text()).get("commit")

    def scenes(self) -> list[str] | None:
        """Those that the run was begun with; None before that was written down."""
        return json.loads((self.folder / "config.json").read_text()).get("scenes")

    def read_config(self) -> dict:
        """Raises `UserError` where config.json is damaged."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}): without it the run cannot go on; its checkpoints can "
                "still be tested (--ckpt_path) and fine-tuned (--ckpt_id)"
            ) from error


SCRIPTS = {"general": "train_base.py", "device-specific": "train_device_specific.py", "test": "test_only.py"}


def kind_of(saved: dict) -> Literal["general", "device-specific", "test"]:
    """Which script of `SCRIPTS` made a run of this configuration."""
    return "device-specific" if "ckpt_id" in saved else "test" if "ckpt_path" in saved else "general"


def resume_command(script: str, run_id: str, project_name: str) -> str:
    """What goes on with a run, for a shell."""
    project = [] if project_name == RunConfig.project_name else ["--project_name", project_name]
    return shlex.join(["python", script, "--resume", run_id, *project])


def run_of(ckpt_path: str) -> Run | None:
    """The run of <run>/checkpoints/best.ckpt, <run>/stored or <run>/stored/general.safetensors; None: of no run."""
    path = Path(ckpt_path.split(",")[0]).absolute()
    runs = [Run(place.parent) for place in (path, path.parent) if place.name in (CHECKPOINTS, STORED)]
    return next((run for run in runs if run.has_config()), None)


def new_run(project_name: str, run_id: str | None = None) -> Run:
    """A run of that id, or of one that is not taken, and its folder.

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
    """8 letters and digits, drawn."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def find_run(project_name: str, run_id: str, flag: str) -> Run:
    """The run of that id. Raises `UserError`, naming ``flag`` and the runs there are, where there is none."""
    run = Run(Path(project_name) / run_id)
    if not run_id or Path(run_id).name != run_id or not (run.folder / "config.json").is_file():
        there = sorted(path.parent.name for path in Path(project_name).glob("*/config.json"))
        listed = ", ".join(there[-10:]) if there else "none"
        raise UserError(f"{flag} {run_id}: no such run in {project_name}/ (there is: {listed}); check --project_name")
    return run


def find_checkpoint(project_name: str, run_id: str, flag: str = "--ckpt_id") -> Path:
    """The best checkpoint of a run, or its last one where nothing was held out for validation. ``flag`` named the run:
    errors do too."""
    run = find_run(project_name, run_id, flag)
    path = trained_checkpoint(run.checkpoints)
    if path.is_file():
        return path
    raise UserError(f"{flag} {run_id}: {run.checkpoints} holds neither best.ckpt nor last.ckpt; train it first")


def trained_checkpoint(folder: Path) -> Path:
    """The best checkpoint of a folder, or the last one where nothing was held out for validation."""
    best = folder / "best.ckpt"
    return best if best.is_file() else folder / "last.ckpt"
