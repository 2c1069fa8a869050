"""A model as it is handed in: one file of safetensors, with its weights in the bits that they are counted with.

    <run>/stored/general.safetensors, a.safetensors, ...        the general model, those of devices

A file has 8 bytes that say how long its header is; the header, JSON padded with spaces, with each tensor's dtype, shape
and place (`quantisation.encode` has the names) and, under ``__metadata__``, what else a model needs; then the tensors'
bytes with nothing between them. So on disk they take what `quantisation.stored_bytes` counts.
Source of the format: github.com/huggingface/safetensors. Reading it runs no code, whatever the file holds.

Under ``__metadata__`` there is one key, "dcase_model" (the order of several would change from run to run), with JSON of

    format      1
    crc32       checksum over header and tensors: safetensors has none
    header      plain values, of whoever saves the model
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dcase.errors import UserError, one_line
from dcase.files import replace_file
from dcase.model.quantisation import bytes_by_dtype, decode, encode

FORMAT = 1
KEY = "dcase_model"
LENGTH_BYTES = 8


def save_model(path: Path | str, state: Mapping[str, Tensor], bits: int, header: dict) -> None:
    """Write one model's state dict, rounded to ``bits``, and ``header``, plain values that JSON can hold.

    The same model and header give the same bytes. Raises `UserError` where a weight cannot be stored at these bits, or
    the file cannot be written; a file that was there stays then.
    """
    tensors = {name: value.cpu() for name, value in encode(state, bits).items()}
    content = {"format": FORMAT, "crc32": _checksum(tensors, header), "header": header}
    data = safetensors.torch.save(tensors, {KEY: json.dumps(content, allow_nan=False)})
    replace_file(Path(path), lambda beside: beside.write_bytes(data))


def load_model(path: Path | str) -> tuple[dict[str, Tensor], dict, dict[str, int]]:
    """(state dict in float32, header, bytes of the stored tensors by dtype) of a file that `save_model` has written.

    The state dict has no integer buffers: a model takes it with those that it has itself.

    Raises `UserError`, naming the file, for a file that is missing, damaged, or another's.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + _header_length(data)]).get("__metadata__") or {}
    except Exception as error:  # a damaged file can make it raise anything
        raise UserError(
            f"stored model {path} cannot be read ({one_line(error)}): it is cut short, damaged or no .safetensors file"
        ) from error
    if KEY not in metadata:
        raise UserError(f"stored model {path} was not written by this code: its header has no {KEY}")
    header = _checked_header(path, metadata[KEY], tensors)
    try:
        return decode(tensors), header, bytes_by_dtype(tensors)
    except UserError as error:
        raise UserError(f"stored model {path} was not written by this code: {one_line(error)}") from error


GENERAL = "general"
MODEL, DEVICE_MODELS, FRONT_END = "model.", "device_models.", "logmel."  # beginnings of names in a checkpoint
_PLAIN = ("dcase_format", "config", "frames", "clips_id", "clips_per_step")  # of a checkpoint, for the header
_SCENES = "scenes"  # likewise; files from before have none


def save_stored(checkpoint: dict, folder: Path, bits: int) -> None:
    """Write each model of a checkpoint into ``folder``: general.safetensors, and one of each device-specific model.

    Raises as `save_model`.
    """
    models = (GENERAL, *checkpoint["device_ids"])
    for model in models:
        save_one(checkpoint, model, folder / f"{model}.safetensors", bits)
    for path in folder.glob("*.safetensors"):  # of an earlier end of this run
        if path.stem not in models:
            path.unlink()


def save_one(checkpoint: dict, model: str, path: Path, bits: int) -> None:
    """Write the general model of a checkpoint, or a device's; the front end's mean and deviation go into the header.

    Raises as `save_model`.
    """
    state = checkpoint["state_dict"]
    front_end = {name: value.item() for name, value in state.items() if name.startswith(FRONT_END)}
    config = checkpoint["config"]
    needed = {part: config[part] for part in ("model", "logmel", "split")}  # no paths of this machine
    needed["storage"] = {"weight_bits": bits}  # those of the run, where dcase.export is asked for others, round twice
    needed["data"] = {"orig_sample_rate": config["data"]["orig_sample_rate"]}
    plain = {name: checkpoint[name] for name in (*_PLAIN, _SCENES) if name in checkpoint}
    header = plain | {"config": needed, "front_end": front_end}
    start = MODEL if model == GENERAL else f"{DEVICE_MODELS}{model}."
    weights = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    save_model(path, weights, bits, header | {"model": model})


def load_stored(path: Path | str) -> dict:
    """A checkpoint, as `runs.load_checkpoint` gives it, of a stored model, or of all models of a folder.

    A file alone is used for every device. Raises `UserError`, naming the file, as `load_model`, where the folder has no
    general model, or where its files are not of one run.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"), key=lambda file: (file.stem != GENERAL, file.stem))
        if not files or files[0].stem != GENERAL:
            raise UserError(f"--ckpt_path {path}: there is no {GENERAL}.safetensors in this folder")
    checkpoint = None
    for file in files:
        weights, header, _ = load_model(file)
        if missing := [name for name in (*_PLAIN, "front_end", "model") if name not in header]:
            raise UserError(f"stored model {file} was not written by a run: its header has no {missing[0]}")
        plain = {name: header[name] for name in (*_PLAIN, _SCENES) if name in header}
        shared = plain | {"front_end": header["front_end"]}
        if checkpoint is None:
            first = shared
            front_end = {name: torch.tensor(value) for name, value in header["front_end"].items()}
            checkpoint = plain | {"state_dict": front_end, "device_ids": []}
            start = MODEL
        elif shared != first:
            raise UserError(f"--ckpt_path {path}: {file.name} is of another run than {files[0].name}")
        else:
            checkpoint["device_ids"].append(header["model"])
            start = f"{DEVICE_MODELS}{header['model']}."
        checkpoint["state_dict"] |= {f"{start}{name}": value for name, value in weights.items()}
    return checkpoint


def file_sizes(path: Path | str) -> tuple[int, int]:
    """(bytes of the header and of its length, bytes of the tensors): together the file's size.

    Raises `UserError`, naming the file, where it is missing or shorter than its header.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = LENGTH_BYTES + _header_length(file.read(LENGTH_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    if size < header:
        raise UserError(f"stored model {path} is cut short, or no .safetensors file: its header does not end in it")
    return header, size - header


def _header_length(data: bytes) -> int:
    """Bytes of the JSON, the spaces after it included."""
    return int.from_bytes(data[:LENGTH_BYTES], "little")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"stored model {path} cannot be read ({error.strerror}): check --ckpt_path")


def _checked_header(path: Path, text: str, tensors: Mapping[str, Tensor]) -> dict:
    """The header that was given to `save_model`. Raises `UserError` where version or checksum do not fit."""
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
    """CRC-32 over the header's JSON and every tensor's name, dtype, shape and bytes."""
    checksum = zlib.crc32(json.dumps(header).encode())
    for name in sorted(tensors):
        value = tensors[name]
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
