"""What a model learns from beside the labels: trained models, files of logits, and packages of the challenge."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dcase.data.dataset import TAU22, Batch
from dcase.data.loading import Batches, loader
from dcase.data.tau22 import Clips
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.machine import MachineConfig, main_first
from dcase.model.distillation import is_file, soft_targets
from dcase.progress import progress
from dcase.runs.challenge import load_file
from dcase.runs.checkpoints import UNKNOWN_CLIPS
from dcase.runs.config import TrainConfig
from dcase.runs.folder import Run, find_checkpoint
from dcase.training.lit import SceneClassifier
from dcase.training.logits_files import ClipLogits, read_logits, split_key
from dcase.training.packages import content_of, find_package, write_outputs

OUTPUTS = "teacher_outputs"  # folder of a project: what its teachers say of the clips
BY_HEART = 0.99  # right on this share of the training clips: hardly more than their labels
BEYOND_CHANCE = 0.1, 3  # share of the clips, and standard errors, by which a teacher agrees with the labels at least


class OneTeacher(Protocol):
    """One of --teacher."""

    name: str  # as it was given
    sha256: str  # of its files, and which part of them counts
    made_here: bool  # False: rows or columns may be in another order than they should be

    def logits(self, clips: TAU22, machine: MachineConfig) -> Tensor:
        """Return the logits (clips, n_classes) of unaugmented training clips."""


class Teachers:
    """Any number of teachers. The mean of their probabilities is the target, so each has an equal share in the
    gradient, however large its logits are."""

    def __init__(self, teachers: Sequence[OneTeacher], temperature: float, live: bool = False):
        self.teachers, self.temperature, self.live = list(teachers), temperature, live
        self.heard: tuple[Clips, Tensor] | None = None  # the training clips, and the targets of each
        self.kept: Tensor | None = None  # those of the clips that are trained on now

    def __len__(self) -> int:
        return len(self.teachers)

    def add(self, teacher: OneTeacher) -> None:
        self.teachers.append(teacher)

    def hear(self, clips: TAU22, machine: MachineConfig) -> None:
        """Take every teacher's logits of the training clips, without augmentation, and print how good they are.

        They are read, or computed and kept for other runs. With --teacher_input live there is nothing to do.
        Raises `UserError` where they do not fit.
        """
        if self.live or not self.teachers:
            return
        with main_first():
            logits = [teacher.logits(clips, machine) for teacher in self.teachers]
        for teacher, found in zip(self.teachers, logits, strict=True):
            if not teacher.made_here:
                with _named(f"--teacher {teacher.name}"):
                    refuse_chance(found, clips.clips)
            print(agreement(teacher.name, found, clips.clips))
        targets = torch.stack([soft_targets(found, self.temperature) for found in logits]).mean(0)
        self.heard = clips.clips, targets

    def keep(self, clips: Clips) -> None:
        """Keep the targets of those of the clips heard that are trained on from now, in their order."""
        heard, targets = self.heard
        self.kept = ClipLogits(np.char.decode(heard.filenames), targets.numpy()).of(clips)

    @torch.no_grad()
    def targets(self, batch: Batch, waveform: Tensor, length: Tensor) -> Tensor:
        """Return probabilities (b, n_classes) of a training batch: those kept, or those of this ``waveform``
        (b, 1, samples) at the model's rate."""
        if not self.live:
            self.kept = self.kept.to(waveform.device)
            return self.kept[batch.index]
        logits = [teacher.of_waveform(waveform, length, batch.device) for teacher in self.teachers]
        return torch.stack([soft_targets(found, self.temperature) for found in logits]).mean(0)

    def record(self) -> dict:
        """Return what config.json says of them, so that a resumed run learns from the same ones."""
        return {"teachers": [{"teacher": teacher.name, "sha256": teacher.sha256} for teacher in self.teachers]}


class LogitsFile:
    """A teacher that is a file of logits."""

    def __init__(self, given: str, train: TAU22, subset: int, made_here: bool = False):
        """Raises `UserError` where the file cannot be used for these training clips."""
        self.name, self.made_here = given, made_here
        with _named(f"--teacher {given}: the file"):
            self.found = read_logits(given, train.clips.folder, subset, train.clips.labels).of(train.clips)
            if not made_here:
                refuse_chance(self.found, train.clips)
        path, key = split_key(given)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest() + (key and f":{key}")

    def logits(self, clips: TAU22, machine: MachineConfig) -> Tensor:
        return self.found


