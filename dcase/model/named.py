"""Named models and the flags that change them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

import aum
from dcase.data.labels import SCENES
from dcase.errors import UserError
from dcase.model.cp_mobile import CPMobile

# Models whose shape no flag changes: name -> module, made from the number of scenes.
FIXED = {"cp_mobile": CPMobile}


@dataclass(frozen=True)
class ModelConfig:
    """A named model and what of it to change; None: as the named one has it.

    All but ``model`` and ``n_classes`` are of Audio Mamba's shape, and stay None for those of `FIXED`, as CP-Mobile.
    """

    model: str = "aum_small"
    """Audio Mamba's named sizes aum_nano and aum_nano_8bit, made for the challenge's limits, aum_tiny, aum_small,
    aum_base; cp_mobile: the challenge's baseline."""
    embed_dim: int | None = None
    """Width of a token (aum_small: 384)."""
    depth: int | None = None
    """Number of blocks (aum_small: 24)."""
    freq_norm: float | None = None
    """Share of each mel bin's mean over the frames that is taken off the log-mel, 0 to 1 (0)."""
    stem: tuple[int, ...] | None = None
    """Channels of 3 x 3 convolutions before the patches, each of which halves mel bins and frames, as 8,32."""
    stem_blocks: int | None = None
    """Inverted residual blocks of convolutions after those of --stem (0)."""
    patch_size: tuple[int, int] | None = None
    """Mel bins and frames of a patch (aum_small: 16,16); with a stem, of what it makes of the log-mel."""
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
    factorised_pos_embed: bool | None = None
    """The position embedding is the sum of one for mel and one for time, not a vector per patch (False)."""
    row_scan: bool | None = None
    """Each mel row of patches is a sequence of its own, along time (False)."""
    local_conv: bool | None = None
    """A 3 x 3 depthwise convolution over the grid of patches before each block (False)."""
    head: Literal["mlp", "linear", "patch"] | None = None
    """Classifier of what is pooled: MLP of 512 units or one linear layer; patch: one of every patch, whose scores
    are pooled (aum_small: mlp)."""
    dropout: float | None = None
    """Dropout in the MLP head, 0 to 1 (0.1)."""
    drop_path: float | None = None
    """Stochastic depth: probability at the last block, 0 to 1 (0)."""


def names() -> list[str]:
    """What --model takes."""
    return [*aum.list_models(), *FIXED]


def fill(config: ModelConfig, n_mels: int, frames: int) -> ModelConfig:
    """The same with every None replaced by the named model's value. Raises `UserError` where it makes no model."""
    if config.model not in names():
        raise UserError(f"--model is one of {', '.join(names())}; got {config.model!r}")
    if config.model in FIXED:
        for name in _given(config):
            if name != "n_classes":
                raise UserError(f"--{name} does not apply to {config.model}: leave it out")
        filled = dataclasses.replace(config, **{"n_classes": len(SCENES), **_given(config)})
    else:
        shape = _shape(config, n_mels, frames)
        of_shape = {field.name for field in dataclasses.fields(config)} - {"model"}
        filled = dataclasses.replace(config, **{name: getattr(shape, name) for name in of_shape})
    if filled.n_classes != len(SCENES):
        raise UserError(
            f"--n_classes is {len(SCENES)}, the number of scenes in dcase/data/labels.py; got {filled.n_classes}"
        )
    return filled


def build(config: ModelConfig, n_mels: int, frames: int) -> nn.Module:
    """The model for log-mels (b, 1, n_mels, frames). Raises `UserError` where the flags make no model."""
    config = fill(config, n_mels, frames)
    if config.model in FIXED:
        return FIXED[config.model](config.n_classes)
    return aum.AudioMamba(_shape(config, n_mels, frames))


def _shape(config: ModelConfig, n_mels: int, frames: int) -> aum.AuMConfig:
    try:
        shape = {"n_mels": n_mels, "target_length": frames, "n_classes": len(SCENES)}
        return aum.create_config(config.model, **shape | _given(config))
    except ValueError as error:  # its message begins with the field's name, which is the flag's
        raise UserError(f"--{error}") from error


def _given(config: ModelConfig) -> dict:
    """The flags that change the named model, by name."""
    return {name: value for name, value in vars(config).items() if name != "model" and value is not None}
