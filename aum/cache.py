"""The cache folder for files that are made once per machine: compiled kernels, the synthetic data set."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``audio_mamba`` below $AUDIO_MAMBA_CACHE, $XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    base = os.environ.get("AUDIO_MAMBA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "audio_mamba"
