"""Checkpoints of the challenge's baselines (DCASE 2024 and 2025) and of what was trained with their code.

    multi_device_model.base_model.*, multi_device_model.device_models.a.*, ...      general model, and those of devices
    model.*, or nothing before the names                                            one model

Such a file is known by its tensors: names and shapes are CP-Mobile's (`model.cp_mobile`). It says neither which clips
it was trained on nor, as a rule, its front end: that is the baseline's, which is `LogMelConfig`'s defaults without
normalisation. Where the file holds a window and mel filters, they must be the baseline's, too.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from aum.pretrained.layouts import PretrainedError, state_dict
from dcase.data.labels import SCENES, TAU22_LABELS
from dcase.data.logmel import LogMel, LogMelConfig, frames_of
from dcase.data.tau22 import RATE, SplitConfig
from dcase.errors import UserError, printable
from dcase.model.cp_mobile import CPMobile
from dcase.runs.checkpoints import FORMAT, UNKNOWN_CLIPS, is_ours, read_file, whole
from dcase.runs.stored import DEVICE_MODELS, FRONT_END, GENERAL, prefix_of

_GENERAL = ("multi_device_model.base_model.", "model.base_model.", "base_model.", "model.", "")  # before its names
_COUNTS = "num_batches_tracked"  # of BatchNorm: nothing needs them
_NETWORK = ("in_c.", "stages.", "feed_forward.")
# What trainers keep beside tensors, in settings and the state of callbacks. None of it is needed, imported or called.
_BESIDE = {
    *("argparse", "collections", "numpy", "omegaconf", "pathlib", "typing"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "set", "str", "tuple")),
}
_FILTERS = 1e-3  # largest difference of mel filters: rounding to float16, and that of other versions of torchaudio


class _Object:
    """What stands for an object of such a class. It takes anything and keeps nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Dict:
    """What stands for a kind of dict: torch sets items of a plain one."""

    def __new__(cls, *_) -> dict:
        return {}


@contextmanager
def _stand_ins(path: Path) -> Iterator[list[str]]:
    """Let torch load a file with stand-ins in place of the classes that are `_BESIDE` weights; yield the libraries'.

    Raises `UserError` where the file names anything else that torch does not know to be harmless.
    """
    found = []
    with suppress(Exception):  # whatever is wrong with the file, reading it says so
        if path.is_file():  # a FIFO would be waited for
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    for name in found:
        if not {name, name.partition(".")[0]} & _BESIDE:
            raise UserError(
                f"checkpoint {path} is refused: it holds {name:.100} beside weights, which could run code. If you "
                "trust it, save only its state dict where it was made"
            )
    with torch.serialization.safe_globals(
        [(_Dict if name.lower().endswith("dict") else _Object, name) for name in found]
    ):
        yield [name for name in found if not name.startswith("builtins.")]


def load_file(path: Path | str) -> dict:
    """Return a checkpoint, as `load_checkpoint` does, of this code or of the challenge's; say which, if the latter.

    Raises `UserError`, naming the file, for anything else.
    """
    path = Path(path)
    with _stand_ins(path) as skipped:
        content = read_file(path)
    if not is_ours(content):
        content = _converted(content, path, skipped)
    return whole(content, f"checkpoint {path}")


