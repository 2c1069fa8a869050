"""Training and testing of the classifier: loss, averaging, adapters, metrics, optimiser."""

import math
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import aum
from dcase.data.augment import Augment
from dcase.data.dataset import Batch
from dcase.data.labels import TAU22_LABELS, Labels
from dcase.data.loading import BatchLoader, mixed_seed
from dcase.errors import UserError
from dcase.machine import sum_over_all
from dcase.model.adapters import HEADS, LowRank, trainable
from dcase.model.averaging import WeightAverage
from dcase.model.metrics import SceneMetrics
from dcase.model.quantisation import rounded
from dcase.runs.config import EvalConfig, TrainConfig
from dcase.training.classifier import Classifier

HOST_RUNS_AHEAD = ("cuda",)  # types of device that compute while the host goes on
WARMUP_SHARE = 0.2  # of the run, at most: a longer warm-up would never reach the learning rate asked for


class Teacher(Protocol):
    """What `SceneClassifier` learns from beside the labels: `training.teachers.Teachers`."""

    def targets(self, batch: Batch, waveform: Tensor, length: Tensor) -> Tensor:
        """Return probabilities (b, n_classes) at --temperature, of a batch that is augmented to ``waveform``
        (b, 1, samples) at the model's rate."""


class SceneClassifier(Classifier):
    """The classifier with what training and testing need."""

    def __init__(
        self, config: EvalConfig, frames: int, device_ids: tuple[str, ...] = (), labels: Labels = TAU22_LABELS
    ):
        super().__init__(config, frames, device_ids, labels)
        self.metrics = SceneMetrics(labels)
        self.results: dict = {}  # of the last validation or test
        self.logits = torch.zeros(0)  # of its clips, in the data set's order: (n, n_classes), float32; then on the CPU
        self._unchecked: list[tuple] = []  # of batches: whether the loss is finite, clips, loader, epoch, step
        self.log_prefix = ""  # "a/" while the model of device a is trained
        self.train_loss = torch.zeros(2, dtype=torch.float64)  # sum over the epoch's clips so far, and their number
        self.total_steps = 0  # optimiser steps of the run, for the schedule
        self.teacher: Teacher | None = None
        self.adapters: LowRank | None = None  # while they are trained
        self.average: WeightAverage | None = None  # of `model`, while it is trained
        self.freeze_epochs = 0
        self.restored = False  # a checkpoint's optimiser, schedule and loops, as the first step shows
        if isinstance(config, TrainConfig):
            self.freeze_epochs = config.fit.freeze_epochs
            self.augment = Augment(config.augment, config.logmel, frames)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Augmentation and dropout depend only on seed, epoch, batch and process, not on where a run was interrupted.
        torch.manual_seed(mixed_seed(self.config.fit.seed, self.current_epoch, batch_idx, self.global_rank))
        if 0 < self.freeze_epochs >= self.current_epoch:
            self.train()  # not in on_train_epoch_start, which an epoch that is resumed in its middle does not have
        waveform, length = self.sound(batch)
        waveform = self.augment.waveform(waveform, batch.device, length)
        lengths = self.lengths(length)
        x, mix = self.augment.log_mel(self.logmel(waveform, length), self.logmel.silence, lengths)
        rounding = self.current_epoch >= self.config.fit.n_epochs - self.config.fit.qat_epochs
        logits = self.forward_model(x, mix.lengths(lengths), rounding).float()
        loss = F.cross_entropy(logits, mix(F.one_hot(batch.scene, logits.shape[1]).float()))
        if self.teacher is not None:
            loss = self.config.distill.loss(loss, logits, self.teacher.targets(batch, waveform, length), mix)
        loader = self.trainer.train_dataloader
        self._refuse_non_finite(loss, logits, batch, loader)
        self.log(f"{self.log_prefix}train/loss_step", loss, prog_bar=True, batch_size=len(batch.scene))
        counted = loader.counted(batch_idx)
        seen = loss.detach().double()
        self.train_loss += torch.stack([seen * counted, torch.full_like(seen, counted)])
        return loss * loader.weight(batch_idx)

    def forward_model(self, x: Tensor, lengths: Tensor | None = None, rounding: bool = True) -> Tensor:
        """Return logits (b, n_classes) of ``model`` for a log-mel (b, 1, n_mels, frames), of clips of ``lengths`` (b,)
        frames, with its adapters while they are trained, and with ``rounding`` its weights as they will be stored
        (--weight_bits)."""
        inputs = (x,) if lengths is None else (x, lengths)
        weights = dict(self.model.named_parameters())
        if self.adapters is not None:
            weights |= self.adapters.weights(self.model)
        elif not rounding or self.config.storage.weight_bits == 32:
            return self.model(*inputs)
        if rounding:
            weights = rounded(weights, self.config.storage.weight_bits)
        return functional_call(self.model, weights, inputs)

    # What is trained

    def choose_trained(self, finetune: str, rank: int) -> None:
        """Train all of ``model`` ("full"), low-rank additions to its matrices ("lora"), or its classifier ("head")."""
        trainable(self.model, finetune)
        self.train()
        if finetune == "lora":
            self.adapters = LowRank(self.model, rank)
            print(self.adapters.line())

    def trained(self) -> nn.Module:
        """Return what is trained: the model, or the adapters of its matrices."""
        return self.model if self.adapters is None else self.adapters

    def merged(self) -> dict[str, Tensor]:
        """Return ``model``'s state dict on the CPU, adapters added in."""
        state = self.model.state_dict() if self.adapters is None else self.adapters.merged(self.model)
        return {name: value.detach().cpu() for name, value in state.items()}

    def start_averaging(self) -> None:
        """Keep an average of ``model`` from now on, or from where a checkpoint loaded afterwards has it."""
        if self.config.fit.ema_decay:
            self.average = WeightAverage(self.trained(), self.config.fit.ema_decay)

    def averaged(self):
        """Return a context in which the average, where one is kept, replaces the model's weights."""
        return nullcontext() if self.average is None else self.average.swapped(self.trained())

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.restored = True
        if self.average is not None:
            self.average.update(self.trained())

    def frozen(self, name: str) -> bool:
        """Return whether a part of ``model`` is not trained in this epoch (--freeze_epochs)."""
        return self.current_epoch < self.freeze_epochs and name.partition(".")[0] not in HEADS

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Without a gradient AdamW neither moves nor decays a weight, and clipping does not count it. Not requires_grad:
        # DDP and torch.compile would hold on to what it was at the start.
        for name, parameter in self.model.named_parameters():
            if self.frozen(name):
                parameter.grad = None

    def train(self, mode: bool = True) -> "SceneClassifier":
        super().train(mode)
        for name, layer in self.model.named_modules():  # where a BatchNorm is not trained, its statistics stay too
            is_norm = isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
            if is_norm and (self.frozen(name) or not layer.weight.requires_grad):
                layer.eval()
        return self

    def on_train_start(self) -> None:
        self.train()  # a run resumed after --freeze_epochs must not start in epoch 0's frozen state
        self.train_loss = self.train_loss.to(self.device)

    def epoch_loss(self) -> float:
        """Return the mean loss over the epoch's clips of all processes, and start the next epoch's."""
        total, clips = sum_over_all(self.train_loss).tolist()
        self.train_loss = torch.zeros_like(self.train_loss)
        return total / clips

    def configure_optimizers(self):
        fit = self.config.fit
        groups = aum.parameter_groups(self.trained(), fit.weight_decay, fit.lr, fit.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=fit.lr)
        # Not trainer.estimated_stepping_batches: it would start the loader before a resumed run knows its epoch.
        total = self.total_steps
        warmup = min(fit.warmup_steps, int(WARMUP_SHARE * total))
        if warmup < fit.warmup_steps:
            print(f"--warmup_steps {fit.warmup_steps} is more than a fifth of the run's {total} steps: {warmup} used")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Validation and test

    def _evaluate(self, batch: Batch, batch_idx: int, loader: BatchLoader) -> None:
        logits = self.by_device(self.forward_model, *self.sound(batch), batch.device).float()
        loss = F.cross_entropy(logits, batch.scene, reduction="none")
        self._refuse_non_finite(loss, logits, batch, loader)
        n = loader.counted(batch_idx)
        self.metrics.update(logits[:n], batch.scene[:n], batch.device[:n], loss[:n])
        if not len(self.logits):
            self.logits = logits.new_zeros(len(loader.dataset), logits.shape[1])
        self.logits[batch.index[:n]] = logits[:n]

    def _finish(self, stage: str, step: int) -> None:
        self.refuse_non_finite()
        self.results = self.metrics.compute()
        self.logits = sum_over_all(self.logits).cpu()  # one process evaluated each clip
        self.metrics.reset()
        shown = {name: self.results[name] for name in ("macro_avg_acc", "acc", "loss")}
        for table in ("scene_acc", "device_acc", "device_group_acc"):
            shown |= {f"{table}/{name}": value for name, value in self.results[table].items()}
        self.log_now({f"{stage}/{name}": value for name, value in shown.items() if value is not None}, step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.trainer.val_dataloaders)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.trainer.test_dataloaders)

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.logits = torch.zeros(0)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._finish("val", max(0, self.trainer.global_step - 1))

    def on_test_epoch_end(self) -> None:
        self._finish("test", 0)

    def log_now(self, metrics: dict[str, float], step: int) -> None:
        """Log without Lightning's delay: a kill between a checkpoint and its metrics would lose them."""
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{self.log_prefix}{name}": value for name, value in metrics.items()}, step=step)

    def _refuse_non_finite(self, loss: Tensor, logits: Tensor, batch: Batch, loader: BatchLoader) -> None:
        """Raise `UserError` where a loss is not finite: at once on a CPU. On a GPU, where a look makes the host wait,
        at the next logging step, or before anything is saved."""
        at = batch.index, logits.isfinite().all(1), loader, self.current_epoch + 1, self.global_step
        self._unchecked.append((loss.isfinite().all(), *at))
        if loss.device.type not in HOST_RUNS_AHEAD or len(self._unchecked) >= self.trainer.log_every_n_steps:
            self.refuse_non_finite()

    def refuse_non_finite(self) -> None:
        """Raise `UserError` where the loss of a batch was not finite, and nobody has looked yet."""
        batches, self._unchecked = self._unchecked, []
        finite = torch.stack([finite for finite, *_ in batches]).tolist() if batches else []
        for is_finite, (_, index, right, loader, epoch, step) in zip(finite, batches, strict=True):
            if not is_finite:
                if 0 < right.sum() < len(right):  # else no clip stands out
                    index = index[~right.to(index.device)]
                raise UserError(
                    f"the loss is not finite in epoch {epoch}, step {step}; its checkpoints, if any, are from before. "
                    f"Lower --lr, use --precision 32, or look at these clips: {', '.join(loader.names(index))}"
                )

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.refuse_non_finite()
        super().on_save_checkpoint(checkpoint)
        if self.average is not None and not self.average.in_place:
            checkpoint["average"] = self.average.state_dict()
        checkpoint["train_loss"] = self.train_loss.tolist()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.refuse_other_clips(checkpoint, "the run that is resumed")
        if checkpoint["clips_per_step"] != self.clips_per_step:
            raise UserError(
                f"the run that is resumed took {checkpoint['clips_per_step']} clips per optimiser step (processes x "
                f"--batch_size x --accumulate_grad_batches), and this one would take {self.clips_per_step}: give the "
                "same --devices and --num_nodes as before"
            )
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        if self.global_rank == 0:  # the sum over all processes
            self.train_loss = torch.tensor(checkpoint["train_loss"], dtype=torch.float64)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the share of the learning rate: linear from 0 to 1 over ``warmup`` steps, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
