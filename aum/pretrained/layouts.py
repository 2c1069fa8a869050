"""Read a checkpoint file's tensors, in any known container and with any known prefixes, under our names.

Reading runs no code.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DataParallel and torch.compile
# Where files hold their state dict: Vim's under "model", Lightning's under "state_dict", others' under the rest.
KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params", "ema", "model_ema",
    "state_dict_ema", "module",
)  # fmt: skip
BESIDE = {  # prefix of names that are no weights of an Audio Mamba -> why they are left out
    "logmel.": "the run's own front end",
    "mel.": "the earlier code's front end",
    "device_models.": "device-specific models: only the general model is taken",
    "rope.": "rotary position embedding, which this model does not have",
}


class PretrainedError(ValueError):
    """A checkpoint cannot be used, or not for this model. The message is one line."""


def read_file(path: Path) -> object:
    """Return the content of a file, on the CPU."""
    if not path.is_file():
        raise PretrainedError(f"{path} does not exist, or is no file")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # only for such files

            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch itself does not look at the checksums it writes
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
        # Files of Vim and of Lightning hold the training script's flags as a Namespace of plain attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if not found:
            raise PretrainedError(f"{path} cannot be read: it is damaged, or no checkpoint") from error
        raise PretrainedError(
            f"{path} is refused: it holds {found[1]} beside weights, which could run code. If you trust it, save "
            "only its state dict where it was made"
        ) from error
    except Exception as error:  # a damaged file can make torch raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PretrainedError(
            f"{path} cannot be read ({reason}): it is cut short, damaged, or no checkpoint"
        ) from error


def state_dict(checkpoint: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file's content: the first under one of `KEYS` that holds tensors, or all of it."""
    top = checkpoint if isinstance(checkpoint, Mapping) else {}
    places = [found for found in (*map(top.get, KEYS), top) if isinstance(found, Mapping) and found]
    if not places:
        raise PretrainedError(f"{path} holds no state dict, neither at its top nor under {', '.join(KEYS)}")
    found = next((x for x in places if any(isinstance(value, Tensor) for value in x.values())), places[0])
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            entry = f"its entry {str(name)[:50]!r} is no tensor (looked for under {', '.join(KEYS)}, and at its top)"
            raise PretrainedError(f"{path} holds no state dict: {entry}")
        is_dense = value.layout == torch.strided and not value.is_nested and not value.is_meta
        if not is_dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise PretrainedError(f"{path} is damaged: {name:.50} claims more values than the file holds")
    return dict(found)


def our_names(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(our name -> name in the file, name in the file -> why it is left out): each prefix goes once, from the front."""
    names, beside = {name: name for name in tensors}, {}

    def strip(prefix: str) -> None:
        nonlocal names
        stripped = {name.removeprefix(prefix): file for name, file in names.items()}
        if len(stripped) < len(names):
            raise PretrainedError(f"{path} holds two state dicts, with and without {prefix} before the names")
        names = stripped

    def unwrap() -> None:
        for prefix in (*WRAPPERS, WRAPPERS[0]):  # in either order
            if all(name.startswith(prefix) for name in names):
                strip(prefix)

    def set_aside() -> None:
        for name, file in list(names.items()):
            for start, why in BESIDE.items():
                if name.startswith(start):
                    beside[file] = why
                    del names[name]

    unwrap()
    if any(name.startswith("adapters.") for name in names):
        raise PretrainedError(f"{path} holds low-rank adapters, not merged yet: give tuned.ckpt of the same device")
    set_aside()
    strip("model.")
    unwrap()
    strip("aum_model.")
    set_aside()
    return names, beside