def _converted(content: object, path: Path, skipped: list[str]) -> dict:
    what = f"checkpoint {path}"
    try:
        state = state_dict(content, path)
    except PretrainedError as error:
        raise UserError(f"{what} was written neither by train_base.py nor train_device_specific.py; {error}") from error
    of_network = {start: tuple(f"{start}{part}" for part in _NETWORK) for start in _GENERAL}
    start = next((start for start in _GENERAL if any(name.startswith(of_network[start]) for name in state)), None)
    if start is None:
        raise UserError(
            f"{what} was written neither by train_base.py nor train_device_specific.py, and holds no CP-Mobile of the "
            f"challenge's baseline, under model. or multi_device_model.; it holds {_listed(state)}"
        )
    of_devices = start.removesuffix("base_model.") + DEVICE_MODELS if start.endswith("base_model.") else None
    names = [name.removeprefix(of_devices) for name in state if of_devices and name.startswith(of_devices)]
    device_ids = sorted({name.partition(".")[0] for name in names}, key=TAU22_LABELS.device_index)
    starts = {GENERAL: start, **{device_id: f"{of_devices}{device_id}." for device_id in device_ids}}
    models = {model: _named(state, starts[model]) for model in starts}
    for model, tensors in models.items():
        _refuse_other_network(tensors, starts[model], what)
    beside = {name: x for name, x in state.items() if not name.startswith(tuple(starts.values()))}
    has_front_end = _check_front_end(beside, what)
    halved = all(x.dtype == torch.float16 for tensors in models.values() for x in tensors.values())
    left_out = [*skipped, *({name.partition(".")[0] for name in beside if not name.startswith("mel.")})]
    of = f" with models of {', '.join(device_ids)}" if device_ids else ""
    said = "as in the file" if has_front_end else "which the file does not say"
    rest = f"; left out: {', '.join(sorted(left_out)[:12])}" if left_out else ""
    bits = 16 if halved else 32
    print(printable(f"{path}: the challenge's CP-Mobile{of}, in {bits} bits; front end: the baseline's, {said}{rest}"))
    logmel = LogMelConfig()
    return {
        "dcase_format": FORMAT,
        "config": {
            "model": {"model": "cp_mobile", "n_classes": len(SCENES)},
            "logmel": dataclasses.asdict(logmel),
            "data": {"orig_sample_rate": RATE},
            "split": dataclasses.asdict(SplitConfig()),
            "storage": {"weight_bits": bits},
        },
        "frames": frames_of(logmel, RATE, RATE),  # of 1 s
        **TAU22_LABELS.plain(),
        "device_ids": device_ids,
        "clips_id": UNKNOWN_CLIPS,
        "clips_per_step": 0,  # it cannot be resumed
        "state_dict": {
            f"{FRONT_END}mean": torch.tensor(0.0),
            f"{FRONT_END}std": torch.tensor(1.0),
            **{f"{prefix_of(m)}{name}": x.float() for m, tensors in models.items() for name, x in tensors.items()},
        },
    }


def _named(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``start``, without it and without BatchNorm's counts."""
    found = {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}
    return {name: x for name, x in found.items() if not name.endswith(_COUNTS)}


def _refuse_other_network(tensors: Mapping[str, Tensor], start: str, what: str) -> None:
    """Raise `UserError`, which says what differs, where one model's tensors are not CP-Mobile's."""
    wanted = _named(CPMobile(len(SCENES)).state_dict(), "")
    wrong = []
    for name in [*wanted, *(name for name in tensors if name not in wanted)]:
        if name not in tensors or name not in wanted:
            wrong.append(f"{start}{name:.80} {'is missing' if name in wanted else 'is none of its tensors'}")
        elif tensors[name].shape != wanted[name].shape:
            shapes = (tuple(x[name].shape) for x in (tensors, wanted))
            wrong.append("{}{} is {}, not {}".format(start, name, *shapes))
        elif not tensors[name].is_floating_point():
            wrong.append(f"{start}{name} is of {tensors[name].dtype}")
    if wrong:
        more = f"; and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise UserError(f"{what} holds another network than the challenge's baseline: {'; '.join(wrong[:3])}{more}")


def _check_front_end(beside: Mapping[str, Tensor], what: str) -> bool:
    """Return whether there is a front end in the file. Raises `UserError` where it is not the baseline's."""
    ours, found = LogMel(LogMelConfig(), RATE), False
    for ending, wanted in ((".window", ours.window), (".fb", ours.filters)):
        for name, x in beside.items():
            if name.endswith(ending):
                found = True
                if x.shape != wanted.shape or not (x.float() - wanted).abs().max() < _FILTERS:
                    raise UserError(
                        f"{what} has another front end than the challenge's baseline: {name:.80} differs (32 kHz, "
                        "--n_fft 4096, --window_length 3072, 256 mel bins), and the file does not say its hop"
                    )
    return found


def _listed(state: Mapping[str, Tensor]) -> str:
    counts = Counter(".".join(name.split(".")[:2]) for name in state).most_common(4)
    return ", ".join(f"{name:.60}.* ({n})" for name, n in counts)