class Package:
    """A teacher that is a challenge's inference package: its logits are computed once, in another process, and kept."""

    made_here = False

    def __init__(self, name: str, module: Path, keep_in: Path):
        self.name, self.module, self.keep_in = name, module, keep_in
        self.sha256 = content_of(module)

    def logits(self, clips: TAU22, machine: MachineConfig) -> Tensor:
        file = self.keep_in / f"{clips.clips.fingerprint()}-{self.sha256[:16]}.npz"
        if not file.is_file():
            print(f"teacher {self.name}: computing its outputs for {len(clips):,} training clips")
            with _named(f"--teacher {self.name}:"):
                write_outputs(self.module, clips.clips, _on(machine) == "cuda", file)
        with _named(f"--teacher {self.name}: the file of its outputs, {file},"):
            return read_logits(str(file), clips.clips.folder, labels=clips.clips.labels).of(clips.clips)


class TrainedModel:
    """A teacher that is a trained model, of either stage: its logits are computed once, and kept."""

    def __init__(self, name: str, module: SceneClassifier, path: Path, keep_in: Path):
        """``path``: its checkpoint."""
        self.name, self.module, self.keep_in = name, module.eval().requires_grad_(False), keep_in
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.made_here = module.clips_id != UNKNOWN_CLIPS  # not from a published checkpoint of the challenge

    def of_waveform(self, waveform: Tensor, length: Tensor, device: Tensor) -> Tensor:
        """Return logits (b, n_classes) of ``waveform`` (b, 1, samples) at the model's rate."""
        module = self.module.to(waveform.device)
        return module.by_device(module.model, waveform, length, device).float()

    def logits(self, clips: TAU22, machine: MachineConfig) -> Tensor:
        # Another state of the teacher is another file.
        file = self.keep_in / f"{clips.clips.fingerprint()}-{self.sha256[:16]}.pt"
        if not file.is_file():
            logits = outputs(self.module, clips, machine, f"outputs of teacher {self.name}")
            replace_file(file, lambda beside: torch.save(logits, beside))
        try:
            logits = torch.load(file, weights_only=True)
            if len(logits) != len(clips):
                raise ValueError
        except Exception as error:  # a damaged file can make torch raise anything
            raise UserError(f"{file} is damaged: delete it, and the teacher's outputs are computed again") from error
        return logits


def load_teachers(config: TrainConfig, student: SceneClassifier, train: TAU22, run: Run | None) -> Teachers:
    """Return the teachers of --teacher. ``train``: all training clips; ``run``: the one that is resumed.

    Raises `UserError` where there is no such run, file or package, where a model was trained on other clips than the
    student will be (it could know those held out for validation), where it needs another sampling rate, where a file
    lacks clips or does not fit the labels, and where a teacher is not that of the run that is resumed.
    """
    live = config.distill.teacher_input == "live"
    found = [_find(name, config, student, train) for name in config.distill.teachers]
    for teacher in found:
        if live and not isinstance(teacher, TrainedModel):
            raise UserError(f"--teacher_input live needs runs, and --teacher {teacher.name} is none: leave it out")
    if run is not None:
        _refuse_others(found, config, run)
    return Teachers(found, config.distill.temperature, live)


def _find(name: str, config: TrainConfig, student: SceneClassifier, train: TAU22) -> OneTeacher:
    """Return the teacher that has this name in --teacher."""
    project, path = Path(config.run.project_name), Path(name)
    keep_in = project / OUTPUTS
    if is_file(name):
        return LogitsFile(name, train, config.split.subset)
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise UserError(f"--teacher {name}: there is no such checkpoint")
        return _trained_model(name, path, config, student, keep_in)
    if path.name != name and Run(path).has_config():
        return _trained_model(name, find_checkpoint(str(path.parent), path.name, "--teacher"), config, student, keep_in)
    if not Run(project / name).has_config():
        with _named(f"--teacher {name}"):
            module = find_package(name)
        if module:
            return Package(name, module, keep_in)
        if path.name != name:
            what = "holds neither a run nor a package of the challenge" if path.is_dir() else "does not exist"
            raise UserError(f"--teacher {name} {what}")
    return _trained_model(name, find_checkpoint(str(project), name, "--teacher"), config, student, keep_in)


