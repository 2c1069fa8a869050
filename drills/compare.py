"""What must be the same after a fault, and what must be whole; nothing here relies on the code under test to say so."""

import hashlib
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from drills.drill import Lost

# Of a checkpoint. "loops" counts what this process did, and "config" holds paths; whether a run goes on where it was is
# seen from its steps.
_STATE = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "epoch", "global_step", "train_loss")


def same(a, b) -> bool:
    """Whether two nests of tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def read_checkpoint(path: Path) -> dict:
    """A checkpoint that must be there, whole and finite."""
    if not path.is_file():
        raise Lost(f"{path} is missing")
    try:
        damaged = zipfile.ZipFile(path).testzip()
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises anything
        raise Lost(f"{path} is damaged: {error}") from error
    if damaged:
        raise Lost(f"{path} is damaged: {damaged}")
    if not all(value.isfinite().all() for value in checkpoint["state_dict"].values()):
        raise Lost(f"{path} is not finite")
    return checkpoint


def same_weights(path: Path, reference: Path) -> None:
    same_checkpoints(path, reference, ("state_dict",))


def same_checkpoints(path: Path, reference: Path, parts: tuple[str, ...] = _STATE) -> None:
    """Whether weights, optimiser and all that goes on from there are equal."""
    found, wanted = read_checkpoint(path), read_checkpoint(reference)
    for part in parts:
        if not same(found.get(part), wanted.get(part)):
            raise Lost(f"{part} of {path} is not the undisturbed run's")


def same_files(path: Path, reference: Path) -> None:
    if not path.is_file():
        raise Lost(f"{path} is missing")
    if path.read_bytes() != reference.read_bytes():
        raise Lost(f"{path} is not the undisturbed run's")


def read_pack(folder: Path) -> dict[bytes, tuple[bytes, float]]:
    """Every clip of a pack: its samples and scale. Raises `Lost` where a checksum is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    samples = (folder / f"samples-{manifest['id']}.i16").read_bytes()
    for block in manifest["blocks"]:
        piece = samples[block["start"] : block["start"] + block["n_bytes"]]
        if len(piece) != block["n_bytes"] or hashlib.sha256(piece).hexdigest() != block["sha256"]:
            raise Lost(f"a block of {folder} is damaged")
    with np.load(folder / f"index-{manifest['id']}.npz") as index:
        columns = [index[name].tolist() for name in ("filename", "start", "length", "scale")]
    return {
        name: (samples[2 * start : 2 * (start + length)], scale)
        for name, start, length, scale in zip(*columns, strict=True)
    }


def same_packs(folder: Path, reference: dict) -> None:
    if read_pack(folder) != reference:
        raise Lost(f"{folder} is not the undisturbed pack")
