"""Audio Mamba, the backbone.

It depends on no sampling rate, no scene and no Lightning; its one command, aum.pretrained, shows a file."""

from aum import compat
from aum.create import create_model
from aum.mamba import BiMamba
from aum.model import (
    AudioMamba,
    AuMConfig,
    create_config,
    list_models,
    parameter_groups,
)
from aum.pretrained import PretrainedError, UnknownGrid, load_pretrained
from aum.scan import available_backends, selective_scan_fn, use_backend
from aum.self_test import SelfTestFailed, self_test, tested_backend

__version__ = "0.1.0"  # CITATION.cff and CHANGELOG.md name it, too

__all__ = [
    "AuMConfig",
    "AudioMamba",
    "BiMamba",
    "PretrainedError",
    "SelfTestFailed",
    "UnknownGrid",
    "available_backends",
    "compat",
    "create_config",
    "create_model",
    "list_models",
    "load_pretrained",
    "parameter_groups",
    "selective_scan_fn",
    "self_test",
    "tested_backend",
    "use_backend",
]
