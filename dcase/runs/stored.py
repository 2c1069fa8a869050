"""Stored models: safetensors files whose weights take the bits that they are counted with.

    <run>/stored/general.safetensors, a.safetensors, ...        the general model, and one of each tuned device

A file begins with 8 bytes, the length of its header. The header, JSON padded with spaces, gives each tensor's dtype,
shape and place (`quantisation.encode` has the names), and under ``__metadata__`` what a model needs beside its weights.
The tensors' bytes follow without gaps, so on disk they take what `quantisation.stored_bytes` counts.
Source of the format: github.com/huggingface/safetensors. Reading a file never runs code from it.

``__metadata__`` has one key, "dcase_model" (the order of several would change from run to run), with JSON of

    format      1
    crc32       checksum over header and tensors: safetensors has none
    header      plain values that the caller gives: `header_of` a checkpoint, or a submission's (`submission.inference`)
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dcase.data.labels import TAU22_LABELS
from dcase.errors import UserError, one_line
from dcase.files import regular, replace_file
from dcase.model.quantisation import decode, encode

FORMAT = 1
KEY = "dcase_model"
LENGTH_BYTES = 8

GENERAL = "general"
MODEL, DEVICE_MODELS, FRONT_END = "model.", "device_models.", "logmel."  # prefixes of names in a checkpoint
_PLAIN = ("dcase_format", "config", "frames", "clips_id", "clips_per_step")  # entries of a checkpoint
_LABELS = tuple(TAU22_LABELS.plain())  # further ones, which files of earlier versions lack


# The file


def save_model(path: Path | str, state: Mapping[str, Tensor], bits: int, header: dict) -> None:
    """Write a state dict, rounded to ``bits``, and ``header``, plain values that JSON can hold.

    The same state and header give the same bytes. Raises `UserError` where a weight cannot be stored at these bits or
    the file cannot be written; an existing file then stays.
    """
    tensors = {name: value.cpu() for name, value in encode(state, bits).items()}
    content = {"format": FORMAT, "crc32": _checksum(tensors, header), "header": header}
    data = safetensors.torch.save(tensors, {KEY: json.dumps(content, allow_nan=False)})
    replace_file(Path(path), lambda beside: beside.write_bytes(data))


def load_model(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Return (state dict in float32, header) of a file of `save_model`.

    The state dict has no integer buffers: a model keeps its own.

    Raises `UserError`, naming the file, where it is missing, damaged or of another program.
    """
    try:
        data = Path(regular(path)).read_bytes()
    except OSError as error:
        raise UserError(f"stored model {path} cannot be read ({error.strerror}): check --ckpt_path") from error
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        metadata = dict(json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length]).get("__metadata__") or {})
    except Exception as error:  # a damaged file can make it raise anything
        raise UserError(
            f"stored model {path} cannot be read ({one_line(error)}): it is cut short, damaged or no .safetensors file"
        ) from error
    if KEY not in metadata:
        raise UserError(f"stored model {path} was not written by this code: its header has no {KEY}")
    header = _checked_header(path, metadata[KEY], tensors)
    try:
        return decode(tensors), header
    except UserError as error:
        raise UserError(f"stored model {path} was not written by this code: {one_line(error)}") from error


