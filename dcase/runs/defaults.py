"""The defaults that belong to a model, by flag: what differs for it from those of the configuration's dataclasses.

The dataclasses hold AuM-Small's, which every model without an entry here shares. They also stand in for a field that a
saved configuration lacks, whatever its model: the run is older than the field, and in stage 1 these values are as it
was.
"""

import dataclasses
from typing import TypeVar

from dcase import cli
from dcase.model.named import ModelConfig

Config = TypeVar("Config")

_NANO = {  # measured on SynthTAU, docs/training.md
    "batch_size": 32,
    "lr": 0.005,
    "warmup_steps": 1000,
    "mixstyle_p": 0.4,
    "mixstyle_alpha": 0.3,
    "freqm": 16,
    "timem": 8,
}
ORIGINS = {  # of the other models': the document that this project began with
    "aum_nano": "measured, docs/training.md",
    "aum_nano_8bit": "measured, docs/training.md",
    "cp_mobile": "the DCASE2025 baseline's",
}
DEFAULTS = {
    "aum_nano": {**_NANO, "weight_bits": 16},
    "aum_nano_8bit": {**_NANO, "weight_bits": 8},
    "cp_mobile": {  # those of the DCASE2025 baseline: CPJKU/dcase2025_task1_baseline, train_base.py
        "batch_size": 256,
        "lr": 0.005,
        "warmup_steps": 2000,
        "mixstyle_p": 0.4,
        "mixstyle_alpha": 0.3,
        "freqm": 48,
        "timem": 0,
        "mask_on": "mel",
        "normalise": False,
        "gradient_clip_val": 0.0,
        "weight_bits": 16,
    },
}
NAMES = list(dict.fromkeys(name for flags in DEFAULTS.values() for name in flags))  # of all models' flags


def with_defaults(config: Config, model: str) -> Config:
    """Return a configuration with a model and that model's defaults; an unknown model has none of its own."""

    def changed(part):
        own = {name: value for name, value in DEFAULTS.get(model, {}).items() if name in vars(part)}
        return dataclasses.replace(part, **own)

    parts = {name: changed(part) for name, part in vars(config).items() if dataclasses.is_dataclass(part)}
    return dataclasses.replace(changed(config), **parts | {"model": ModelConfig(model)})


def taken(config: Config) -> str:
    """Return a line with the model's defaults that no flag has changed."""
    model = config.model.model
    values, own = cli.flags_of(config), cli.flags_of(with_defaults(type(config)(), model))
    flags = [f"--{name} {own[name]}" for name in NAMES if values[name] == own[name]]
    origin = ORIGINS.get(model, "from the document that this project began with")
    return f"defaults of {model} ({origin}): {' '.join(flags) or 'none, flags set them all'}"
