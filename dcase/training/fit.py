"""The Trainer of every script, its checkpoints, and the log-mel's normalisation."""

import logging
import math
import os
import shlex
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException

import aum
from aum.allocator import keep_freed_memory
from aum.scan import choose
from dcase.data.dataset import TAU22
from dcase.data.loading import Batches, evaluation_batches, loader, shuffled
from dcase.errors import Stopped, UserError, doctor_tells_more, one_line
from dcase.machine import (
    MachineConfig,
    from_main,
    is_main,
    largest_of_all,
    process_count,
    process_rank,
    same_everywhere,
    start_processes,
    sum_over_all,
)
from dcase.progress import progress
from dcase.runs.checkpoints import SafeCheckpoints, newest_checkpoint
from dcase.runs.config import TrainConfig
from dcase.runs.loggers import Wandb, drop_from
from dcase.training.bars import Bars
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan, TimeLeft
from dcase.training.stopping import StopRequest
from dcase.training.teachers import Teachers

DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the data in the scan
MONITOR = "macro_avg_acc"  # on the validation clips
FEWEST_STEPS, FEWEST_VAL = 10, 50  # of an epoch, validation clips: with fewer, chance decides
NORMALISATION_CLIPS = 5000  # at most: enough for four digits of the mean


class KeepCheckpoints(Checkpoint):
    """Writes last.ckpt after every epoch, and within one where a signal ends the run; with ``keep_best`` also
    best.ckpt, weights only, when validation accuracy reaches a new maximum.

    Lightning's ModelCheckpoint would forget the best score of a run whose folder was moved. Validation is started here
    and not by Lightning, so that last.ckpt holds an epoch's training before its validation begins.
    """

    def __init__(self, folder: Path, planned: Plan, stop: StopRequest, keep_best: bool = True):
        self.folder, self.planned, self.stop, self.keep_best = folder, planned, stop, keep_best
        self.best_score: float | None = None
        self.best_loss: float | None = None  # on the same clips
        self.best_epoch: int | None = None
        self.validation_due = False
        self.stopped_by = 0  # number of the signal

    def on_train_start(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        self.stop.take_over()
        drop_from(trainer.loggers, trainer.global_step, module.log_prefix)  # a resumed run logs it again
        self._catch_up(trainer, module)

    def on_fit_end(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        # Where a resumed run has only the last epoch's validation left to do. Lightning has cleaned up by now.
        module.to(trainer.strategy.root_device)
        self._catch_up(trainer, module)
        module.cpu()

    def _catch_up(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        if self.validation_due:
            drop_from(trainer.loggers, trainer.global_step - 1, f"{module.log_prefix}val/")
            progress = trainer.fit_loop.epoch_progress.current
            progress.completed -= 1  # as when the epoch's training ended: checkpoints record the epoch
            self._validate(trainer, module)
            progress.completed += 1

    def on_train_batch_end(self, trainer: pl.Trainer, module: SceneClassifier, outputs, batch, batch_idx: int) -> None:
        # Between optimiser steps only. An epoch's last batch leaves it to the epoch's end.
        last = batch_idx + 1 == trainer.num_training_batches
        if not last and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.stopped_by = self._signal(trainer)
            if self.stopped_by:
                module.train_loss = sum_over_all(module.train_loss)  # the epoch goes on from the main process's file
                self._save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args) -> None:
        self._stop(trainer)  # not sooner: Lightning still had to log the last batch

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        module.refuse_non_finite()  # it names the clips
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"{name} is not finite after epoch {trainer.current_epoch + 1}; the checkpoints were saved before "
                    "that. Lower --lr, clip the gradient (--gradient_clip_val 1) or use --precision 32"
                )
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        loss = module.epoch_loss()
        module.log_now({"train/loss": loss, "lr": lr}, trainer.global_step - 1)
        trainer.progress_bar_callback.tell(trainer, loss)
        self.validation_due = self.planned.validates(epochs_done(trainer))
        self._save(trainer)
        self._stop_if_asked(trainer)
        if self.validation_due:
            self._validate(trainer, module)

    def _validate(self, trainer: pl.Trainer, module: SceneClassifier) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        with module.averaged():
            same_everywhere(module.model.buffers())  # BatchNorm's statistics; the main process's are saved
            trainer.validating = True
            loop.run()
            trainer.training = True
            epoch, score, loss = epochs_done(trainer), module.results[MONITOR], module.results["loss"]
            better = self.keep_best and (self.best_score is None or score > self.best_score)
            if better:
                self.best_score, self.best_loss, self.best_epoch = score, loss, epoch - 1
                trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        clips, steps = len(trainer.val_dataloaders.dataset), module.total_steps // trainer.max_epochs
        of = f"{clips:,} clip{'s' if clips > 1 else ''}, {steps:,} step{'s' if steps > 1 else ''} an epoch"
        trainer.progress_bar_callback.print(
            f"epoch {epoch}: validation macro_avg_acc {100 * score:.2f} %, loss {loss:.4f} ({of}"
            + ("; best epoch so far)" if better else ")")
        )
        self.validation_due = False
        self._save(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                if self.keep_best:
                    best = {MONITOR: self.best_score, "loss": self.best_loss, "epoch": self.best_epoch + 1}
                    logger.summarise({f"{module.log_prefix}best/{name}": value for name, value in best.items()})
                logger.keep_checkpoints()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args) -> None:
        self._stop_if_asked(trainer)  # last.ckpt holds the epoch; its validation is done again

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def _signal(self, trainer: pl.Trainer) -> int:
        return largest_of_all(self.stop.received, trainer.strategy.root_device)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        self.stopped_by = self._signal(trainer)
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        if self.stopped_by:
            name, epoch = signal.Signals(self.stopped_by).name, trainer.current_epoch + 1
            said = f"stopped by {name}, saved in epoch {epoch} after {trainer.global_step} steps in all"
            raise Stopped(self.stopped_by, said)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("best_score", "best_loss", "best_epoch", "validation_due")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """Turn Lightning's silent exit on a signal into an exception that `errors.run` reports."""
    try:
        yield
    except SIGTERMException as end:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM") from end
    except SystemExit as end:
        raise KeyboardInterrupt from end


class PlainSignals(Callback):
    """Lets SIGTERM end an evaluation as it ends any program. Lightning's handler would end it with exit code 0."""

    def on_test_start(self, *args) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    on_validation_start = on_test_start


def checkpoint_to_resume(folder: Path) -> Path | None:
    """Return the main process's `newest_checkpoint`; None where a run begins."""
    return from_main(newest_checkpoint(folder) if is_main() else None)


def scan_of(model: torch.nn.Module, device: torch.device, precision: str) -> str | None:
    """Return the name of the scan backend that an Audio Mamba uses there; None for another model."""
    return choose(device.type, DTYPES[precision]) if isinstance(model, aum.AudioMamba) else None


def epochs_done(trainer: pl.Trainer) -> int:
    """Return the number of trained epochs. ``trainer.current_epoch`` is one less while a run is being resumed."""
    return trainer.fit_loop.epoch_progress.current.processed


def batches_done(trainer: pl.Trainer, n_batches: int) -> int:
    """Return the number of batches that a resumed run has trained in the current epoch; 0 where it is complete."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed % n_batches


@doctor_tells_more
def check_machine(machine: MachineConfig) -> None:
    """Start the processes that train together, and print which scan will run, and why.

    Raises `UserError` for flags that do not fit this machine, before anything is written or read.
    """
    if machine.scan_backend != "auto":
        os.environ["AUM_SCAN_BACKEND"] = machine.scan_backend  # for the processes that this one starts, too
    trainer = make_trainer(machine, Path("."), [])
    started = int(os.environ.get("WORLD_SIZE", trainer.world_size))
    if "LOCAL_RANK" in os.environ and started != trainer.world_size:  # torchrun sets both
        raise UserError(
            f"{started} processes were started, and --devices {machine.devices} --num_nodes {machine.num_nodes} make "
            f"{trainer.world_size}: make them match"
        )
    if trainer.world_size > 1:
        start_processes(trainer)
    device = trainer.strategy.root_device.type
    try:
        choose(device, DTYPES[machine.precision])
    except ValueError as error:
        raise UserError(f"--scan_backend (or AUM_SCAN_BACKEND): {error}") from error
    if device == "cpu":
        keep_freed_memory()
    elif device == "cuda":
        round_float32(machine.float32_matmul)


def round_float32(how: str) -> None:
    """Set how a GPU rounds float32 matrix products (--float32_matmul), and convolutions with them, for which torch's
    default is TF32."""
    torch.set_float32_matmul_precision(how)
    torch.backends.cudnn.allow_tf32 = how != "highest"


def make_trainer(
    machine: MachineConfig, folder: Path, loggers: list[Logger], config: TrainConfig | None = None, checkpoints=None
) -> pl.Trainer:
    """Return Lightning's Trainer; without ``config`` only for evaluation. Raises `UserError` for flags that it
    refuses."""
    quieten()
    fit = {}
    if config is not None:
        fit = {
            "max_epochs": config.fit.n_epochs,
            "check_val_every_n_epoch": config.fit.n_epochs + 1,  # never: KeepCheckpoints validates
            "accumulate_grad_batches": config.fit.accumulate_grad_batches,
            "gradient_clip_val": config.fit.gradient_clip_val or None,
        }
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
            callbacks=[checkpoints or PlainSignals(), Bars()],
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # loading.Batches knows the processes
            log_every_n_steps=50,
            **fit,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"--accelerator, --devices, --strategy or --precision do not fit this machine: {error}"
        ) from error
    return trainer


def quieten() -> None:
    """Silence Lightning's routine messages, so that our lines, progress bars and real warnings stand out."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    if is_main():
        logging.getLogger("aum").setLevel(logging.INFO)  # which scan backend is used, and why
    for message in (
        ".*does not have many workers.*",
        ".*lower value for log_every_n_steps.*",
        ".*have no `val_dataloader`.*",  # --val_fraction 0
        ".*LeafSpec.*",
        "Grad strides do not match bucket view strides",  # DDP, of (n, 1) weights
        # Lightning cannot know that loading.Batches begins where an interrupted run was.
        ".*resuming from a checkpoint that ended before the epoch ended.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def seed_everything(seed: int) -> None:
    """Seed every source of random numbers, in the processes that read clips too."""
    pl.seed_everything(seed, workers=True, verbose=False)


def fit_normalisation(module: SceneClassifier, train: TAU22, machine: MachineConfig) -> None:
    """Set the log-mel's mean and deviation from the training clips, at most about 5,000 evenly spaced ones."""
    clips = range(0, len(train), -(-len(train) // NORMALISATION_CLIPS))
    if is_main():
        batches = loader(train, machine, Batches(len(clips), machine.batch_size, lambda: clips))
        shown = progress(batches, desc="mean and deviation of the log-mel", leave=False)
        module.logmel.fit(module.sound(batch) for batch in shown)
    found = from_main((module.logmel.mean.item(), module.logmel.std.item()))
    for buffer, value in zip((module.logmel.mean, module.logmel.std), found, strict=True):
        buffer.fill_(value)


@doctor_tells_more
def _prepare_model(module: SceneClassifier, trainer: pl.Trainer, config: TrainConfig) -> None:
    """Test the scan at the model's sizes on the training device, and compile the model with --compile."""
    device = trainer.strategy.root_device
    try:
        if isinstance(module.model, aum.AudioMamba):
            aum.tested_backend(device, DTYPES[config.machine.precision], module.model.config)
    except aum.SelfTestFailed as error:
        raise UserError(f"{error}. Train with --scan_backend torch, and please report this") from error
    if config.fit.compile:
        if device.type == "cpu" and not shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]):
            raise UserError("--compile needs a C++ compiler on the CPU: install one (apt install g++), or leave it out")
        # In place, so that checkpoints keep their names. Launches dominate 65 tokens: replay CUDA graphs on GPUs.
        module.model.compile(mode="reduce-overhead" if device.type == "cuda" else "default")


def plan(n_train: int, n_val: int, config: TrainConfig) -> Plan:
    """Return the epochs and batches of training on so many clips."""
    together = config.machine.batch_size * process_count()
    every = config.fit.check_val_every_n_epoch if n_val else None
    return Plan(config.fit.n_epochs, math.ceil(n_train / together), every, math.ceil(n_val / together))


def too_few(n_train: int, n_val: int, config: TrainConfig) -> list[str]:
    """Return warnings about so few steps or validation clips that chance decides, with flags that help."""
    fit, said = config.fit, []
    steps = math.ceil(plan(n_train, n_val, config).batches / fit.accumulate_grad_batches)
    if steps < FEWEST_STEPS:
        together = FEWEST_STEPS * fit.accumulate_grad_batches * process_count()
        smaller = 2 ** max(1, (n_train // together).bit_length() - 1)
        made = f"{n_train:,} training clips make only {steps} optimiser step{'s' if steps > 1 else ''} an epoch"
        said.append(f"{made}, {steps * fit.n_epochs:,} in all: --batch_size {smaller} makes more")
    if 0 < n_val < FEWEST_VAL:
        more = "--val_fraction 0.3 holds out more, and " if n_val < 0.25 * (n_train + n_val) else ""
        said.append(
            f"only {n_val} validation clip{'s choose' if n_val > 1 else ' chooses'} the best epoch, and a clip is "
            f"{100 / n_val:.0f} points: {more}--val_fraction 0 trains on all clips and keeps the last epoch"
        )
    if n_val and fit.check_val_every_n_epoch > fit.n_epochs:
        said.append(
            f"--check_val_every_n_epoch {fit.check_val_every_n_epoch} is more than --n_epochs {fit.n_epochs}: only the "
            "last epoch is validated, and nothing is chosen; --check_val_every_n_epoch 1 validates each"
        )
    return said


@contextmanager
def clear_restore(module: SceneClassifier, path: Path | None) -> Iterator[None]:
    """Raise `UserError`, naming the checkpoint, where Lightning cannot restore it: of its entries it checks nothing."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if path is None or module.restored:
            raise
        raise UserError(f"{path} cannot be resumed ({type(error).__name__}: {one_line(error):.200})") from error


def train(
    module: SceneClassifier,
    train_clips: TAU22,
    val_clips: TAU22 | None,
    config: TrainConfig,
    folder: Path,
    loggers: list[Logger],
    teachers: Teachers | None = None,
    later: Sequence[Plan] = (),
    earlier: Sequence[Plan] = (),
    keep_best: bool = True,
) -> None:
    """Train into ``folder``/{last,best}.ckpt, from last.ckpt where it exists; without ``keep_best``, validation clips
    choose no epoch.

    ``later`` is what the run trains after this, for the time that is left; ``earlier`` what it has trained before.
    """
    fit = config.fit
    if teachers:
        if config.distill.teacher_input == "cached":
            teachers.keep(train_clips.clips)
        module.teacher = teachers
    module.start_averaging()
    stop = StopRequest()
    planned = plan(len(train_clips), len(val_clips) if val_clips else 0, config)
    checkpoints = KeepCheckpoints(folder, planned, stop, keep_best)
    trainer = make_trainer(config.machine, folder, loggers, config, checkpoints)
    _prepare_model(module, trainer, config)
    batches = Batches(
        len(train_clips),
        config.machine.batch_size,
        order=lambda: shuffled(len(train_clips), fit.seed, epochs_done(trainer)),
        start=lambda: batches_done(trainer, len(batches)),
        accumulate=fit.accumulate_grad_batches,
        rank=process_rank(),
        processes=process_count(),
    )
    module.total_steps = math.ceil(len(batches) / fit.accumulate_grad_batches) * fit.n_epochs
    trainer.progress_bar_callback.time_left = TimeLeft(planned, later, earlier)
    module.clips_per_step = batches.together * fit.accumulate_grad_batches
    validation = loader(val_clips, config.machine, evaluation_batches(val_clips, config.machine)) if val_clips else None
    resumed = checkpoint_to_resume(folder)
    with stop:
        with no_silent_exit():
            with clear_restore(module, resumed):
                trainer.fit(
                    module,
                    loader(train_clips, config.machine, batches),
                    validation,
                    ckpt_path=resumed,
                    weights_only=True,
                )
        number = largest_of_all(stop.received, trainer.strategy.root_device)
        if number:  # it came after the last step's end
            raise Stopped(number, f"stopped by {signal.Signals(number).name} after training")
