"""Knowledge distillation: a teacher's softened outputs as further targets.

Source: Hinton et al., arXiv:1503.02531; for acoustic scenes and a small student, CP-JKU's submissions to DCASE 2022 and
2023 (Schmid et al.).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dcase.errors import UserError, check_range

FILES = (".npz", ".csv", ".tsv", ".pt")  # of logits


@dataclass(frozen=True)
class DistillConfig:
    teacher: str = ""
    """What the model also learns from; several are separated by commas, and the mean of their probabilities counts. A
    run: its id in --project_name, its folder with a /, or a .ckpt file, which may be of the challenge's baseline. A
    file of logits: .npz with filename and logits (FILE.npz:KEY takes another array), .csv with filename and a column
    per scene, or .pt with a row for each row of a split list. A challenge's inference package: its .py file, its folder
    with a /, or its module; its code is run."""
    teacher_input: Literal["cached", "live"] = "cached"
    """Input of the teachers. cached: each unaugmented clip once, with the outputs kept in <project>/teacher_outputs/.
    live: the student's waveforms in every step, with --roll_sec and --dir_path, without MixStyle and masks."""
    teacher_weight: float = 0.7
    """Share of the teachers in the loss, 0 to 1; the labels have the rest. docs/challenge.md says what it is worth."""
    temperature: float = 1.0
    """Divisor of the logits before the teachers' and the model's probabilities are compared."""

    def __post_init__(self):
        check_range(self, "teacher_weight", least=0, most=1)
        check_range(self, "temperature", least=0.01, most=1000)
        if self.teacher and len(set(self.teachers)) < len(self.teacher.split(",")):
            raise UserError(f"--teacher {self.teacher}: teachers with commas between them, each once")
        # A run that is resumed may be in another folder.
        object.__setattr__(self, "teacher", ",".join(_absolute(teacher) for teacher in self.teachers))

    @property
    def teachers(self) -> list[str]:
        return [teacher for teacher in self.teacher.split(",") if teacher]

    def loss(self, label_loss: Tensor, logits: Tensor, targets: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the weighted mean of the labels' loss and the teachers'.

        ``targets`` (b, n_classes) are the teachers' probabilities; ``mix`` mixes targets as the clips are mixed.
        """
        soft = soft_loss(logits, mix(targets), self.temperature)
        return (1 - self.teacher_weight) * label_loss + self.teacher_weight * soft


def is_file(teacher: str) -> bool:
    """Return whether a teacher of --teacher is a file of logits and not a run."""
    return Path(teacher.partition(":")[0]).suffix in FILES


def _absolute(teacher: str) -> str:
    is_path = "/" in teacher or is_file(teacher) or Path(teacher).suffix in (".ckpt", ".py")
    return str(Path(teacher).expanduser().absolute()) if is_path else teacher


def soft_targets(logits: Tensor, temperature: float) -> Tensor:
    """Return a teacher's probabilities (b, n_classes) at a temperature from its logits (b, n_classes)."""
    return F.softmax(logits.float() / temperature, dim=1)


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the batch's mean of temperature^2 KL(targets || softmax(logits / temperature)), from (b, n_classes) both.

    The square keeps the gradient's size independent of the temperature (arXiv:1503.02531, section 2).
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_probabilities, targets, reduction="batchmean")
