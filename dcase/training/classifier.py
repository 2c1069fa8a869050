"""The classifier of both stages: front end, general model and device models; what a checkpoint of it holds."""

import copy
import dataclasses
from collections.abc import Callable, Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import aum
from dcase.data.dataset import TAU22, Batch
from dcase.data.labels import TAU22_LABELS, Labels, refuse_other_scenes
from dcase.data.logmel import LogMel, frames_of
from dcase.data.tau22 import RATE
from dcase.errors import UserError
from dcase.model.devices import forward_by_device
from dcase.model.named import build
from dcase.model.pruning import shrink
from dcase.runs.challenge import load_file
from dcase.runs.checkpoints import FORMAT, UNKNOWN_CLIPS, final_state
from dcase.runs.config import EvalConfig, TrainConfig, from_plain, to_plain


class Classifier(pl.LightningModule):
    """Waveform (b, 1, samples) and device (b,) -> logits (b, scenes). `lit.SceneClassifier` trains and tests it.

    ``model`` is the general model; ``device_models`` are those fine-tuned for one device each, in stage 2. A checkpoint
    is complete: it carries the configuration, the number of frames and the normalisation, and `from_checkpoint`
    rebuilds the module from nothing else.
    """

    def __init__(
        self, config: EvalConfig, frames: int, device_ids: tuple[str, ...] = (), labels: Labels = TAU22_LABELS
    ):
        super().__init__()
        if config.data.orig_sample_rate is None:  # no recordings have told theirs
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, orig_sample_rate=RATE))
        self.config = config
        self.frames = frames
        self.labels = labels  # what the batches' numbers of scenes and devices mean
        self.logmel = LogMel(config.logmel, config.data.orig_sample_rate)
        self.model = build(config.model, config.logmel.n_mels, frames)
        self.device_models = nn.ModuleDict({device_id: copy.deepcopy(self.model) for device_id in device_ids})
        self.clips_per_step = 0  # of the optimiser, in all processes
        self.clips_id = ""  # which clips were trained and chosen on: loading.clips_id
        self.origin: dict = {}  # configuration of the run that trained it, where this one does not
        self.trained_labels: Labels | None = None  # of that run

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, config: EvalConfig | None = None, labels: Labels | None = None):
        """Rebuild the module from a loaded checkpoint; ``config`` replaces what does not belong to the model.

        ``labels``: of the data that it is for, which may have other devices than those of training.
        Raises `UserError` where they have other scenes, and where the weights do not fit.
        """
        config = config or from_plain(TrainConfig, checkpoint["config"])
        trained = Labels.from_plain(checkpoint, "the checkpoint")
        labels = trained if labels is None else labels
        refuse_other_scenes(trained, labels, "the model")
        if config.model.n_classes not in (None, len(labels.scenes)):
            raise UserError(f"the checkpoint has {len(labels.scenes)} scenes, and its model {config.model.n_classes}")
        module = cls(config, checkpoint["frames"], tuple(checkpoint["device_ids"]), labels)
        try:
            module.origin, module.clips_id = checkpoint["config"], checkpoint["clips_id"]
            module.trained_labels = trained
            module.load_stored({"state_dict": final_state(checkpoint)})
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's weights do not fit its configuration: {str(error).splitlines()[1].strip()}"
            ) from error
        return module

    def as_checkpoint(self) -> dict:
        """Return the module as a checkpoint without optimiser and loops."""
        checkpoint = {"state_dict": self.state_dict()}
        self.on_save_checkpoint(checkpoint)
        return checkpoint

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {
            "dcase_format": FORMAT,
            "config": self.origin | to_plain(self.config),
            **(self.trained_labels or self.labels).plain(),
            "frames": self.frames,
            "device_ids": list(self.device_models),
            "clips_id": self.clips_id,
            "clips_per_step": self.clips_per_step,
        }

    def load_stored(self, checkpoint: dict) -> None:
        """Take the weights of stored models (`runs.stored.load_stored`). They lack BatchNorm's counts of batches, which
        nothing needs."""
        counts = {name: x for name, x in self.state_dict().items() if name.endswith("num_batches_tracked")}
        self.load_state_dict(counts | checkpoint["state_dict"])

    def set_device_models(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Make device models of the general model's shape from their state dicts, in the order of the devices."""
        self.device_models, self.trained_labels = nn.ModuleDict(), self.labels
        for device_id in filter(states.get, self.labels.devices):
            model = copy.deepcopy(self.model)
            model.load_state_dict(states[device_id])
            self.device_models[device_id] = model

    def start_from(self, checkpoint: dict, flag: str = "--init_from") -> None:
        """Take the weights of another run's general model (--init_from), pruned to this model's sizes. ``flag``: the
        one that names it.

        Raises `UserError` where that model is smaller, or differs in more than its sizes.
        """
        other = self.from_checkpoint(checkpoint).model
        state = other.state_dict()
        if isinstance(other, aum.AudioMamba) and isinstance(self.model, aum.AudioMamba):
            state = shrink(state, other.config, self.model.config)
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{flag}: that model is of another kind than --model: give the same") from error

    def start_from_file(self, path: str, grid: tuple[int, int] | None) -> None:
        """Take the weights of a checkpoint file (--pretrained), and print what each was used for. The log-mel's
        normalisation stays this run's.

        Raises `UserError` where the file cannot be read, is incomplete, or does not fit the model.
        """
        if not isinstance(self.model, aum.AudioMamba):
            checkpoint = load_file(path)
            refuse_other_scenes(Labels.from_plain(checkpoint, path), self.labels, f"the model --pretrained {path}")
            warned_of_unknown_clips(checkpoint, f"the model --pretrained {path}")
            return self.start_from(checkpoint, "--pretrained")
        try:
            print(aum.load_pretrained(self.model, path, source_grid=grid))
        except aum.PretrainedError as error:
            more = ": give --pretrained_grid MEL,TIME" if isinstance(error, aum.UnknownGrid) else ""
            raise UserError(f"--pretrained: {error}{more}") from error

    def forward(self, waveform: Tensor, device: Tensor, length: Tensor | None = None) -> Tensor:
        """``waveform`` at the recordings' rate; ``length`` (b,): samples of each, where some are padded at the end."""
        length = torch.full_like(device, waveform.shape[-1]) if length is None else length
        return self.by_device(self.model, *self.logmel.resampled(waveform, length), device)

    def by_device(
        self,
        general: Callable[[Tensor], Tensor],
        waveform: Tensor,
        length: Tensor,
        device: Tensor,
        specific: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Return logits (b, scenes) of ``waveform`` (b, 1, samples) at the model's rate; ``general`` is the general
        model, or a function of the log-mel in its place, and ``specific`` such functions of devices in place of
        ``device_models``."""
        x, specific = self.logmel(waveform, length), self.device_models if specific is None else specific
        return forward_by_device(general, specific, x, device, self.labels.devices, self.lengths(length))

    def lengths(self, length: Tensor) -> Tensor | None:
        """Return the frames of each clip that count, (b,) on the CPU, one patch at least; None where all do.

        ``length`` (b,): samples at the model's rate."""
        config = self.config.logmel
        if not config.batch_lengths:
            return None
        return (1 + length.cpu() // config.hop_length).clamp(self.model.config.patch_size[1], config.target_length)

    def sound(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (waveform (b, 1, samples), length (b,)) at the model's rate."""
        return self.logmel.resampled(batch.waveform, batch.length, batch.scale, batch.sample_rate)

    def refuse_other_clips(self, checkpoint: dict, what: str) -> None:
        """Raise `UserError` where the clips of this run are not those that a checkpoint was trained and chosen on.

        A checkpoint that does not name its clips passes, with a warning.
        """
        refuse_other_scenes(Labels.from_plain(checkpoint, what), self.labels, what)
        if not warned_of_unknown_clips(checkpoint, what) and checkpoint["clips_id"] != self.clips_id:
            raise UserError(
                f"the training and validation clips are not those of {what}: give its --dataset_dir, and leave "
                "meta_clean.csv as it was (otherwise clips held out for validation could be trained on)"
            )

    def refuse_other_frames(self, dataset: TAU22) -> None:
        """Raise `UserError` where the data set's clips make another number of frames than the model was made for."""
        frames = frames_of(self.config.logmel, dataset.n_samples, dataset.sound.sample_rate)
        if frames != self.frames:
            raise UserError(
                f"the clips ({dataset.measured}) make {frames} frames, but the model was trained on {self.frames}: "
                "give data of the same clip length, or train with --target_length"
            )


def warned_of_unknown_clips(checkpoint: dict, what: str) -> bool:
    """Return whether a checkpoint does not name the clips that it was trained on, and print a warning where so."""
    is_unknown = checkpoint["clips_id"] == UNKNOWN_CLIPS
    if is_unknown:
        print(
            f"WARNING: {what} does not name the clips that it was trained on: if they include clips that are held out "
            "for validation here, the validation's figures are optimistic"
        )
    return is_unknown
