"""Checkpoint files: written beside their place and renamed, read with ``weights_only=True``, which runs no code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from lightning_fabric.plugins import CheckpointIO
from pydantic import Field, InstanceOf
from torch import Tensor

from dcase.data.labels import Labels
from dcase.errors import UserError
from dcase.files import keep_copy, replace_file
from dcase.schema import Count, Name, Schema, checked

FORMAT = 1
UNKNOWN_CLIPS = ""  # "clips_id" of a model whose training clips its file does not name
MOST_BYTES = 2**30  # of a weight that repeats one value


class _Config(Schema):
    """What every model's configuration has; `config.from_plain` reads all of it."""

    model: dict
    logmel: dict
    data: dict
    split: dict


class _Average(Schema):
    steps: Count
    average: dict[str, InstanceOf[Tensor]]


class Weights(Schema):
    """Weights alone: those that stage 2 fine-tuned for a device."""

    dcase_format: Literal[FORMAT]
    state_dict: dict[str, InstanceOf[Tensor]]


class Checkpoint(Weights):
    """A checkpoint of either stage, or what stored and published models stand for. Lightning checks its own entries."""

    config: _Config
    frames: Annotated[Count, Field(ge=1)]
    device_ids: list[Name]
    clips_id: Name
    clips_per_step: Count
    average: _Average | None = None
    train_loss: list[float] | None = None


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    replace_file(path, lambda beside: torch.save(checkpoint, beside))


def load_checkpoint(path: Path | str) -> dict:
    """Return a checkpoint of this code, on the CPU. Raises `UserError`, naming the file, for anything else."""
    return whole(_read(Path(path)), f"checkpoint {path}")


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file that holds `Weights`. Raises as `load_checkpoint`."""
    return checked(Weights, _read(path), f"checkpoint {path}").state_dict


def is_ours(content: object) -> bool:
    """Return whether a file's content is that of this code's checkpoints."""
    return isinstance(content, dict) and content.get("dcase_format") == FORMAT


def _read(path: Path) -> dict:
    content = read_file(path)
    if not is_ours(content):
        raise UserError(f"checkpoint {path} was not written by train_base.py or train_device_specific.py")
    return content


def read_file(path: Path) -> object:
    """Return the content of a file of tensors and plain values, on the CPU. Raises `UserError`, naming it, for others.

    What else the file may hold is up to `torch.serialization.safe_globals`.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist, or is no regular file: check --ckpt_path or --ckpt_id")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch does not check the checksums that it writes
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"checkpoint {path} is refused: it is damaged, no checkpoint, or holds more than weights and could run code"
        ) from error
    except Exception as error:  # a damaged file can make torch raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {path} cannot be read ({reason}): it is cut short or no checkpoint") from error


def whole(checkpoint: dict, what: str) -> dict:
    """Return a checkpoint. Raises `UserError`, which begins with ``what``, where it is not a `Checkpoint`."""
    checked(Checkpoint, checkpoint, what)
    for name, value in checkpoint["state_dict"].items():  # a small file may claim any size, by strides of 0
        is_dense = value.layout == torch.strided and not value.is_nested and not value.is_meta
        if not is_dense or value.nbytes > max(MOST_BYTES, value.untyped_storage().nbytes()):
            raise UserError(f"{what}: {name:.60} claims more values than the file holds: take another copy of it")
    labels, device_ids = Labels.from_plain(checkpoint, what), checkpoint["device_ids"]
    if len(set(device_ids) & set(labels.devices)) < len(device_ids):
        raise UserError(f"{what}: device_ids has a device twice, or one that is not among its devices")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """Return last.ckpt, or previous.ckpt, with a warning, where that is damaged; None where there is neither.

    Raises `UserError` where there are such files and none can be read.
    """
    paths = [path for path in (folder / "last.ckpt", folder / "previous.ckpt") if path.is_file()]
    problem = None
    for path in paths:
        try:
            load_checkpoint(path)
        except UserError as error:
            problem = problem or error
            continue
        if problem:
            print(f"WARNING: {problem}. Going on from {path}, which was written before it.")
            damaged = paths[0].rename(paths[0].with_name("last.ckpt.damaged"))  # it must not become previous.ckpt
            print(f"The damaged file is now {damaged}.")
        return path
    if problem:
        raise problem
    return None


class SafeCheckpoints(CheckpointIO):
    """Lightning's plugin for checkpoint files that writes and reads them as this module does.

    The earlier last.ckpt stays, as previous.ckpt.
    """

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        path = Path(path)
        if path.name == "last.ckpt" and path.exists():
            keep_copy(path, path.with_name("previous.ckpt"))
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        return load_checkpoint(path)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


def final_state(checkpoint: dict) -> dict[str, Tensor]:
    """Return a checkpoint's state dict, with averaged weights (--ema_decay) in place of the last step's."""
    average = checkpoint.get("average", {"average": {}})["average"]
    state = checkpoint["state_dict"]
    start = "adapters." if any(name.startswith("adapters.") for name in state) else "model."  # what was trained
    return state | {f"{start}{name}": value for name, value in average.items()}


def merged_checkpoint(checkpoints: Mapping[str, dict]) -> dict:
    """Return one checkpoint with the general model and the device-specific models of several, given by file name.

    Raises `UserError` where their general models differ, or where two hold a model for the same device.
    """
    (first_name, first), *others = checkpoints.items()
    merged = {**first, "state_dict": dict(first["state_dict"]), "device_ids": list(first["device_ids"])}
    general = {name: value for name, value in first["state_dict"].items() if not name.startswith("device_models.")}
    for name, checkpoint in others:
        state = checkpoint["state_dict"]
        if any(key not in state or not torch.equal(state[key], value) for key, value in general.items()):
            raise UserError(f"--ckpt_path: {first_name} and {name} are not of one general model (--ckpt_id)")
        twice = set(merged["device_ids"]) & set(checkpoint["device_ids"])
        if twice:
            raise UserError(f"--ckpt_path: {name} holds a model for device {min(twice)}, and so does one before it")
        merged["state_dict"] |= {key: value for key, value in state.items() if key.startswith("device_models.")}
        merged["device_ids"] += checkpoint["device_ids"]
    merged["device_ids"].sort(key=Labels.from_plain(first, first_name).device_index)
    return merged
