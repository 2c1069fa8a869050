"""A run's folder ``<project_name>/<run_id>/``: its id, configuration, checkpoints, metrics and results.

    config.json          the whole configuration, versions and command, written before the first step
    checkpoints/         last.ckpt (every epoch), previous.ckpt (the one before), best.ckpt (highest validation
                         macro_avg_acc)
    metrics.csv          what was logged, a row a time
    results.json         the figures of the test, plain and repeatable: no times, no paths
    report/              tables and charts

Whatever matters is written beside its place and renamed, so that a kill leaves the old or the new file, never half
of one. Checkpoints are read with ``weights_only=True``: a file that would run code is refused.
"""

import csv
import json
import pickle
import secrets
import string
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.loggers.logger import Logger

from dcase.errors import UserError, one_line
from dcase.files import keep_copy, replace_file

FORMAT = 1  # of our checkpoints


@dataclass(frozen=True)
class RunConfig:
    project_name: str = "DCASE25_Task1"
    """Folder that the run's own folder is made in, and the W&B project."""
    experiment_name: str | None = None
    """Name of the run in W&B and in the report; None: the model's."""
    wandb_mode: str = "auto"
    """Weights & Biases: online, offline, disabled, or auto: online where you are logged in, else offline."""

    def __post_init__(self):
        if self.wandb_mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"--wandb_mode is auto, online, offline or disabled; got {self.wandb_mode}")
        if not self.project_name or Path(self.project_name).name in ("", ".."):
            raise UserError(f"--project_name is the name of a folder; got {self.project_name!r}")


@dataclass(frozen=True)
class Run:
    """A run and its folder."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    def has_config(self) -> bool:
        return (self.folder / "config.json").is_file()

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


def new_run(project_name: str) -> Run:
    """A run with an id that is not taken, and its folder. Raises `UserError` where the folder cannot be made."""
    alphabet = string.ascii_lowercase + string.digits
    run = Run(Path(project_name) / "".join(secrets.choice(alphabet) for _ in range(8)))
    try:
        run.checkpoints.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--project_name {project_name}: {run.checkpoints} cannot be made ({error.strerror})"
        ) from error
    return run


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


# Files


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda beside: beside.write_text(text))


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    replace_file(path, lambda beside: torch.save(checkpoint, beside))


def load_checkpoint(path: Path | str) -> dict:
    """A checkpoint of ours, on the CPU. Raises `UserError`, naming the file, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: check --ckpt_path or --ckpt_id")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch itself does not look at the checksums it writes
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"checkpoint {path} is refused: it is damaged, no checkpoint, or holds more than weights and could run code"
        ) from error
    except Exception as error:  # a damaged file can make torch raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {path} cannot be read ({reason}): it is cut short or no checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("dcase_format") != FORMAT:
        raise UserError(f"checkpoint {path} was not written by train_base.py or train_device_specific.py")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """last.ckpt, or previous.ckpt where that is damaged, which is then said; None where there is neither.

    Raises `UserError` where there is one and none can be read.
    """
    paths = [path for path in (folder / "last.ckpt", folder / "previous.ckpt") if path.is_file()]
    problem = None
    for path in paths:
        try:
            load_checkpoint(path)
        except UserError as error:
            problem = problem or error
            continue
        if problem:
            print(f"WARNING: {problem}. Going on from {path}, which was written before it.")
            damaged = paths[0].rename(paths[0].with_name("last.ckpt.damaged"))  # it must not become previous.ckpt
            print(f"The damaged file is now {damaged}.")
        return path
    if problem:
        raise problem
    return None


class SafeCheckpoints(CheckpointIO):
    """Lightning's way to checkpoint files: written beside and renamed, read with ``weights_only=True``; the last.ckpt
    that was there before stays, as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        path = Path(path)
        if path.name == "last.ckpt" and path.exists():
            keep_copy(path, path.with_name("previous.ckpt"))
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        return load_checkpoint(path)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


# Loggers


class MetricsCsv(Logger):
    """Appends what is logged to metrics.csv: columns step, name, value. A resumed run drops the rows it will redo."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    name = version = ""  # of Logger; the progress bar would show others
    columns = ("step", "name", "value")

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass  # config.json has them

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        new = not self.path.exists()
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(self.columns)
                writer.writerows((step, name, value) for name, value in metrics.items() if name != "epoch")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): check rights and space there"
            ) from error

    def drop_from(self, step: int, prefix: str) -> None:
        """Drop what was logged at this optimiser step or later under names that start with ``prefix``."""
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            rows = list(csv.reader(file))[1:]
        kept = [row for row in rows if len(row) == 3 and (int(row[0]) < step or not row[1].startswith(prefix))]
        lines = "".join(",".join(row) + "\n" for row in [self.columns, *kept])
        replace_file(self.path, lambda beside: beside.write_text(lines))


class Wandb(Logger):
    """W&B's logger, which from its first error on is only a silence: training goes on without it."""

    def __init__(self, logger: Logger, folder: Path):
        super().__init__()
        self._logger, self._folder, self._works = logger, folder, True

    name = version = ""  # of Logger; the progress bar would show others

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass  # W&B has them since its start

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.call(lambda logger: logger.log_metrics(metrics, step))

    def finish(self, failed: bool) -> None:
        self.call(lambda logger: logger.experiment.finish(exit_code=int(failed)))
        if not self._works:
            _end_wandb()  # else it fails once more at the program's end, loudly

    def call(self, what: Callable[[Logger], object]) -> None:
        """Do something with W&B's own logger, where it still works."""
        if self._works:
            try:
                what(self._logger)
            except Exception as error:  # its process gone, its folder full, its network: whatever it is
                self._works = False
                print(f"W&B has failed ({one_line(error)}); the run goes on without it, metrics go to {self._folder}")


def wandb_logger(config: RunConfig, run: Run, name: str, content: dict) -> Wandb | None:
    """W&B's logger for this run's id: online, or offline where it cannot be reached; None where it is disabled or does
    not even work offline. Training never waits for it longer than half a minute.

    ``content`` is the configuration to show there. Nothing but metrics, configuration and plots is uploaded.
    """
    modes = {"disabled": (), "offline": ("offline",)}.get(config.wandb_mode, (config.wandb_mode, "offline"))
    for mode in modes:
        try:
            experiment, mode = _start_wandb(mode, config, run, name, content)
        except Exception as error:  # whatever ails W&B, its folder or the network, the run goes on
            what = f"W&B cannot be used {mode if mode == 'offline' else 'online'}"
            print(f"{what} ({type(error).__name__}: {one_line(error)}); metrics go to {run.folder}")
            _end_wandb()  # it would hold on to the run's id
            continue
        sync = f" (send it with: wandb sync {Path(experiment.dir).parent})" if mode == "offline" else ""
        print(f"W&B: {mode}, run id {run.id}{sync}")
        from pytorch_lightning.loggers import WandbLogger

        return Wandb(WandbLogger(experiment=experiment), run.folder)
    return None


def _end_wandb() -> None:
    with suppress(Exception):
        sys.modules["wandb"].teardown()


def _start_wandb(mode: str, config: RunConfig, run: Run, name: str, content: dict):
    """(W&B's run, "online" or "offline")."""
    import wandb  # 2 seconds: only where it is wanted

    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    experiment = wandb.init(
        project=Path(config.project_name).name,
        id=run.id,
        name=name,
        dir=run.folder,
        mode=mode,
        resume="allow",
        config=content,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=30,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_stats=True,
        ),
    )
    # Lightning does this only for runs that it starts itself; without it a curve's x-axis would be W&B's own count.
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return experiment, mode