def _trained_model(name: str, path: Path, config: TrainConfig, student: SceneClassifier, keep_in: Path) -> TrainedModel:
    checkpoint = load_file(path)
    student.refuse_other_clips(checkpoint, f"the teacher --teacher {name}")
    module = SceneClassifier.from_checkpoint(checkpoint, labels=student.labels)
    theirs, ours = (c.logmel.sample_rate for c in (module.config, config))
    if theirs != ours:
        raise UserError(f"--teacher {name} was trained at --sample_rate {theirs}, and this model is at {ours}")
    print(f"teacher {name}: {module.config.model.model}")
    return TrainedModel(name, module, path, keep_in)


def _refuse_others(teachers: Sequence[OneTeacher], config: TrainConfig, run: Run) -> None:
    """Raise `UserError` where these are not the teachers that a run began with. Their places may have changed."""
    before = run.teachers()
    if before is None:  # it has none, or is from before they were recorded
        same = run.read_config().get("distill", {}).get("teacher", "") == config.distill.teacher
    else:
        same = [teacher.sha256 for teacher in teachers] == [teacher.get("sha256") for teacher in before]
    if not same:
        names = ", ".join(teacher.get("teacher", "?") for teacher in before or []) or "none"
        raise UserError(
            f"--teacher {config.distill.teacher or '(none)'}: the run --resume {run.id} began with other contents "
            f"(of {names}): give the same teachers, or start a new run"
        )


def agreement(name: str, logits: Tensor, clips: Clips) -> str:
    """Return a line that says how often a teacher's most probable scene is the label, with a warning where that is so
    often that it has learnt the clips by heart."""
    right = _right(logits, clips)
    said = f"teacher {name}: right on {100 * right:.1f} % of the {len(clips):,} training clips"
    if right < BY_HEART:
        return said
    return (
        f"{said}\nWARNING: teacher {name} knows the training clips by heart: on them it says little more than their "
        "labels, as it would not on new ones. Better are logits of models that have not heard these clips"
    )


def refuse_chance(logits: Tensor, clips: Clips) -> None:
    """Raise `UserError` where logits agree with the labels hardly more often than those of permuted clips would."""
    right, n = _right(logits, clips), logits.shape[1]
    labels, predicted = (np.bincount(x, minlength=n) / len(clips) for x in (clips.scene, logits.argmax(1).numpy()))
    chance = float(labels @ predicted)
    share, errors = BEYOND_CHANCE
    if right < chance + max(share, errors * (chance * (1 - chance) / len(clips)) ** 0.5):
        raise UserError(
            f"is right on {100 * right:.1f} % of the {len(clips):,} training clips, and permuted rows would be on "
            f"{100 * chance:.1f} %: its rows or columns are in another order, or it was made for other clips"
        )


def _right(logits: Tensor, clips: Clips) -> float:
    return float((logits.argmax(1).numpy() == clips.scene).mean())


@torch.no_grad()
def outputs(module: SceneClassifier, clips: TAU22, machine: MachineConfig, what: str) -> Tensor:
    """Return a model's logits (clips, n_classes) of unaugmented clips, computed in this process alone."""
    on = _on(machine)
    module.to(on).eval()  # else a clip's logits would depend on those beside it
    batches = loader(clips, machine, Batches(len(clips), machine.batch_size))  # every clip, in any process
    found = []
    for batch in progress(batches, desc=what, leave=False):
        batch = Batch(*(x.to(on) if isinstance(x, Tensor) else x for x in batch))
        found.append(module.by_device(module.model, *module.sound(batch), batch.device).float().cpu())
    return torch.cat(found)


def _on(machine: MachineConfig) -> str:
    return "cuda" if torch.cuda.is_available() and machine.accelerator != "cpu" else "cpu"


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Put ``what`` before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what} {error}") from error
