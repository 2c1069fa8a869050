"""Where figures go while a model is trained: metrics.csv always, and W&B or TensorBoard beside it (--logger).

In W&B a run is shown under its own id. Stage 2 stands in one group with the general model's run, ``best/...`` in its
summary is the best validated epoch, and charts have the optimiser's step as axis. ``wandb sync`` of an offline run
sends the same.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from dcase.errors import UserError, one_line
from dcase.files import replace_file
from dcase.runs import artifacts
from dcase.runs.folder import Run, RunConfig


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

    def __init__(self, logger: Logger, run: Run, keeps_checkpoints: bool = False):
        """``keeps_checkpoints``: they are uploaded, too."""
        super().__init__()
        self._logger, self._run, self._keeps_checkpoints, self._works = logger, run, keeps_checkpoints, True

    name = version = ""  # of Logger; the progress bar would show others

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass  # W&B has them since its start

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.call(lambda logger: logger.log_metrics(metrics, step))

    def summarise(self, figures: dict[str, float]) -> None:
        """Show these as the run's own, whatever is logged later."""
        self.call(lambda logger: logger.experiment.summary.update(figures))

    def keep_checkpoints(self) -> None:
        """Upload them as they are now, where --log_checkpoints asks for it."""
        if self._keeps_checkpoints:
            self.call(lambda logger: artifacts.upload(logger.experiment, self._run))

    def finish(self, failed: bool) -> None:
        self.keep_checkpoints()
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
                where = self._run.folder
                print(f"W&B has failed ({one_line(error)}); the run goes on without it, metrics go to {where}")


def wandb_logger(
    config: RunConfig, run: Run, name: str, content: dict, group: str | None = None, job_type: str | None = None
) -> Wandb | None:
    """W&B's logger for this run's id: online, or offline where it cannot be reached; None where it is disabled or does
    not even work offline. Training never waits for it longer than half a minute.

    ``content`` is the configuration to show there; runs of one ``group`` are shown together, those of a ``job_type``
    told apart in it. Uploaded are metrics, configuration, plots, what was predicted of each test clip, and a dozen
    mistakes as log-mel pictures with their file names; sound never, checkpoints with --log_checkpoints.
    """
    modes = {"disabled": (), "offline": ("offline",)}.get(config.wandb_mode, (config.wandb_mode, "offline"))
    for mode in modes:
        try:
            experiment, mode = _start_wandb(mode, config, run, name, content, group, job_type)
        except Exception as error:  # whatever ails W&B, its folder or the network, the run goes on
            what = f"W&B cannot be used {mode if mode == 'offline' else 'online'}"
            print(f"{what} ({type(error).__name__}: {one_line(error)}); metrics go to {run.folder}")
            _end_wandb()  # it would hold on to the run's id
            continue
        sync = f" (send it with: wandb sync {Path(experiment.dir).parent})" if mode == "offline" else ""
        print(f"W&B: {mode}, run id {run.id}{sync}")
        from pytorch_lightning.loggers import WandbLogger

        return Wandb(WandbLogger(experiment=experiment), run, config.log_checkpoints)
    return None


def _end_wandb() -> None:
    with suppress(Exception):
        sys.modules["wandb"].teardown()


def _start_wandb(
    mode: str, config: RunConfig, run: Run, name: str, content: dict, group: str | None, job_type: str | None
):
    """(W&B's run, "online" or "offline")."""
    import wandb  # 2 seconds: only where it is wanted

    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
    experiment = wandb.init(
        project=Path(config.project_name).name,
        id=run.id,
        name=name,
        group=os.environ.get("WANDB_RUN_GROUP") or group,  # seeds.py sets it, or the user
        job_type=job_type,
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


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files, in the run's folder: ``tensorboard --logdir <project_name>`` shows all runs of a project.

    A resumed run drops from the files that it finds what it will redo. SummaryWriter's ``purge_step`` would hide every
    later step, those of other devices' models too, and each model's steps begin at 0.
    """

    def __init__(self, run: Run):
        super().__init__(run.folder, name="tensorboard", version="", default_hp_metric=False)
        self._earlier = sorted(Path(self.log_dir).glob("events.out.tfevents.*"))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def drop_from(self, step: int, prefix: str) -> None:
        """As `MetricsCsv.drop_from`, of what was logged before this process; charts are of step 0."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

        for path in self._earlier:
            records = list(RawEventFileLoader(str(path)).Load())  # a record that a kill has cut is left out
            kept = []
            for record in records:
                event = Event.FromString(record)
                if event.step < step or not any(value.tag.startswith(prefix) for value in event.summary.value):
                    kept.append(record)
            if len(kept) < len(records):
                replace_file(path, partial(_write_records, kept))


def _write_records(records: Iterable[bytes], path: Path) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)


def drop_from(loggers: Sequence[Logger], step: int, prefix: str) -> None:
    """Drop what was logged at this optimiser step or later under names that start with ``prefix``: the run does it
    again. W&B cannot."""
    for logger in loggers:
        if isinstance(logger, (MetricsCsv, TensorBoard)):
            logger.drop_from(step, prefix)


def tensorboard_logger(run: Run) -> TensorBoard:
    """Raises `UserError` where TensorBoard is not installed."""
    try:
        logger = TensorBoard(run)
    except ModuleNotFoundError as error:
        raise UserError("--logger tensorboard: it is not installed: pip install -r requirements.txt") from error
    print(f"TensorBoard: tensorboard --logdir {logger.log_dir}")
    return logger


def show_charts(logger: TensorBoardLogger, paths: dict[str, Path]) -> None:
    """Charts (PNG) by the names that TensorBoard is to show them under."""
    from matplotlib.image import imread

    for name, path in paths.items():
        logger.experiment.add_image(name, imread(path), dataformats="HWC")
    logger.experiment.flush()
