"""The trained models that a model learns from: loaded by their run ids, their outputs cached or computed live."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dcase.data.dataset import TAU22, Batch
from dcase.data.loading import Batches, loader
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.machine import MachineConfig, main_first
from dcase.progress import progress
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import TrainConfig
from dcase.runs.folder import find_checkpoint
from dcase.training.lit import SceneClassifier


class Teachers:
    """One or more trained models, of either stage; their logits are averaged."""

    def __init__(self, modules: Sequence[SceneClassifier], paths: Sequence[Path]):
        """``paths``: the modules' checkpoint files; outputs are cached in the folders of their runs."""
        self.modules, self.paths = [module.eval().requires_grad_(False) for module in modules], paths
        self.kept: Tensor | None = None  # (clips, n_classes), in the order of the training clips

    @torch.no_grad()
    def live(self, waveform: Tensor, length: Tensor, device: Tensor) -> Tensor:
        """Return mean logits (b, n_classes) of ``waveform`` (b, 1, samples) at the model's rate."""
        modules = [module.to(waveform.device) for module in self.modules]
        return torch.stack([m.by_device(m.model, waveform, length, device).float() for m in modules]).mean(0)

    def logits(self, batch: Batch, waveform: Tensor, length: Tensor) -> Tensor:
        """Return mean logits (b, n_classes) of a training batch: those kept, or those of this ``waveform``."""
        if self.kept is None:
            return self.live(waveform, length, batch.device)
        self.kept = self.kept.to(waveform.device)
        return self.kept[batch.index]

    def keep(self, clips: TAU22, machine: MachineConfig) -> None:
        """Keep the logits of every training clip without augmentation, read from an earlier run's file or computed."""
        with main_first():
            kept = [_kept(module, path, clips, machine) for module, path in zip(self.modules, self.paths, strict=True)]
        self.kept = torch.stack(kept).mean(0)


def load_teachers(config: TrainConfig, student: SceneClassifier) -> Teachers | None:
    """Return the teachers of --teacher, or None.

    Raises `UserError` where there is no such run, where a teacher was trained on other clips than the student will be
    (it could know those held out for validation), or where it needs another sampling rate.
    """
    ids = config.distill.teacher_ids
    if not ids:
        return None
    paths = [find_checkpoint(config.run.project_name, run_id, "--teacher") for run_id in ids]
    modules = []
    for run_id, path in zip(ids, paths, strict=True):
        checkpoint = load_checkpoint(path)
        student.refuse_other_clips(checkpoint, f"the teacher --teacher {run_id}")
        module = SceneClassifier.from_checkpoint(checkpoint)
        theirs, ours = (c.logmel.sample_rate for c in (module.config, config))
        if theirs != ours:
            raise UserError(f"--teacher {run_id} was trained at --sample_rate {theirs}, and this model is at {ours}")
        modules.append(module)
    print(f"teachers: {', '.join(f'{i} ({m.config.model.model})' for i, m in zip(ids, modules, strict=True))}")
    return Teachers(modules, paths)


def _kept(module: SceneClassifier, path: Path, clips: TAU22, machine: MachineConfig) -> Tensor:
    """Return a teacher's logits (clips, n_classes), from its run's folder, or computed and written there."""
    state = hashlib.sha256(path.read_bytes()).hexdigest()[:16]  # another state of the teacher is another file
    file = path.parent.parent / "teacher_outputs" / f"{clips.clips.fingerprint()}-{state}.pt"
    if not file.is_file():
        logits = _all_logits(module, clips, machine, path.parent.parent.name)
        replace_file(file, lambda beside: torch.save(logits, beside))
    try:
        logits = torch.load(file, weights_only=True)
        if len(logits) != len(clips):
            raise ValueError
    except Exception as error:  # a damaged file can make torch raise anything
        raise UserError(f"{file} is damaged: delete it, and the teacher's outputs are computed again") from error
    return logits


@torch.no_grad()
def _all_logits(module: SceneClassifier, clips: TAU22, machine: MachineConfig, run_id: str) -> Tensor:
    on = "cuda" if torch.cuda.is_available() and machine.accelerator != "cpu" else "cpu"
    module.to(on)
    batches = loader(clips, machine, Batches(len(clips), machine.batch_size))  # every clip, in any process
    found = []
    for batch in progress(batches, desc=f"outputs of teacher {run_id}", leave=False):
        batch = Batch(*(x.to(on) if isinstance(x, Tensor) else x for x in batch))
        found.append(module.by_device(module.model, *module.sound(batch), batch.device).float().cpu())
    return torch.cat(found)
