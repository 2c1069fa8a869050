"""Fine-tune few parameters: low-rank adapters beside a frozen model, or only its head.

A weight W, seen as a matrix (out, in), becomes W + up @ down with ``up`` (out, rank) and ``down`` (rank, in). The model
is neither changed nor wrapped: `LowRank` computes the sums, and ``torch.func.functional_call`` runs the model on
them:

    logits = torch.func.functional_call(model, adapters.weights(model), (x,))

Source: LoRA, arXiv:2106.09685. ``up`` starts at 0, so that training starts from the model as it is. ``down`` is drawn
uniformly within 1 / sqrt(in), as in the authors' code (microsoft/LoRA; the paper says Gaussian). The paper's factor
alpha / rank is 1 here: it only rescales the learning rate.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dcase.errors import UserError

Finetune = Literal["full", "lora", "head"]
HEADS = ("head", "classifier", "feed_forward")  # names of the last layers of Audio Mamba and CP-Mobile

# Delta is a low-rank product already, of x_proj's first rows and dt_proj; the adapter of x_proj can change it.
LEFT_OUT = ("dt_proj", "dt_proj_b")


class LowRank(nn.Module):
    """Adapters for every Linear and every ungrouped Conv2d of a model where an adapter saves parameters.

    It does where rank * (out + in) < out * in; ``skipped`` names the other layers, which stay unchanged. A
    convolution's matrix is (out channels, in channels * kernel). Depthwise convolutions have no adapters: their rows
    are filters of one channel each.

    Raises `UserError` where ``rank`` is below 1 or saves parameters in no matrix.
    """

    def __init__(self, model: nn.Module, rank: int):
        super().__init__()
        if rank < 1:
            raise UserError(f"--lora_rank is at least 1; got {rank}")
        self.rank = rank
        self.skipped: list[str] = []
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        largest = 0  # the highest useful rank of any matrix
        for name, weight in _matrices(model):
            n_out, n_in = weight.flatten(1).shape
            most = (n_out * n_in - 1) // (n_out + n_in)
            largest = max(largest, most)
            if rank > most:
                self.skipped.append(name)
                continue
            bound = n_in**-0.5
            self.down[_key(name)] = nn.Parameter(weight.new_empty(rank, n_in).uniform_(-bound, bound))
            self.up[_key(name)] = nn.Parameter(weight.new_zeros(n_out, rank))
        if not self.up:
            least = f"give at most {largest}" if largest else "use --finetune full or head"
            raise UserError(f"--lora_rank {rank} is too high: no matrix of this model gains from it; {least}")

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter name -> W + up @ down, of W's shape and dtype. Gradients reach the adapters, not W."""
        names = [key.replace("/", ".") for key in self.up]
        return {name: self._sum(name, model.get_parameter(name).detach()) for name in names}

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        up, down = self.up[_key(name)], self.down[_key(name)]
        with torch.autocast(weight.device.type, enabled=False):  # 16 bit would train other weights than `merged` gives
            return weight + (up @ down).view_as(weight)

    @torch.no_grad()
    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of ``model``'s state dict, buffers included, with the adapters added in."""
        return {name: value.detach().clone() for name, value in {**model.state_dict(), **self.weights(model)}.items()}

    def line(self) -> str:
        """Return a line about the adapted layers for the log."""
        size = sum(p.numel() for p in self.parameters())
        said = f"low-rank adapters: {size:,} parameters of rank {self.rank} in {len(self.up)} layers"
        small = ", ".join(name.removesuffix(".weight") for name in self.skipped)
        return f"{said}; too small for this rank, so not trained: {small}" if small else said


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, weight) of the layers that can have an adapter, in the model's order."""
    for name, layer in model.named_modules():
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if plain and name.rpartition(".")[2] not in LEFT_OUT:
            yield f"{name}.weight" if name else "weight", layer.weight


def _key(name: str) -> str:
    """Return a parameter's name without dots, which a ParameterDict does not allow."""
    return name.replace(".", "/")


def trainable(model: nn.Module, finetune: Finetune) -> None:
    """Set which of the model's parameters have gradients: all, none ("lora": the adapters have them) or the head's.

    This does not freeze BatchNorm: in training mode its running mean and variance still follow the new data.

    Raises `UserError` for an unknown ``finetune``, or where no layer has a name in `HEADS` to train as the head.
    """
    if finetune not in get_args(Finetune):
        raise UserError(f"--finetune is one of {', '.join(get_args(Finetune))}; got {finetune!r}")
    heads = [layer for name, layer in model.named_children() if name in HEADS]
    if finetune == "head" and not heads:
        raise UserError(
            f"--finetune head: {type(model).__name__} has none of the layers {', '.join(HEADS)}; use full or lora"
        )
    model.requires_grad_(finetune == "full")
    for layer in heads if finetune == "head" else ():
        layer.requires_grad_(True)
