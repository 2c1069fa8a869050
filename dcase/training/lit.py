"""The one LightningModule of both stages: front end, augmentation, model, loss, metrics, optimiser."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import aum
from dcase.data.augment import Masking, Mix, freq_mixstyle, roll
from dcase.data.dataset import TAU22, Batch
from dcase.data.labels import SCENES
from dcase.data.loading import BatchLoader, mixed_seed
from dcase.data.logmel import LogMel, frames_of
from dcase.data.responses import DeviceResponses
from dcase.data.tau22 import DEVICES
from dcase.errors import UserError
from dcase.machine import sum_over_all
from dcase.model.adapters import HEADS, LowRank, trainable
from dcase.model.averaging import WeightAverage
from dcase.model.devices import forward_by_device
from dcase.model.distillation import soft_loss, soft_targets
from dcase.model.metrics import SceneMetrics
from dcase.model.named import build
from dcase.model.pruning import shrink
from dcase.model.quantisation import rounded
from dcase.runs.checkpoints import FORMAT, final_state
from dcase.runs.config import EvalConfig, TrainConfig, from_plain, to_plain

WARMUP_SHARE = 0.2  # of the run, at most: a longer warm-up would never reach the learning rate asked for


class Teacher(Protocol):
    """What `SceneClassifier` learns from beside the labels: `training.teachers.Teachers`."""

    def logits(self, batch: Batch, waveform: Tensor, length: Tensor) -> Tensor:
        """(b, n_classes), of clips that are heard as ``waveform`` (b, 1, samples) at the model's rate."""


