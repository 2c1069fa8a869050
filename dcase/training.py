"""What both training scripts need around the module: the Trainer, its checkpoints, and the normalisation."""

import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import Subset
from tqdm import tqdm

import aum
from aum.allocator import keep_freed_memory
from aum.scan import choose
from dcase.config import EvalConfig, MachineConfig, TrainConfig, to_plain
from dcase.errors import UserError
from dcase.lit import SceneClassifier
from dcase.loading import EpochOrder, loader
from dcase.runs import MetricsCsv, Run, SafeCheckpoints, wandb_logger
from dcase.tau22 import TAU22

DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the data in the scan
MONITOR = "macro_avg_acc"  # on the validation clips
NORMALISATION_CLIPS = 5000  # at most: enough for four digits of the mean


class KeepCheckpoints(Checkpoint):
    """last.ckpt after every epoch; best.ckpt, weights only, when validation accuracy is higher than ever before.

    Lightning's ModelCheckpoint would forget the best score of a run whose folder was moved.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best_score: float | None = None
        self.best_epoch: int | None = None

    def on_validation_end(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        score = module.results[MONITOR]
        better = self.best_score is None or score > self.best_score
        if better:
            self.best_score, self.best_epoch = score, trainer.current_epoch
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        loss = module.results["loss"]
        trainer.progress_bar_callback.print(
            f"epoch {trainer.current_epoch + 1}: validation macro_avg_acc {100 * score:.2f} %, loss {loss:.4f}"
            + (" (best so far: kept)" if better else "")
        )

    def on_train_start(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.drop_from(trainer.global_step, module.log_prefix)  # a resumed run logs it again
        self._validate_the_last_epoch(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        self._validate_the_last_epoch(trainer)

    def _validate_the_last_epoch(self, trainer: pl.Trainer) -> None:
        if epochs_done(trainer) + 1 >= trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"{name} is not finite after epoch {trainer.current_epoch + 1}; the checkpoints are of before. "
                    "Lower --lr, clip the gradient (--gradient_clip_val 1) or use --precision 32"
                )
        # Lightning would log these after the checkpoint is saved: a kill in between would lose them.
        name = f"{module.log_prefix}train/loss"
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {name: trainer.callback_metrics[name].item(), f"{module.log_prefix}lr": lr}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def state_dict(self) -> dict:
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict) -> None:
        self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]


def epochs_done(trainer: pl.Trainer) -> int:
    """Whole epochs behind a run. ``trainer.current_epoch`` is one less while a run is being resumed."""
    return trainer.fit_loop.epoch_progress.current.processed


def check_machine(machine: MachineConfig) -> None:
    """Raise `UserError` for flags that do not fit this machine, before anything is made or read.

    Says which scan will run, and why.
    """
    if machine.scan_backend != "auto":
        os.environ["AUM_SCAN_BACKEND"] = machine.scan_backend  # for the processes that this one starts, too
    trainer = make_trainer(machine, Path("."), [])
    device = trainer.strategy.root_device.type
    try:
        choose(device, DTYPES[machine.precision])
    except ValueError as error:
        raise UserError(f"--scan_backend (or AUM_SCAN_BACKEND): {error}") from error
    if device == "cpu":
        keep_freed_memory()


def make_trainer(
    machine: MachineConfig, folder: Path, loggers: list[Logger], config: TrainConfig | None = None, checkpoints=None
) -> pl.Trainer:
    """Lightning's Trainer; without ``config`` only for evaluation. Raises `UserError` for flags that it refuses."""
    quieten()
    fit = {}
    if config is not None:
        fit = {
            "max_epochs": config.fit.n_epochs,
            "check_val_every_n_epoch": config.fit.check_val_every_n_epoch,
            "gradient_clip_val": config.fit.gradient_clip_val or None,
            "callbacks": [checkpoints],
        }
    fit["callbacks"] = [*fit.get("callbacks", []), TQDMProgressBar(leave=False)]
    try:
        trainer = pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.num_nodes,
            strategy=machine.strategy,
            precision=machine.precision,
            deterministic=machine.deterministic or None,
            default_root_dir=folder,
            logger=loggers,
            plugins=[SafeCheckpoints()],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=50,
            **fit,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"--accelerator, --devices, --strategy or --precision do not fit this machine: {error}"
        ) from error
    if trainer.world_size > 1:
        raise UserError("training in several processes is not in this version: use --devices 1 --num_nodes 1")
    return trainer


@contextmanager
def loggers(config: EvalConfig, run: Run) -> Iterator[list[Logger]]:
    """metrics.csv and, where it can be used, W&B under the run's own id; W&B is told when it is over."""
    name = config.run.experiment_name or config.model.model
    wandb = wandb_logger(config.run, run, name, to_plain(config))
    failed = True
    try:
        yield [MetricsCsv(run.folder / "metrics.csv"), *([wandb] if wandb else [])]
        failed = False
    finally:
        if wandb:
            wandb.experiment.finish(exit_code=int(failed))


def quieten() -> None:
    """Leave the terminal to what matters: our lines, progress bars and real warnings."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("aum").setLevel(logging.INFO)  # which scan backend is used, and why
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*lower value for log_every_n_steps.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def fit_normalisation(module: SceneClassifier, train: TAU22, machine: MachineConfig) -> None:
    """Set the log-mel's mean and deviation from the training clips: all of them, or 5,000 evenly spaced ones."""
    step = -(-len(train) // NORMALISATION_CLIPS)
    batches = loader(Subset(train, range(0, len(train), step)), machine)
    shown = tqdm(batches, desc="mean and deviation of the log-mel", leave=False)
    module.logmel.fit((batch.waveform, batch.length) for batch in shown)


def _prepare_model(module: SceneClassifier, trainer: pl.Trainer, config: TrainConfig) -> None:
    """Test the scan on the device that is to train, and compile the model where asked to."""
    device = trainer.strategy.root_device
    try:
        aum.self_test(device, DTYPES[config.machine.precision])
    except aum.SelfTestFailed as error:
        raise UserError(f"{error}. Train with --scan_backend torch, and please report this") from error
    if config.fit.compile:
        if device.type == "cpu" and not shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]):
            raise UserError("--compile needs a C++ compiler on the CPU: install one (apt install g++), or leave it out")
        # In place, so that checkpoints keep their names. 65 tokens are bound by launches: on GPUs replay CUDA graphs.
        module.model.compile(mode="reduce-overhead" if device.type == "cuda" else "default")


def train(
    module: SceneClassifier,
    train_clips: TAU22,
    val_clips: TAU22 | None,
    config: TrainConfig,
    folder: Path,
    loggers: list[Logger],
) -> KeepCheckpoints:
    """Train into ``folder``/{last,best}.ckpt, from last.ckpt where there is one; says which epoch was best."""
    checkpoints = KeepCheckpoints(folder)
    trainer = make_trainer(config.machine, folder, loggers, config, checkpoints)
    _prepare_model(module, trainer, config)
    last = folder / "last.ckpt"
    order = EpochOrder(len(train_clips), config.fit.seed, lambda: epochs_done(trainer))
    batches = loader(train_clips, config.machine, order)
    module.total_steps = len(batches) * config.fit.n_epochs
    try:
        trainer.fit(
            module,
            batches,
            loader(val_clips, config.machine) if val_clips else None,
            ckpt_path=last if last.exists() else None,
            weights_only=True,
        )
    except SystemExit as end:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from end
    return checkpoints
