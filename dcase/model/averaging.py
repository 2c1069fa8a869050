"""The average of the weights over training's last steps, which generalises better than the last step's weights.

Source: exponential moving average of the weights (Polyak averaging; as used in arXiv:1703.01780), with the decay warmed
up as min(decay, (1 + steps) / (10 + steps)), so that the first weights do not dominate a short run.

Not torch.optim.swa_utils.AveragedModel: it copies the weights at its first update in place of averaging, averages
integer buffers, has its counter of updates on the GPU, where the warm-up would wait for it in every step, and is a
module that must be kept out of checkpoints; putting the average in the model's place would still be left to us.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps the average of a model's floating-point state (parameters and BatchNorm's statistics), in float32.

    It is not part of the model: `state_dict` gives it to a checkpoint, and `swapped` puts it in the model's place.
    """

    def __init__(self, model: nn.Module, decay: float):
        """``decay``: share of the old average that a step keeps, in (0, 1)."""
        self.decay, self.steps = decay, 0
        self.in_place = False  # of the model's own weights
        self.average = {name: value.detach().clone() for name, value in _floats(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's weights, after an optimiser step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [value.detach() for value in _floats(model).values()]
        average = list(self.average.values())
        if average[0].device != current[0].device:
            average = [value.to(current[0].device) for value in average]
            self.average = dict(zip(self.average, average, strict=True))
        torch._foreach_lerp_(average, current, 1 - decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average's weights inside the block, and its own again afterwards."""
        own = {name: value.detach().clone() for name, value in _floats(model).items()}
        _copy_into(model, self.average)
        self.in_place = True
        try:
            yield
        finally:
            _copy_into(model, own)
            self.in_place = False

    def state_dict(self) -> dict:
        return {"steps": self.steps, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping) -> None:
        self.steps = state["steps"]
        self.average = {name: value.clone() for name, value in state["average"].items()}


@torch.no_grad()
def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the state dict that lies ``share`` of the way from ``start`` to ``end``: 0 is ``start``, 1 is ``end``.

    BatchNorm's statistics lie between theirs, too; its counts of batches, integers, are those of ``end``.
    Source: interpolation of a model and its fine-tuned version, arXiv:2109.01903.
    """
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def _copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in _floats(model).items():
        value.copy_(values[name])