class SceneClassifier(pl.LightningModule):
    """Waveform (b, 1, samples) and device (b,) -> logits (b, scenes).

    ``model`` is the general model; ``device_models`` are those fine-tuned for one device each, in stage 2. A checkpoint
    is whole: it carries the configuration, the number of frames and the normalisation, and `from_checkpoint` rebuilds
    the module from nothing else.
    """

    def __init__(self, config: EvalConfig, frames: int, device_ids: tuple[str, ...] = ()):
        super().__init__()
        self.config = config
        self.frames = frames
        self.logmel = LogMel(config.logmel, config.data.orig_sample_rate)
        self.model = build(config.model, config.logmel.n_mels, frames)
        self.device_models = nn.ModuleDict({device_id: copy.deepcopy(self.model) for device_id in device_ids})
        self.metrics = SceneMetrics()
        self.results: dict = {}  # of the last validation or test
        self.logits = torch.zeros(0)  # of its clips, in the data set's order: (n, n_classes), float32, on the CPU
        self.log_prefix = ""  # "a/" while the model of device a is trained
        self.train_loss = torch.zeros(2, dtype=torch.float64)  # sum over the epoch's clips so far, and their number
        self.clips_per_step = 0  # of the optimiser, in all processes
        self.clips_id = ""  # which clips were trained and chosen on: loading.clips_id
        self.origin: dict = {}  # configuration of the run that trained it, where this one does not
        self.total_steps = 0  # optimiser steps of the run, for the schedule
        self.teacher: Teacher | None = None
        self.adapters: LowRank | None = None  # while they are trained
        self.average: WeightAverage | None = None  # of `model`, while it is trained
        self.freeze_epochs = 0
        if isinstance(config, TrainConfig):
            self.freeze_epochs = config.fit.freeze_epochs
            self.masking = Masking(config.augment, config.logmel.n_mels, frames)
        self.responses: DeviceResponses | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, config: EvalConfig | None = None) -> "SceneClassifier":
        """Rebuild from a loaded checkpoint; ``config`` replaces what does not belong to the model."""
        config = config or from_plain(TrainConfig, checkpoint["config"])
        module = cls(config, checkpoint["frames"], tuple(checkpoint["device_ids"]))
        try:
            module.origin, module.clips_id = checkpoint["config"], checkpoint["clips_id"]
            module.load_state_dict(module._counters() | final_state(checkpoint))
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's weights do not fit its configuration: {str(error).splitlines()[1].strip()}"
            ) from error
        return module

    def forward(self, waveform: Tensor, device: Tensor, length: Tensor | None = None) -> Tensor:
        """``waveform`` at the recordings' rate; ``length`` (b,): samples of each, where some are padded at the end."""
        length = torch.full_like(device, waveform.shape[-1]) if length is None else length
        x = self.logmel(*self.logmel.resampled(waveform, length))
        return forward_by_device(self.model, self.device_models, x, device)

    def sound(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(waveform (b, 1, samples), length (b,)) at the model's rate."""
        return self.logmel.resampled(batch.waveform, batch.length, batch.scale, batch.sample_rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        augment = self.config.augment
        # Augmentation and dropout depend on seed, epoch, batch and process alone, wherever a run was interrupted.
        torch.manual_seed(mixed_seed(self.config.fit.seed, self.current_epoch, batch_idx, self.global_rank))
        if 0 < self.freeze_epochs >= self.current_epoch:
            self.train()  # not in on_train_epoch_start, which an epoch that is resumed in its middle does not have
        waveform, length = self.sound(batch)
        if self.responses is not None:
            waveform = self.responses(waveform, batch.device, length)
        shift = round(augment.roll_sec * self.config.logmel.sample_rate)  # samples
        waveform = roll(waveform, shift, length)
        x = freq_mixstyle(self.logmel(waveform, length), augment.mixstyle_p, augment.mixstyle_alpha)
        mix = Mix.draw(len(x), augment.mixup_alpha, x.device)
        last_epochs = self.current_epoch >= self.config.fit.n_epochs - self.config.fit.qat_epochs
        logits = self.forward_model(self.masking(mix(x)), rounding=last_epochs).float()
        loss = F.cross_entropy(logits, mix(F.one_hot(batch.scene, logits.shape[1]).float()))
        if self.teacher is not None:
            distill = self.config.distill
            targets = mix(soft_targets(self.teacher.logits(batch, waveform, length), distill.temperature))
            soft = soft_loss(logits, targets, distill.temperature)
            loss = (1 - distill.teacher_weight) * loss + distill.teacher_weight * soft
        loader = self.trainer.train_dataloader
        self._refuse_non_finite(loss, batch, loader)
        self.log(f"{self.log_prefix}train/loss_step", loss, prog_bar=True, batch_size=len(batch.scene))
        counted = loader.counted(batch_idx)
        self.train_loss += torch.stack([loss.detach().double() * counted, loss.new_tensor(counted).double()])
        return loss * loader.weight(batch_idx)

    def forward_model(self, x: Tensor, rounding: bool = True) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> logits (b, n_classes) of ``model``, with adapters where they are trained,
        and with weights as they will be stored (--weight_bits) where ``rounding``."""
        weights = dict(self.model.named_parameters())
        if self.adapters is not None:
            weights |= self.adapters.weights(self.model)
        elif not rounding or self.config.storage.weight_bits == 32:
            return self.model(x)
        if rounding:
            weights = rounded(weights, self.config.storage.weight_bits)
        return functional_call(self.model, weights, (x,))

    def load_responses(self) -> None:
        """Read those of --dir_path. Raises `UserError` where there are none."""
        augment = self.config.augment
        if augment.dir_path:
            sample_rate = self.config.logmel.sample_rate
            self.responses = DeviceResponses.from_folder(Path(augment.dir_path), sample_rate, augment.dir_p)

    def start_averaging(self) -> None:
        """Keep an average of ``model`` from now on, or from what a checkpoint that is loaded afterwards has."""
        if self.config.fit.ema_decay:
            self.average = WeightAverage(self.trained(), self.config.fit.ema_decay)

    def choose_trained(self, finetune: str, rank: int) -> None:
        """Train all of ``model`` ("full"), low-rank additions to its matrices ("lora"), or its classifier ("head")."""
        trainable(self.model, finetune)
        self.train()
        if finetune == "lora":
            self.adapters = LowRank(self.model, rank)
            print(self.adapters.line())

    def trained(self) -> nn.Module:
        """What is trained: the model, or the adapters of its matrices."""
        return self.model if self.adapters is None else self.adapters

    def frozen(self, name: str) -> bool:
        """Whether a part of ``model`` stands still in this epoch (--freeze_epochs)."""
        return self.current_epoch < self.freeze_epochs and name.partition(".")[0] not in HEADS

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Without a gradient AdamW neither moves nor decays a weight, and clipping does not count it. Not requires_grad:
        # DDP and torch.compile would hold on to what it was at the start.
        for name, parameter in self.model.named_parameters():
            if self.frozen(name):
                parameter.grad = None

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update(self.trained())

    def train(self, mode: bool = True) -> "SceneClassifier":
        super().train(mode)
        for name, layer in self.model.named_modules():  # where a BatchNorm is not trained, its statistics stay too
            is_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
            if is_norm and (self.frozen(name) or not layer.weight.requires_grad):
                layer.eval()
        return self

    def averaged(self):
        """A context in which the average, where one is kept, is in the model's place."""
        return nullcontext() if self.average is None else self.average.swapped(self.trained())

    def _refuse_non_finite(self, loss: Tensor, batch: Batch, dataloader: BatchLoader) -> None:
        if not loss.isfinite().all():
            names = dataloader.names(batch)
            raise UserError(
                f"the loss is not finite in epoch {self.current_epoch + 1}, step {self.global_step}; the checkpoints "
                f"are of before. Lower --lr, use --precision 32, or look at the batch's clips: {', '.join(names)}"
            )

    def _evaluate(self, batch: Batch, batch_idx: int, dataloader: BatchLoader) -> None:
        x = self.logmel(*self.sound(batch))
        logits = forward_by_device(self.forward_model, self.device_models, x, batch.device).float()
        loss = F.cross_entropy(logits, batch.scene, reduction="none")
        self._refuse_non_finite(loss, batch, dataloader)
        n = dataloader.counted(batch_idx)
        self.metrics.update(logits[:n], batch.scene[:n], batch.device[:n], loss[:n])
        if not len(self.logits):
            self.logits = torch.zeros(len(dataloader.dataset), logits.shape[1])
        self.logits[batch.index[:n].cpu()] = logits[:n].cpu()

    def _begin(self) -> None:
        self.metrics.reset()
        self.logits = torch.zeros(0)

    def _finish(self, stage: str, step: int) -> None:
        self.results = self.metrics.compute()
        self.logits = sum_over_all(self.logits)  # each clip was heard by one process
        self.metrics.reset()
        shown = {name: self.results[name] for name in ("macro_avg_acc", "acc", "loss")}
        for table in ("scene_acc", "device_acc", "device_group_acc"):
            shown |= {f"{table}/{name}": value for name, value in self.results[table].items()}
        self.log_now({f"{stage}/{name}": value for name, value in shown.items() if value is not None}, step)

    def log_now(self, metrics: dict[str, float], step: int) -> None:
        """Log without Lightning's delay: a kill between a checkpoint and what belongs to it would lose it."""
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{self.log_prefix}{name}": value for name, value in metrics.items()}, step=step)

    def on_train_start(self) -> None:
        self.train()  # a run that is resumed after --freeze_epochs does not begin with what epoch 0 freezes
        self.train_loss = self.train_loss.to(self.device)

    def epoch_loss(self) -> float:
        """The mean loss over the epoch's clips, those of all processes; a new epoch's begins."""
        total, clips = sum_over_all(self.train_loss).tolist()
        self.train_loss = torch.zeros_like(self.train_loss)
        return total / clips

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.trainer.val_dataloaders)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.trainer.test_dataloaders)

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def on_test_epoch_start(self) -> None:
        self._begin()

    def on_validation_epoch_end(self) -> None:
        self._finish("val", max(0, self.trainer.global_step - 1))

    def on_test_epoch_end(self) -> None:
        self._finish("test", 0)

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

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["dcase_format"] = FORMAT
        checkpoint["config"] = self.origin | to_plain(self.config)
        checkpoint["scenes"] = list(SCENES)
        checkpoint["frames"] = self.frames
        checkpoint["device_ids"] = list(self.device_models)
        checkpoint["clips_id"] = self.clips_id
        checkpoint["clips_per_step"] = self.clips_per_step
        if self.average is not None and not self.average.in_place:
            checkpoint["average"] = self.average.state_dict()
        training = self._trainer is not None and self.trainer.training
        checkpoint["train_loss"] = (sum_over_all(self.train_loss.clone()) if training else self.train_loss).tolist()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.refuse_other_clips(checkpoint, "the run that is resumed")
        if checkpoint["clips_per_step"] != self.clips_per_step:
            raise UserError(
                f"the run that is resumed took {checkpoint['clips_per_step']} clips per optimiser step (processes x "
                f"--batch_size x --accumulate_grad_batches), and this one would take {self.clips_per_step}: give as "
                "many --devices and --num_nodes as before"
            )
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        if self.global_rank == 0:  # the sum over all processes
            self.train_loss = torch.tensor(checkpoint["train_loss"], dtype=torch.float64)

    def refuse_other_clips(self, checkpoint: dict, what: str) -> None:
        """Raise `UserError` where the clips of this run are not those that a checkpoint was trained and chosen on."""
        if checkpoint["clips_id"] != self.clips_id:
            raise UserError(
                f"the training and validation clips are not those of {what}: give its --dataset_dir, and leave "
                "meta_clean.csv as it was (clips held out for validation could else be trained on)"
            )

    def refuse_other_frames(self, dataset: TAU22) -> None:
        """Raise `UserError` where the data set's clips make another number of frames than the model was made for."""
        frames = frames_of(self.config.logmel, dataset.n_samples, dataset.sound.sample_rate)
        if frames != self.frames:
            raise UserError(
                f"the clips ({dataset.measured}) make {frames} frames, but the model was trained on {self.frames}: "
                "give data of the same clip length, or train with --target_length"
            )

    def as_checkpoint(self) -> dict:
        """The module as a checkpoint without optimiser or loops."""
        checkpoint = {"state_dict": self.state_dict()}
        self.on_save_checkpoint(checkpoint)
        return checkpoint

    def merged(self) -> dict[str, Tensor]:
        """``model``'s state dict on the CPU, adapters added in."""
        state = self.model.state_dict() if self.adapters is None else self.adapters.merged(self.model)
        return {name: value.detach().cpu() for name, value in state.items()}

    def start_from(self, checkpoint: dict) -> None:
        """Take the weights of another run's general model (--init_from), pruned to this model's sizes.

        Raises `UserError` where that model is smaller, or differs in more than its sizes.
        """
        other = self.from_checkpoint(checkpoint).model
        state = other.state_dict()
        if isinstance(other, aum.AudioMamba) and isinstance(self.model, aum.AudioMamba):
            state = shrink(state, other.config, self.model.config)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError("--init_from: that run's model is of another kind than --model: give the same") from error

    def start_from_file(self, path: str, grid: tuple[int, int] | None) -> None:
        """Take the weights of a checkpoint file (--pretrained), and print what became of each. The log-mel's
        normalisation stays this run's.

        Raises `UserError` where the file cannot be read, is not whole, or does not fit the model.
        """
        try:
            print(aum.load_pretrained(self.model, path, source_grid=grid))
        except aum.UnknownGrid as error:
            raise UserError(f"--pretrained: {error}: give --pretrained_grid MEL,TIME") from error
        except aum.PretrainedError as error:
            raise UserError(f"--pretrained: {error}") from error

    def load_stored(self, checkpoint: dict) -> None:
        """Take the weights of stored models (`compression.stored.load_stored`)."""
        self.load_state_dict(self._counters() | checkpoint["state_dict"])

    def _counters(self) -> dict[str, Tensor]:
        """BatchNorm's counts of batches, which stored models lack and nothing needs."""
        return {name: x for name, x in self.state_dict().items() if name.endswith("num_batches_tracked")}

    def set_device_models(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Device-specific models from the general one's shape and each device's own state dict, in DEVICES's order."""
        self.device_models = nn.ModuleDict()
        for device_id in DEVICES:
            if device_id in states:
                model = copy.deepcopy(self.model)
                model.load_state_dict(states[device_id])
                self.device_models[device_id] = model


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Share of the learning rate: a straight line from 0 to 1 over ``warmup`` steps, then a half cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