def _checked_header(path: Path | str, text: str, tensors: Mapping[str, Tensor]) -> dict:
    """Return the header that `save_model` was given. Raises `UserError` where format or checksum do not fit."""
    damaged = f"stored model {path} is damaged: its {{}} is not what was written; take another copy of it"
    try:
        content = json.loads(text)
        version = content["format"]
        if version != FORMAT:
            raise UserError(
                f"stored model {path} has format {version!r}, and this code reads {FORMAT}: use the code that wrote it"
            )
        checksum, header = content["crc32"], dict(content["header"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(damaged.format("header")) from error
    if checksum != _checksum(tensors, header):
        raise UserError(damaged.format("checksum"))
    return header


def _checksum(tensors: Mapping[str, Tensor], header: dict) -> int:
    """Return a CRC-32 over the header's JSON and the name, dtype, shape and bytes of every tensor."""
    checksum = zlib.crc32(json.dumps(header).encode())
    for name in sorted(tensors):
        value = tensors[name]
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


# A checkpoint and what its models need: the same for stored, published and submitted models


def prefix_of(model: str) -> str:
    """Return how the names of a model's weights begin in a checkpoint. ``model``: "general" or a device."""
    return MODEL if model == GENERAL else f"{DEVICE_MODELS}{model}."


def weights_of(state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Return one model's weights of a checkpoint's state dict, by the model's own names."""
    start = prefix_of(model)
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def header_of(checkpoint: dict, model: str, bits: int) -> dict:
    """Return what one model of a checkpoint needs beside its weights: plain values, without paths of this machine."""
    config = checkpoint["config"]
    needed = {part: config[part] for part in ("model", "logmel", "split")}
    needed["storage"] = {"weight_bits": bits}  # where dcase.export is asked for other bits than the run's: those
    needed["data"] = {"orig_sample_rate": config["data"]["orig_sample_rate"]}
    plain = {name: checkpoint[name] for name in (*_PLAIN, *_LABELS) if name in checkpoint}
    state = checkpoint["state_dict"]
    front_end = {name: value.item() for name, value in state.items() if name.startswith(FRONT_END)}
    return plain | {"config": needed, "front_end": front_end, "model": model}


def checkpoint_of(models: Mapping[str, tuple[dict, Mapping[str, Tensor]]], what: str) -> dict:
    """Return a checkpoint, as `load_checkpoint` does, of models, each given by name as (header, weights).

    The first serves as the general model, even where its header names a device. Raises `UserError`, beginning with
    ``what``, where another one is not of the same run or not of the device that names it.
    """
    (general, (first, _)), *_ = models.items()
    try:
        state = {name: torch.tensor(float(value)) for name, value in dict(first.get("front_end")).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what}: front_end holds no numbers ({one_line(error)[:100]})") from error
    device_ids = [name for name in models if name != general]
    for name, (header, weights) in models.items():
        if name != general and header != first | {"model": name}:
            raise UserError(f"{what}: {name} is of another run than {general}, or of another device than its name")
        start = MODEL if name == general else prefix_of(name)
        state |= {f"{start}{part}": value for part, value in weights.items()}
    plain = {name: first[name] for name in (*_PLAIN, *_LABELS) if name in first}
    return plain | {"state_dict": state, "device_ids": device_ids}


# Stored models


def save_stored(checkpoint: dict, folder: Path, bits: int) -> None:
    """Write each model of a checkpoint into ``folder``: general.safetensors and one file per device-specific model.

    Files of an earlier end of this run are removed. Raises as `save_model`.
    """
    models = (GENERAL, *checkpoint["device_ids"])
    for model in models:
        save_one(checkpoint, model, folder / f"{model}.safetensors", bits)
    for path in folder.glob("*.safetensors"):
        if path.stem not in models:
            path.unlink()


def save_one(checkpoint: dict, model: str, path: Path, bits: int) -> None:
    """Write the general model of a checkpoint, or a device's. Raises as `save_model`."""
    save_model(path, weights_of(checkpoint["state_dict"], model), bits, header_of(checkpoint, model, bits))


def load_stored(path: Path | str) -> dict:
    """Return a checkpoint, as `load_checkpoint` does, of a stored model or of all models of a folder.

    A single file serves every device. Raises `UserError`, naming the file, as `load_model` and `checkpoint_of`, and
    where the folder has no general model.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"), key=lambda file: (file.stem != GENERAL, file.stem))
        if not files or files[0].stem != GENERAL:
            raise UserError(f"--ckpt_path {path}: there is no {GENERAL}.safetensors in this folder")
    models = {file.stem: load_model(file)[::-1] for file in files}
    return checkpoint_of(models, f"--ckpt_path {path}")
