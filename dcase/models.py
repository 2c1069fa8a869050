"""Named models and the flags that change them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

import aum
from dcase.errors import UserError
from dcase.tau22 import SCENES


@dataclass(frozen=True)
class ModelConfig:
    """A named size and what of it to change; None: as the named size has it."""

    model: str = "aum_small"
    """Named size: aum_nano, aum_tiny, aum_small or aum_base."""
    embed_dim: int | None = None
    """Width of a token (aum_small: 384)."""
    depth: int | None = None
    """Number of blocks (aum_small: 24)."""
    patch_size: tuple[int, int] | None = None
    """Mel bins and frames of a patch (aum_small: 16,16)."""
    strides: tuple[int, int] | None = None
    """Mel bins and frames from one patch to the next; None: those of the patch."""
    n_classes: int | None = None
    """Number of scenes (10)."""
    d_state: int | None = None
    """States per channel (16)."""
    d_conv: int | None = None
    """Taps of the causal convolution (4)."""
    expand: int | None = None
    """Channels inside a block over --embed_dim (2)."""
    direction: Literal["bi_bi", "fo_bi", "fo_fo"] | None = None
    """AuM's Bi-Bi, Fo-Bi or Fo-Fo blocks (bi_bi)."""
    paired_layers: bool | None = None
    """Pair forward with flipped layers, as the earlier audio-mamba-asc code does (False)."""
    pool: Literal["mean", "cls"] | None = None
    """Classify the mean over all tokens or the class token (mean)."""
    cls_position: Literal["middle", "start", "end", "none"] | None = None
    """Where the class token stands (middle)."""
    pos_embed: bool | None = None
    """Learned position embedding (False)."""
    head: Literal["mlp", "linear"] | None = None
    """Classifier: MLP of 512 units or one linear layer (aum_small: mlp)."""
    dropout: float | None = None
    """Dropout in the MLP head, 0 to 1 (0.1)."""
    drop_path: float | None = None
    """Stochastic depth: probability at the last block, 0 to 1 (0)."""


def fill(config: ModelConfig, n_mels: int, frames: int) -> ModelConfig:
    """The same with every None replaced by the named size's value. Raises `UserError` where it makes no model."""
    shape = _shape(config, n_mels, frames)
    overridable = {field.name for field in dataclasses.fields(config)} - {"model"}
    return dataclasses.replace(config, **{name: getattr(shape, name) for name in overridable})


def build(config: ModelConfig, n_mels: int, frames: int) -> nn.Module:
    """The model for log-mels (b, 1, n_mels, frames). Raises `UserError` where the flags make no model."""
    return aum.AudioMamba(_shape(config, n_mels, frames))


def _shape(config: ModelConfig, n_mels: int, frames: int) -> aum.AuMConfig:
    overrides = {name: value for name, value in vars(config).items() if name != "model" and value is not None}
    if config.model not in aum.list_models():
        raise UserError(f"--model is one of {', '.join(aum.list_models())}; got {config.model!r}")
    try:
        shape = aum.create_config(config.model, n_mels=n_mels, target_length=frames, **overrides)
    except ValueError as error:  # its message begins with the field's name, which is the flag's
        raise UserError(f"--{error}") from error
    if shape.n_classes != len(SCENES):
        raise UserError(f"--n_classes is {len(SCENES)}, the scenes of TAU22; got {shape.n_classes}")
    return shape
