"""Stage 2: a model for each recording device from the general one, used where validation clips speak for it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor

from dcase.data.dataset import TAU22
from dcase.data.loading import evaluation_batches, loader, mixed_seed
from dcase.data.tau22 import Clips
from dcase.files import write_json
from dcase.machine import is_main, main_first
from dcase.model.averaging import interpolated
from dcase.runs.checkpoints import FORMAT, final_state, load_checkpoint, load_weights, save_checkpoint
from dcase.runs.config import DeviceConfig
from dcase.runs.folder import Run
from dcase.training.fit import MONITOR, make_trainer, no_silent_exit, plan, seed_everything, train
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan
from dcase.training.teachers import Teachers
from dcase.training.verdict import Verdict, judge

TUNED = "tuned.ckpt"  # a device's fine-tuned weights, before --own_share


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
    share: float | None = None  # of the fine-tuned weights in the device's model

    def __str__(self) -> str:
        said = f"{'own model kept' if self.kept else 'general model stays'}: {self.reason}"
        if self.general is None:
            return said
        return f"{said} ({100 * self.general:.2f} -> {100 * self.fine_tuned:.2f} % on {self.n_val} validation clips)"


@dataclass(frozen=True)
class Tested:
    """A model's figures on one device's validation clips."""

    accuracy: float  # macro average
    losses: np.ndarray  # (n,)


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

    def tune(self) -> tuple[dict[str, Outcome], dict[str, dict[str, Tensor]]]:
        """Fine-tune the general model for each device. Return (outcomes, weights of the models that are used).

        Where a run is resumed, a finished training is not done again, and an interrupted one goes on where it was.
        """
        tuned = [device_id for device_id in self._devices if self._plans(device_id)]
        if self.config.only_devices and (self.config.own_share is None or self.config.keep == "clear"):
            print(
                f"--only_devices {self.config.only_devices}: the validation clips of these devices alone, not of all, "
                "choose --own_share and decide which models are used; --own_share 0.5 --keep all leaves nothing to them"
            )
        for device_id in tuned:
            self._train(device_id)
        outcomes = dict.fromkeys(self._devices, Outcome(False, "no training clip of this device"))
        outcomes |= self._judged(tuned)
        for device_id, outcome in outcomes.items():
            print(f"device {device_id}: {outcome}")
            if is_main():
                write_json(self._folder(device_id) / "outcome.json", dataclasses.asdict(outcome))
        return outcomes, {d: self._weights(d, outcomes[d].lr, outcomes[d].share) for d in tuned if outcomes[d].kept}

    @property
    def _devices(self) -> list[str]:
        return self.config.devices_to_tune(self.general.labels)

    # Training

    def _train(self, device_id: str) -> None:
        """Write the device's fine-tuned weights, for each learning rate, to `TUNED`."""
        train_set, val_set = (self._set(part, device_id) for part in self.clips)
        # Each device has its own seed, so that its result does not depend on which were trained before it.
        seed = mixed_seed(self.config.fit.seed, self.general.labels.devices.index(device_id)) % 2**32
        print(f"device {device_id}: fine-tuning on {len(train_set)} clips")
        for i, lr in enumerate(self.config.learning_rates, 1):
            folder = self._folder(device_id, lr)
            if (folder / TUNED).is_file():
                continue
            config = dataclasses.replace(self.config, fit=dataclasses.replace(self.config.fit, seed=seed, lr=lr))
            seed_everything(seed)
            module = self._copy(config)
            module.choose_trained(config.finetune, config.lora_rank)
            module.augment.responses = self.general.augment.responses
            module.clips_id = self.general.clips_id
            module.log_prefix = f"{folder.relative_to(self.run.checkpoints)}/"
            later = self._plans(device_id)[i:] + self._after(device_id)
            loggers = list(self.loggers)
            train(module, train_set, val_set, config, folder, loggers, self.teachers, later, keep_best=False)
            with main_first():  # the others read it
                if is_main():
                    # The last epoch's, not the best one's of a few validation clips: they are left for the verdict.
                    module.load_state_dict(final_state(load_checkpoint(folder / "last.ckpt")))
                    save_checkpoint({"dcase_format": FORMAT, "state_dict": module.merged()}, folder / TUNED)

    def _folder(self, device_id: str, lr: float | None = None) -> Path:
        """Return the folder of a device's checkpoints, or of one of its learning rates'."""
        several = lr is not None and len(self.config.learning_rates) > 1
        return self.run.checkpoints / device_id / (f"lr_{lr:g}" if several else "")

    def _set(self, clips: Clips | None, device_id: str) -> TAU22 | None:
        """Return the device's clips with their sound; None where there are none."""
        own = clips.of_device(device_id) if clips is not None else ()
        return TAU22(own, self.like.sound, self.like) if len(own) else None

    def _plans(self, device_id: str) -> list[Plan]:
        """Return the trainings of a device, one per learning rate; none where it has no training clip."""
        n_train, n_val = (len(part.of_device(device_id)) if part is not None else 0 for part in self.clips)
        return [plan(n_train, n_val, self.config)] * len(self.config.learning_rates) if n_train else []

    def _after(self, device_id: str) -> list[Plan]:
        """Return the trainings of the devices after this one."""
        return [each for one in self._devices[self._devices.index(device_id) + 1 :] for each in self._plans(one)]

    def _copy(self, config: DeviceConfig) -> SceneClassifier:
        """Return a module with the general model's weights."""
        module = SceneClassifier(config, self.general.frames, labels=self.general.labels)
        module.load_state_dict(self.general.state_dict())
        return module

    # Verdict

    def _judged(self, devices: Sequence[str]) -> dict[str, Outcome]:
        """Return the outcomes of the devices that were fine-tuned, at the learning rate and share of the clearest
        fall."""
        before = {device_id: tested for device_id in devices if (tested := self._test(device_id))}
        choices = [(lr, share) for lr in self.config.learning_rates for share in self.config.shares]
        if not before:
            return {d: self._outcome(d, choices[0], None, None, None) for d in devices}
        locations = {device_id: self.clips[1].of_device(device_id).location for device_id in before}
        found = {}
        for choice in choices:
            after = {device_id: self._test(device_id, *choice) for device_id in before}
            falls = {device_id: before[device_id].losses - after[device_id].losses for device_id in before}
            found[choice] = judge(falls, locations), after
        best = max(choices, key=lambda choice: found[choice][0].margin)
        for choice in choices:
            lr, share = choice
            chosen = " (chosen)" if choice == best and len(choices) > 1 else ""
            print(f"--lr {lr:g} --own_share {share:g}{chosen}: the validation loss {found[choice][0].together}")
        verdict, after = found[best]
        heard = ", ".join(verdict.heard) or "none has validation clips of two locations, and nothing can be decided"
        print(f"mean over the devices ({heard}): the validation loss {verdict.together}")
        return {d: self._outcome(d, best, verdict, before.get(d), after.get(d)) for d in devices}

    def _outcome(
        self,
        device_id: str,
        choice: tuple[float, float],
        verdict: Verdict | None,
        before: Tested | None,
        after: Tested | None,
    ) -> Outcome:
        is_used, reason = self._decide(device_id, verdict)
        n_train, n_val = (len(part.of_device(device_id)) if part is not None else 0 for part in self.clips)
        outcome = Outcome(is_used, reason, n_train, n_val, lr=choice[0], share=choice[1])
        if before is None:
            return outcome
        error = verdict.of_device[device_id].error
        return dataclasses.replace(
            outcome,
            general=before.accuracy,
            fine_tuned=after.accuracy,
            general_loss=float(before.losses.mean()),
            fine_tuned_loss=float(after.losses.mean()),
            gain_error=error if math.isfinite(error) else None,
        )

    def _decide(self, device_id: str, verdict: Verdict | None) -> tuple[bool, str]:
        """Return (whether the device's model is used, why)."""
        keep = self.config.keep
        if verdict is None:
            return keep != "none", "no validation clip to compare on" + ("" if keep == "clear" else f", --keep {keep}")
        own = verdict.of_device.get(device_id)
        chance = ", which may be chance" if verdict.together.mean > 0 and not verdict.is_gain else ""
        on_its_own = f"on its own clips it {own}" if own else "it has no validation clip of its own"
        reason = f"over all devices the loss {verdict.together}{chance}; {on_its_own}"
        if keep != "clear":
            return keep == "all", f"--keep {keep}; {reason}"
        if verdict.is_gain and verdict.contradicts(device_id):
            reason = f"on its own clips the loss {own}, although over all devices it {verdict.together}"
        return verdict.uses(device_id), reason

    def _weights(self, device_id: str, lr: float, share: float) -> dict[str, Tensor]:
        """Return the weights of the device's model: ``share`` of the way from the general ones to its own."""
        own = load_weights(self._folder(device_id, lr) / TUNED)
        general = {name: value.cpu() for name, value in self.general.model.state_dict().items()}
        return interpolated(general, own, share)

    def _test(self, device_id: str, *choice: float) -> Tested | None:
        """Return the figures of the device's model of a learning rate and a share, or without them of the general one,
        on the device's validation clips; None where there are none."""
        val_set = self._set(self.clips[1], device_id)
        if val_set is None:
            return None
        module = self.general
        if choice:
            module = self._copy(self.config)
            module.model.load_state_dict(self._weights(device_id, *choice))
        batches = loader(val_set, self.config.machine, evaluation_batches(val_set, self.config.machine))
        with no_silent_exit():
            trainer = make_trainer(self.config.machine, self._folder(device_id), [])
            trainer.validate(module, batches, verbose=False)
        losses = F.cross_entropy(module.logits, torch.from_numpy(val_set.clips.scene), reduction="none")
        return Tested(module.results[MONITOR], losses.double().numpy())
