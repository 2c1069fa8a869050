"""What must be whole or equal after a fault; nothing here relies on the code under test to say so."""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.faults.process import Finished

# The parts of last.ckpt that must be equal. Others count what one process did ("loops") or hold paths ("config").
_STATE = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "epoch", "global_step", "train_loss")


class Lost(Exception):
    """Something that was whole is gone, or the result is not that of an undisturbed run."""


class Unclear(Exception):
    """A traceback, a message that does not name the file, or remains of what was interrupted."""


def must_end(done: Finished, codes: Sequence[int], named: Sequence[str]) -> None:
    """Raise unless a command ended with one of the exit codes; with 2, one line must have one of the names in it."""
    if done.orphans:
        raise Unclear(f"processes that it had started outlived it: {done}")
    if "Traceback" in done.said:
        raise Unclear(f"exit code {done.code} and a traceback {done.said.partition('Traceback')[2][:3000]}")
    if done.code not in codes:
        lost = done.code == 0 or tuple(codes) == (0,)  # damage that nobody noticed, or a command that does not go on
        raise (Lost if lost else Unclear)(f"exit code {' or '.join(map(str, codes))} was due: {done}")
    clear = done.error.startswith("error: ") and len(re.findall("[\r\n]error: ", done.said)) == 1
    if done.code == 2 and not (clear and any(name in done.error for name in named)):
        raise Unclear(f"no clear error that names {' or '.join(named)}: {done}")


def _same(a, b) -> bool:
    """Return whether two nests of tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint. Raise `Lost` where it is missing, damaged or not finite."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises anything
        raise Lost(f"{path} is missing or damaged: {error}") from error
    if damaged or not all(value.isfinite().all() for value in checkpoint["state_dict"].values()):
        raise Lost(f"{path} is damaged or not finite ({damaged})")
    return checkpoint


def must_equal(path: Path, reference: Path) -> None:
    """Raise `Lost` unless a file is the undisturbed one: its bytes, or the state in a checkpoint."""
    if path.suffix == ".ckpt":
        found, wanted = read_checkpoint(path), read_checkpoint(reference)
        parts = _STATE if path.name == "last.ckpt" else ("state_dict",)
        equal = all(_same(found.get(part), wanted.get(part)) for part in parts)
    else:
        equal = path.is_file() and path.read_bytes() == reference.read_bytes()
    if not equal:
        raise Lost(f"{path} is missing or not the undisturbed one")


def read_pack(folder: Path) -> dict[bytes, tuple[memoryview, float]]:
    """Return the samples and the scale of each clip. Raise `Lost` where a block's checksum is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    samples = memoryview((folder / f"samples-{manifest['id']}.i16").read_bytes())
    for block in manifest["blocks"]:
        if hashlib.sha256(samples[block["start"] :][: block["n_bytes"]]).hexdigest() != block["sha256"]:
            raise Lost(f"a block of {folder} is damaged")
    with np.load(folder / f"index-{manifest['id']}.npz") as index:
        columns = [index[name].tolist() for name in ("filename", "start", "length", "scale")]
    clips = zip(*columns, strict=True)
    return {name: (samples[2 * start :][: 2 * length], scale) for name, start, length, scale in clips}
