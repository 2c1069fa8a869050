"""Loggers of a run's metrics: metrics.csv always, and W&B or TensorBoard beside it (--logger).

W&B shows a run under its own id. Stage 2 is in one group with the general model's run, ``best/...`` in the summary is
the best validated epoch, and charts have the optimiser's step as axis. ``wandb sync`` sends the same for an offline
run.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from dcase.errors import UserError, one_line, resumable
from dcase.files import replace_file
from dcase.machine import is_main
from dcase.runs import artifacts
from dcase.runs.config import EvalConfig, to_plain
from dcase.runs.folder import SCRIPTS, Run, kind_of, resume_command


class MetricsCsv(Logger):
    """Appends metrics to metrics.csv: columns step, name, value. A resumed run drops the rows that it repeats."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    name = version = ""  # the progress bar would show Logger's
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
    """W&B's logger. After its first error it does nothing, and training goes on without it."""

    def __init__(self, logger: Logger, run: Run, keeps_checkpoints: bool = False):
        """``keeps_checkpoints``: upload checkpoints too."""
        super().__init__()
        self._logger, self._run, self._keeps_checkpoints, self._works = logger, run, keeps_checkpoints, True

    name = version = ""  # the progress bar would show Logger's

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass  # W&B has them since its start

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.call(lambda logger: logger.log_metrics(metrics, step))

    def summarise(self, figures: dict[str, float]) -> None:
        """Put these into the run's summary, where later metrics do not replace them."""
        self.call(lambda logger: logger.experiment.summary.update(figures))

    def keep_checkpoints(self) -> None:
        """Upload the current checkpoints, with --log_checkpoints."""
        if self._keeps_checkpoints:
            self.call(lambda logger: artifacts.upload(logger.experiment, self._run))

    def finish(self, failed: bool) -> None:
        self.keep_checkpoints()
        self.call(lambda logger: logger.experiment.finish(exit_code=int(failed)))
        if not self._works:
            _end_wandb()  # otherwise it fails again at the program's end, with a traceback

    def call(self, what: Callable[[Logger], object]) -> None:
        """Call ``what`` with Lightning's logger for W&B, unless that has failed before."""
        if self._works:
            try:
                what(self._logger)
            except Exception as error:  # its process is gone, its folder full, its network down, ...
                self._works = False
                where = self._run.folder
                print(f"W&B has failed ({one_line(error)}); the run goes on without it, metrics go to {where}")


def wandb_logger(config: EvalConfig, run: Run) -> Wandb | None:
    """Return W&B's logger for this run's id: online, or offline where it cannot be reached; None where it is disabled
    or fails offline too. Training never waits for it longer than half a minute.

    It uploads metrics, configuration, plots, the prediction for each test clip, and a dozen mistakes as log-mel
    pictures with their file names; never sound, and checkpoints only with --log_checkpoints.
    """
    given = config.run.wandb_mode
    for mode in {"disabled": (), "offline": ("offline",)}.get(given, (given, "offline")):
        try:
            experiment, mode = _start_wandb(mode, config, run)
        except Exception as error:  # W&B, its folder or the network: the run goes on without it
            what = f"W&B cannot be used {mode if mode == 'offline' else 'online'}"
            print(f"{what} ({type(error).__name__}: {one_line(error)}); metrics go to {run.folder}")
            _end_wandb()  # it would hold on to the run's id
            continue
        sync = f" (send it with: wandb sync {Path(experiment.dir).parent})" if mode == "offline" else ""
        print(f"W&B: {mode}, run id {run.id}{sync}")
        from pytorch_lightning.loggers import WandbLogger

        return Wandb(WandbLogger(experiment=experiment), run, config.run.log_checkpoints)
    return None


def _end_wandb() -> None:
    with suppress(Exception):
        sys.modules["wandb"].teardown()


def _start_wandb(mode: str, config: EvalConfig, run: Run):
    """Return (W&B's run, "online" or "offline")."""
    import wandb  # 2 seconds: only where it is used

    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    plain = to_plain(config)
    kind = kind_of(plain)
    group = {"general": run.id, "device-specific": plain.get("ckpt_id")}.get(kind)
    experiment = wandb.init(
        project=Path(config.run.project_name).name,
        id=run.id,
        name=config.run.experiment_name or config.model.model,
        group=os.environ.get("WANDB_RUN_GROUP") or group,  # seeds.py sets it, or the user
        job_type=kind,
        dir=run.folder,
        mode=mode,
        resume="allow",
        config=plain | {"commit": run.commit()},
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


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files in the run's folder: ``tensorboard --logdir <project_name>`` shows all runs of a project.

    A resumed run shows the steps that it repeats twice. SummaryWriter's ``purge_step`` would hide every later step,
    those of other devices' models too, since each model's steps begin at 0.
    """

    def __init__(self, run: Run):
        super().__init__(run.folder, name="tensorboard", version="", default_hp_metric=False)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def tensorboard_logger(run: Run) -> TensorBoard:
    """Raises `UserError` where TensorBoard is not installed."""
    try:
        logger = TensorBoard(run)
    except ModuleNotFoundError as error:
        raise UserError("--logger tensorboard: it is not installed: pip install -r requirements.txt") from error
    print(f"TensorBoard: tensorboard --logdir {logger.log_dir}")
    return logger


@contextmanager
def open_loggers(config: EvalConfig, run: Run) -> Iterator[list[Logger]]:
    """Yield the loggers of metrics.csv and of --logger; none in a process that is not the main one.

    W&B learns at the end whether the run failed. The message of a signal that ends a training run names the command
    that resumes it; a test is run again.
    """
    kind = kind_of(to_plain(config))
    resuming = nullcontext()
    if kind != "test":
        resuming = resumable(resume_command(SCRIPTS[kind], run.id, config.run.project_name))
    with resuming:  # also while W&B starts and ends
        loggers, failed = [], True
        if is_main():
            make = {"wandb": partial(wandb_logger, config), "tensorboard": tensorboard_logger}.get(config.run.logger)
            loggers = [MetricsCsv(run.folder / "metrics.csv"), make and make(run)]
            loggers = [logger for logger in loggers if logger is not None]
        try:
            yield loggers
            failed = False
        finally:
            for logger in loggers:
                if isinstance(logger, Wandb):
                    logger.finish(failed)


def drop_from(loggers: Sequence[Logger], step: int, prefix: str) -> None:
    """Drop from metrics.csv what was logged at this optimiser step or later under names that start with ``prefix``: the
    run logs it again."""
    for logger in loggers:
        if isinstance(logger, MetricsCsv):
            logger.drop_from(step, prefix)


def show_test(loggers: Sequence[Logger], charts: dict[str, Path], media: Callable[[Logger], object]) -> None:
    """Show a test beside its metrics: in TensorBoard ``charts`` (PNG files by name), in W&B what ``media`` gives to its
    logger."""
    for logger in loggers:
        if isinstance(logger, Wandb):
            logger.call(media)
        elif isinstance(logger, TensorBoard):
            from matplotlib.image import imread

            for name, path in charts.items():
                logger.experiment.add_image(name, imread(path), dataformats="HWC")
            logger.experiment.flush()
