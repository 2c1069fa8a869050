"""Stage 2: one recording device's model from the general one, kept only where it is clearly better."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor

from dcase.data.dataset import TAU22
from dcase.data.loading import evaluation_batches, loader, mixed_seed
from dcase.data.tau22 import DEVICES, Clips
from dcase.files import write_json
from dcase.machine import is_main, main_first
from dcase.model.metrics import mean_and_error
from dcase.runs.checkpoints import FORMAT, final_state, load_checkpoint, save_checkpoint
from dcase.runs.config import DeviceConfig
from dcase.runs.folder import Run, trained_checkpoint
from dcase.training.fit import MONITOR, make_trainer, no_silent_exit, plan, seed_everything, train
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan
from dcase.training.teachers import Teachers

TUNED = "tuned.ckpt"  # a device's own model, ready for use
# Standard errors by which it must be better. With few locations that is a weak test: with three, chance passes one time
# in eleven, and epoch and learning rate were chosen on the same clips.
CERTAINTY = 2


@dataclass(frozen=True)
class Outcome:
    """The outcome of fine-tuning for one device. Accuracies are macro averages on the device's validation clips."""

    kept: bool
    reason: str
    n_train: int = 0
    n_val: int = 0
    general: float | None = None
    fine_tuned: float | None = None
    general_loss: float | None = None
    fine_tuned_loss: float | None = None
    gain_error: float | None = None  # standard error of the difference of these losses, over recording locations
    lr: float | None = None
    epoch: int | None = None

    def __str__(self) -> str:
        said = f"{'own model kept' if self.kept else 'general model stays'}: {self.reason}"
        if self.general is None:
            return said
        return f"{said} ({100 * self.general:.2f} -> {100 * self.fine_tuned:.2f} % on {self.n_val} validation clips)"


