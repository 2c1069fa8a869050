"""Named models and the flags that override them."""

import dataclasses
import typing

from torch import nn

import aum
from dcase.data.labels import SCENES
from dcase.errors import UserError
from dcase.model.cp_mobile import CPMobile

# Models whose shape no flag overrides: name -> module, called with the number of scenes.
FIXED = {"cp_mobile": CPMobile}


_OTHER = ("n_mels", "target_length", "norm_eps")  # fields of AuMConfig that are no flags of the model

ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [
        ("model", str, "aum_small"),
        *(
            (name, kind | None, None)
            for name, kind in typing.get_type_hints(aum.AuMConfig).items()
            if name not in _OTHER
        ),
    ],
    frozen=True,
    namespace={"__module__": __name__},
)
ModelConfig.__doc__ = f"""A named model and overrides: the fields of `aum.AuMConfig`, None for the named model's values.

    All but ``model`` and ``n_classes`` belong to Audio Mamba's shape, and stay None for the models in `FIXED`.

    Attributes:
        model: Audio Mamba's named sizes aum_nano and aum_nano_8bit, made for the challenge's limits, aum_tiny,
            aum_small, aum_base; or cp_mobile, the challenge's baseline.
{aum.AuMConfig.__doc__.partition("Attributes:")[2].lstrip(chr(10))}"""


def names() -> list[str]:
    """Return the values of --model."""
    return [*aum.list_models(), *FIXED]


def fill(config: ModelConfig, n_mels: int, frames: int, n_scenes: int | None = None) -> ModelConfig:
    """Replace every None by the named model's value. ``n_scenes``: of the data folder, where that is known already.

    Raises `UserError` where the values are invalid.
    """
    if config.model not in names():
        raise UserError(f"--model is one of {', '.join(names())}; got {config.model!r}")
    if config.n_classes is None:
        config = dataclasses.replace(config, n_classes=n_scenes or len(SCENES))
    if config.n_classes < 1 or config.n_classes != (n_scenes or config.n_classes):
        counted = f"the data folder has {n_scenes} scenes" if n_scenes else "it is the number of the data's scenes"
        raise UserError(f"--n_classes {config.n_classes}: {counted}; leave the flag out")
    if config.model in FIXED:
        for name in _given(config):
            if name != "n_classes":
                raise UserError(f"--{name} does not apply to {config.model}: leave it out")
        return config
    shape = _shape(config, n_mels, frames)
    of_shape = {field.name for field in dataclasses.fields(config)} - {"model"}
    return dataclasses.replace(config, **{name: getattr(shape, name) for name in of_shape})


def refuse_lengths(config: ModelConfig, n_mels: int, frames: int) -> None:
    """Raise `UserError` where the model cannot take clips of several lengths (--batch_lengths)."""
    mixing = ["convolutions"] if config.model in FIXED else _shape(config, n_mels, frames).mixing
    if mixing:
        raise UserError(
            f"--batch_lengths: {config.model} would mix a clip with its padding ({', '.join(mixing)}); take --model "
            "aum_tiny, aum_small or aum_base, or give --target_length alone"
        )


def build(config: ModelConfig, n_mels: int, frames: int) -> nn.Module:
    """Return the model for log-mels (b, 1, n_mels, frames). Raises `UserError` where the flags are invalid."""
    config = fill(config, n_mels, frames)
    if config.model in FIXED:
        return FIXED[config.model](config.n_classes)
    return aum.AudioMamba(_shape(config, n_mels, frames))


def _shape(config: ModelConfig, n_mels: int, frames: int) -> aum.AuMConfig:
    try:
        return aum.create_config(config.model, n_mels=n_mels, target_length=frames, **_given(config))
    except ValueError as error:  # its message begins with the field's name, which is the flag's
        raise UserError(f"--{error}") from error


def _given(config: ModelConfig) -> dict:
    """Return the overrides of the named model, by name."""
    return {name: value for name, value in vars(config).items() if name != "model" and value is not None}
