"""--cross_fit K: a run's own teachers, each trained without a part of the recording locations, which it then judges.

    <run>/cross_fit/fold_1/ ...      a teacher each: last.ckpt, metrics.csv, and at its end outputs.pt
    <run>/cross_fit/logits.npz       all training clips' logits, each from the teacher that has not heard its location

A validation clip's logits there come from all teachers, none of which has heard it, so that a later run which trains on
every clip can take the file as its --teacher. ``fold`` in the file is a clip's part, counted from 1; 0: validation.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aum.pretrained import PretrainedError
from aum.pretrained.source import AUM, VIM, read_source
from dcase.data.dataset import TAU22
from dcase.data.loading import clips_id, mixed_seed
from dcase.data.tau22 import Clips, location_folds
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.machine import is_main, main_first
from dcase.model.distillation import DistillConfig
from dcase.model.named import FIXED
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import BaseConfig, StorageConfig
from dcase.runs.folder import CROSS_FIT, Run, trained_checkpoint
from dcase.runs.loggers import MetricsCsv
from dcase.runs.stored import load_stored
from dcase.training import fit
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan
from dcase.training.teachers import LogitsFile, outputs


def plans(train: Clips, config: BaseConfig) -> list[Plan]:
    """Return the trainings of the teachers; none without --cross_fit.

    Raises `UserError` where the recordings are from too few locations, and where --pretrained is a model of these
    scenes, which may have heard the clips.
    """
    if not config.cross_fit:
        return []
    folds = location_folds(train, config.cross_fit)
    if config.pretrained and (config.model.model in FIXED or not _is_of_other_data(config.pretrained)):
        raise UserError("--cross_fit and --pretrained: that model may have heard the clips: leave one of them out")
    return [fit.plan(int((folds != fold).sum()), 0, config) for fold in range(config.cross_fit)]


def cross_fit(student: SceneClassifier, train: TAU22, val: TAU22 | None, config: BaseConfig, run: Run) -> LogitsFile:
    """Return the cross-fitted logits of the training clips; train the teachers first, as far as that is left to do.

    A teacher is trained as ``student`` will be, in 32 bits, without teachers and to its last epoch: no clip chooses it.
    Raises `UserError` where the run was interrupted and the clips are not those that its teachers have heard.
    """
    folder = run.folder / CROSS_FIT
    file = folder / "logits.npz"
    folds = location_folds(train.clips, config.cross_fit)
    unheard = val.clips if val and config.split.val_split == "train" else None
    if not file.is_file():
        later = [*plans(train.clips, config), fit.plan(len(train), len(val) if val else 0, config)]
        found = []
        for fold in range(config.cross_fit):
            place = folder / f"fold_{fold + 1}"
            parts = [train.clips.select(folds == fold), *([unheard] if unheard else [])]
            found.append(_judge(student, train, folds != fold, parts, config, place, fold, later))
        with main_first():
            if is_main():
                _write(file, folds, found, train.clips, unheard)
    fit.seed_everything(config.fit.seed)  # what follows is the same where the teachers were there already
    return LogitsFile(str(file), train, config.split.subset, made_here=True)


def _is_of_other_data(path: str) -> bool:
    """Return whether a file is a published checkpoint of Vim or AuM, and no model of these scenes."""
    try:
        load_stored(path)
        return False
    except UserError:
        pass
    try:
        return read_source(path).kind in (VIM, AUM)
    except PretrainedError as error:
        raise UserError(f"--pretrained: {error}") from error


def _judge(
    student: SceneClassifier,
    train: TAU22,
    heard: np.ndarray,
    parts: Sequence[Clips],
    config: BaseConfig,
    folder: Path,
    fold: int,
    later: Sequence[Plan],
) -> list[Tensor]:
    """Return the logits of the clips in each of ``parts``, from a teacher trained on those of ``train`` where ``heard``
    is true."""
    file = folder / "outputs.pt"
    if not file.is_file():
        clips = TAU22(train.clips.select(heard), train.sound, train)
        n, places = len(clips), len(np.unique(clips.clips.location))
        print(f"teacher {fold + 1} of {config.cross_fit}: training on {n:,} clips from {places:,} locations")
        module = _train(student, clips, config, folder, fold, later)
        with main_first():
            if is_main():
                shown = f"outputs of teacher {fold + 1} of {config.cross_fit}"
                found = [outputs(module, TAU22(part, train.sound, train), config.machine, shown) for part in parts]
                kept = {"clips": [part.fingerprint() for part in parts], "logits": found}
                replace_file(file, lambda beside: torch.save(kept, beside))
    kept = torch.load(file, weights_only=True)
    if kept["clips"] != [part.fingerprint() for part in parts]:
        raise UserError(f"{folder}: this teacher judged other clips: give the --dataset_dir that the run began with")
    return kept["logits"]


def _train(
    student: SceneClassifier, clips: TAU22, config: BaseConfig, folder: Path, fold: int, later: Sequence[Plan]
) -> SceneClassifier:
    """Return a teacher trained on the clips. Each has its own seed."""
    seed = mixed_seed(config.fit.seed, fold) % 2**32
    settings = dataclasses.replace(config.fit, seed=seed)
    config = dataclasses.replace(config, fit=settings, distill=DistillConfig(), storage=StorageConfig(), cross_fit=0)
    fit.seed_everything(seed)
    module = SceneClassifier(config, student.frames, labels=student.labels)
    module.clips_id = clips_id(clips.clips, None)
    module.augment.responses = student.augment.responses
    if not fit.checkpoint_to_resume(folder):
        if config.pretrained:
            module.start_from_file(config.pretrained, config.pretrained_grid)
        if config.normalise:
            fit.fit_normalisation(module, clips, config.machine)  # of these clips alone
    folder.mkdir(parents=True, exist_ok=True)
    loggers = [MetricsCsv(folder / "metrics.csv")] if is_main() else []
    fit.train(module, clips, None, config, folder, loggers, later=later[fold + 1 :], earlier=later[:fold])
    return SceneClassifier.from_checkpoint(load_checkpoint(trained_checkpoint(folder)))


def _write(file: Path, folds: np.ndarray, found: list[list[Tensor]], train: Clips, val: Clips | None) -> None:
    """Write the logits file of what each teacher ``found``: logits of its own part, and of the validation clips."""
    logits = torch.empty(len(train), len(train.labels.scenes))
    for fold, (own, *_) in enumerate(found):
        logits[torch.from_numpy(folds == fold)] = own
    filenames, part = train.filenames, folds + 1
    if val is not None:
        of_val = torch.stack([both[1].log_softmax(1) for both in found]).logsumexp(0) - math.log(len(found))
        logits = torch.cat([logits, of_val])
        filenames = np.concatenate([filenames, val.filenames])
        part = np.concatenate([part, np.zeros(len(val), part.dtype)])

    def write(beside: Path) -> None:
        with open(beside, "wb") as out:  # np.savez adds .npz to a name
            scenes, names = train.labels.scenes, np.char.decode(filenames)
            np.savez(out, filename=names, scenes=scenes, logits=logits.numpy(), fold=part)

    replace_file(file, write)