@dataclass(frozen=True)
class FineTuning:
    """Stage 2 of one run: what all devices share."""

    general: SceneClassifier
    clips: tuple[Clips, Clips | None]  # training and validation clips of all devices
    like: TAU22  # their data set, for the clips' length
    config: DeviceConfig
    run: Run
    loggers: Sequence[Logger]
    teachers: Teachers | None = None

    def tune(self, device_id: str) -> tuple[Outcome, dict[str, Tensor] | None]:
        """Fine-tune the general model on one device's clips. Return (outcome, the model's weights if kept).

        Where a run is resumed, a finished device is not trained again, and an interrupted one goes on where it was.
        """
        folder = self.run.checkpoints / device_id
        decision = folder / "outcome.json"
        if decision.is_file():
            outcome = Outcome(**json.loads(decision.read_text()))
        else:
            outcome = self._decide(device_id, folder)
            if is_main():
                write_json(decision, dataclasses.asdict(outcome))
        print(f"device {device_id}: {outcome}")
        return outcome, load_checkpoint(folder / TUNED)["state_dict"] if outcome.kept else None

    def _decide(self, device_id: str, folder: Path) -> Outcome:
        train_clips, val_clips = (part.of_device(device_id) if part is not None else None for part in self.clips)
        if not len(train_clips):
            return Outcome(False, "no training clip of this device")
        if val_clips is not None and not len(val_clips):
            return Outcome(False, "no validation clip of this device to compare on", len(train_clips))
        train_set = TAU22(train_clips, self.like.sound, self.like)
        val_set = TAU22(val_clips, self.like.sound, self.like) if val_clips is not None else None
        lr, best_epoch = self._train(device_id, train_set, val_set, folder)

        counts = {"n_train": len(train_set), "n_val": len(val_set) if val_set else 0, "lr": lr}
        if val_set is None:
            return Outcome(True, "nothing was held out to compare on (--val_fraction 0)", **counts)
        before, loss_before = self._test(self.general, val_set, folder)
        tuned = self._copy(self.config)
        tuned.model.load_state_dict(load_checkpoint(folder / TUNED)["state_dict"])
        after, loss_after = self._test(tuned, val_set, folder)
        # Not the accuracy: a few clips from two or three places hardly move it, and often by chance.
        gain, error = mean_and_error(loss_before - loss_after, val_clips.location)
        is_clear, no_worse = gain > CERTAINTY * error, after[MONITOR] >= before[MONITOR]
        reason = f"the loss {'falls' if gain > 0 else 'rises'} by {abs(gain):.3f} with a standard error of {error:.3f}"
        if is_clear and not no_worse:
            reason = f"the accuracy falls, although {reason}"
        elif gain > 0 and not is_clear:
            reason += ", which may be chance"
        return Outcome(
            is_clear and no_worse,
            reason,
            **counts,
            general=before[MONITOR],
            fine_tuned=after[MONITOR],
            general_loss=before["loss"],
            fine_tuned_loss=after["loss"],
            gain_error=error if math.isfinite(error) else None,
            epoch=best_epoch,
        )

    def _train(self, device_id: str, train_set: TAU22, val_set: TAU22 | None, folder: Path) -> tuple[float, int | None]:
        """Write the device's model to `TUNED`. Return (the best learning rate, its best epoch)."""
        # Each device has its own seed, so that its result does not depend on which were trained before it.
        seed = mixed_seed(self.config.fit.seed, DEVICES.index(device_id)) % 2**32
        print(f"device {device_id}: fine-tuning on {len(train_set)} clips")
        tried = []
        for i, lr in enumerate(self.config.learning_rates, 1):
            config = dataclasses.replace(self.config, fit=dataclasses.replace(self.config.fit, seed=seed, lr=lr))
            seed_everything(seed)
            module = self._copy(config)
            module.choose_trained(config.finetune, config.lora_rank)
            module.augment.responses = self.general.augment.responses
            module.clips_id = self.general.clips_id
            part = f"lr_{lr:g}/" if len(config.learning_rates) > 1 else ""
            module.log_prefix = f"{device_id}/{part}"
            later = self._plans(device_id)[i:] + self._after(device_id)
            best = train(module, train_set, val_set, config, folder / part, list(self.loggers), self.teachers, later)
            tried.append((lr, best, module))
        lr, best, module = max(tried, key=lambda one: (one[1].best_score or 0, -(one[1].best_loss or 0)))
        with main_first():  # the others read it
            if is_main():
                module.load_state_dict(final_state(load_checkpoint(trained_checkpoint(best.folder))))
                save_checkpoint({"dcase_format": FORMAT, "state_dict": module.merged()}, folder / TUNED)
        return lr, best.best_epoch

    def _plans(self, device_id: str) -> list[Plan]:
        """Return the trainings of a device, one per learning rate; none where it lacks clips."""
        n_train, n_val = (len(part.of_device(device_id)) if part is not None else None for part in self.clips)
        if not n_train or n_val == 0:
            return []
        return [plan(n_train, n_val or 0, self.config)] * len(self.config.learning_rates)

    def _after(self, device_id: str) -> list[Plan]:
        """Return the trainings of the devices after this one."""
        devices = self.config.devices_to_tune
        return [each for one in devices[devices.index(device_id) + 1 :] for each in self._plans(one)]

    def _copy(self, config: DeviceConfig) -> SceneClassifier:
        """Return a module with the general model's weights."""
        module = SceneClassifier(config, self.general.frames)
        module.load_state_dict(self.general.state_dict())
        return module

    def _test(self, module: SceneClassifier, val_set: TAU22, folder: Path) -> tuple[dict, Tensor]:
        """Return (results on the validation clips, each clip's loss (n,))."""
        batches = loader(val_set, self.config.machine, evaluation_batches(val_set, self.config.machine))
        with no_silent_exit():
            make_trainer(self.config.machine, folder, []).validate(module, batches, verbose=False)
        losses = F.cross_entropy(module.logits, torch.from_numpy(val_set.clips.scene), reduction="none")
        return module.results, losses
