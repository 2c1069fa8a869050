"""Read a checkpoint file of a published or earlier Audio Mamba, and find out its layout and shape.

| layout | recognised by |
|---|---|
| Vim, ImageNet (arXiv:2401.09417) | ``{"model": ...}``, a bare ``pos_embed``, patches of three channels |
| AuM (arXiv:2406.03344) | a plain state dict of our names, often after ``module.`` |
| the earlier code, audio-mamba-asc | ``aum_model.*``, ``classifier.*``; of Lightning ``model.aum_model.*``, ``mel.*`` |
| a run of train_base.py | ``model.*`` beside ``logmel.*``, with the configuration as plain values |
| a folder of `hub.Pretrained.save_pretrained` | config.json and model.safetensors in it |

The shape (direction, width, depth, ...) comes from the tensors, or from a run's configuration, and every tensor is then
compared with what a model of that shape has: what is missing, unexpected or of a wrong shape is refused.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aum.hub import CONFIG, WEIGHTS
from aum.model import AudioMamba, AuMConfig
from aum.pretrained.layouts import PretrainedError, our_names, read_file, state_dict

VIM, AUM, EARLIER, RUN, SAVED = "Vim", "AuM", "the earlier code", "a run", "save_pretrained"
ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # of files
PATCH, POS_EMBED = "patch_embed.proj.weight", "pos_embed.pos_embed"
HEADS = ("head.", "classifier.")  # beginnings of the head's names


class UnknownGrid(PretrainedError):
    """The file does not say which patches its position embedding stands for: give ``source_grid``."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's weights under our names; the class token's row of the position embedding is the first."""

    path: Path
    kind: str
    state: dict[str, Tensor]
    names: dict[str, str]
    """Our name -> the name in the file."""
    beside: dict[str, str]
    """Name in the file -> why it is left out."""
    changed: dict[str, str]
    """Our name -> what was done to it in reading."""
    config: AuMConfig
    """Its shape. Where ``grid`` is None, n_mels and target_length are only as good as the tensors' sizes."""
    grid: tuple[int, int] | None
    """Patches along (mel, time) that the position embedding's rows stand for, where the file says so."""
    is_described: bool = False
    """``config`` is stated, not derived from the tensors."""
    front_end: dict | None = None
    """As `hub.Pretrained` stores it."""

    @property
    def n_cls(self) -> int:
        """Rows of the position embedding that are the class token's."""
        return int(self.config.cls_position != "none")

    def head(self) -> list[str]:
        return [name for name in self.state if name.startswith(HEADS)]

    def told(self, source_grid: tuple[int, int] | None = None) -> dict:
        """Return the fields of its config that the file tells. Raises `UnknownGrid` as `find_grid`."""
        told = dict(vars(self.config))
        if not self.head():
            del told["head"], told["n_classes"]
        if not self.is_described:
            del told["n_mels"], told["target_length"]
            if POS_EMBED in self.state:
                grid, patch = self.find_grid(source_grid), self.config.patch_size
                told |= {"n_mels": grid[0] * patch[0], "target_length": grid[1] * patch[1]}
        return told

    def find_grid(self, given: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the ``given`` grid, or the only grid that fits the file.

        Raises `UnknownGrid`, with the candidates, where several fit or the given one does not.
        """
        rows = self.state[POS_EMBED].shape[1] - self.n_cls
        has = f"the position embedding of {self.path} has {rows} rows for patches"
        if given is not None:
            if given[0] * given[1] != rows:
                raise UnknownGrid(f"{has}, and a grid of {_by(given)} has {given[0] * given[1]}")
            if self.grid not in (None, given):
                raise UnknownGrid(f"{self.path} says that its grid is {_by(self.grid)}, not {_by(given)}")
            return given
        if self.grid is not None:
            return self.grid
        if self.kind == VIM:
            side = math.isqrt(rows)
            if side * side != rows:
                raise UnknownGrid(f"{has}, which is no square grid")
            return side, side
        # Audio models: 64, 128 or 256 mel bins, in patches that do not overlap.
        mels = [n_mels // self.config.patch_size[0] for n_mels in (64, 128, 256)]
        grids = [(m, rows // m) for m in mels if m and rows % m == 0]
        if len(grids) != 1:
            could = " or ".join(map(_by, grids)) or "any number of mel bins"
            raise UnknownGrid(f"{has}, and does not say along which axes: (mel x time) could be {could}")
        return grids[0]


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def read_source(path: Path | str) -> Source:
    """Read a checkpoint of any layout above. No code in the file is run.

    Raises `PretrainedError` for a file that cannot be read, is of no such layout, or is not whole.
    """
    path = Path(path)
    if path.name == WEIGHTS and path.with_name(CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise PretrainedError(f"{path} is a folder without {WEIGHTS}: give a file, or a folder of save_pretrained")
        return read_saved(path)
    checkpoint = read_file(path)
    tensors = state_dict(checkpoint, path)
    names, beside = our_names(tensors, path)
    state = {name: tensors[file] for name, file in names.items()}
    if not any(re.match(r"layers\.\d+\.mixer\.", name) for name in state) or _channels(state) is None:
        raise PretrainedError(f"{path} is no Audio Mamba: it has no layers.N.mixer.* with a {PATCH}")
    changed, described = {}, None
    if any("aum_model." in file for file in names.values()):
        kind = EARLIER
    elif any(name.startswith("logmel.") for name in tensors):
        kind, described = RUN, _described(checkpoint)
        if isinstance(checkpoint.get("average"), Mapping):
            average = state_dict(checkpoint["average"].get("average"), path)
            state |= average
            changed |= dict.fromkeys(average, "the average of the weights over training's last steps (--ema_decay)")
    elif "pos_embed" in state or _channels(state) == 3:
        kind, changed = VIM, _from_vim(state, names)
    else:
        kind = AUM
    _refuse_other_values(state, path)
    config = described or _derived(state, kind, path)
    grid = described.grid if described is not None and described.pos_embed else None
    source = Source(path, kind, state, names, beside, changed, config, grid, described is not None)
    _refuse_other_tensors(source)
    return source


def read_saved(place: Path | str) -> Source:
    """Read a folder of `save_pretrained`, or such a repository of the Hugging Face Hub; as `read_source`."""
    try:
        model = AudioMamba.from_pretrained(place)
    except ValueError as error:
        raise PretrainedError(str(error)) from error
    state, config = model.state_dict(), model.config
    names, grid = {name: name for name in state}, config.grid if config.pos_embed else None
    return Source(Path(place), SAVED, state, names, {}, {}, config, grid, True, model.front_end)


def _refuse_other_values(state: Mapping[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if value.is_floating_point():
            if not value.isfinite().all():
                raise PretrainedError(f"{path} is damaged: {name} has values that are not finite")
        elif value.dtype == torch.int8:
            raise PretrainedError(
                f"{path} is a model stored in 8 bit: give the checkpoint of its run, <run>/checkpoints/best.ckpt"
            )
        elif not name.endswith("num_batches_tracked"):
            raise PretrainedError(f"{path}: {name} is of {value.dtype}, no weight")


def _channels(state: Mapping[str, Tensor]) -> int | None:
    """Input channels of the patch kernel."""
    return state[PATCH].shape[1] if PATCH in state and state[PATCH].dim() == 4 else None


def _from_vim(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, str]:
    """Convert Vim's patch kernel and position embedding to AuM's form, in place. Return what was done, by our names."""
    changed = {}
    if _channels(state) == 3:
        state[PATCH] = state[PATCH].mean(1, keepdim=True)
        changed[PATCH] = "mean of its 3 channels"
    if "pos_embed" in state:
        rows, names[POS_EMBED] = state.pop("pos_embed"), names.pop("pos_embed")
        if "cls_token" in state and rows.dim() == 3:  # Vim adds it with the class token in the middle of the patches
            middle = (rows.shape[1] - 1) // 2
            rows = torch.cat([rows[:, middle : middle + 1], rows[:, :middle], rows[:, middle + 1 :]], 1)
            changed[POS_EMBED] = f"the class token's row, {middle} of {rows.shape[1]}, moved to the front"
        state[POS_EMBED] = rows
    return changed


# ---- the shape -------------------------------------------------------------------------------------------------------


def _described(checkpoint: Mapping) -> AuMConfig | None:
    """Return the shape that a run's checkpoint states, or None."""
    try:
        plain, n_mels, frames = (
            checkpoint["config"]["model"],
            checkpoint["config"]["logmel"]["n_mels"],
            checkpoint["frames"],
        )
        fields = {field.name for field in dataclasses.fields(AuMConfig)} - {"n_mels", "target_length"}
        shape = {name: value for name, value in plain.items() if name in fields and value is not None}
        return AuMConfig(n_mels=n_mels, target_length=frames, **shape)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _derived(state: Mapping[str, Tensor], kind: str, path: Path) -> AuMConfig:
    """Return the shape that the tensors show. The majority of the layers decides, so that one bad tensor is named."""
    layers = [re.match(r"layers\.(\d+)\.mixer\.(.+)", name) for name in state]
    layers = [(int(found[1]), found[2]) for found in layers if found]
    special = {name.split(".")[0] for name in state} & {"stem", "freq_norm", "local"}
    if special or "head.linear.weight" in state:
        raise PretrainedError(
            f"{path} has parts that only a run's own checkpoint describes ({', '.join(sorted(special)) or 'head'}): "
            "give <run>/checkpoints/best.ckpt"
        )

    def usual(name: str, axis: int) -> int:
        tensors = [state[f"layers.{i}.mixer.{leaf}"] for i, leaf in layers if leaf == name]
        sizes = [tensor.shape[axis] for tensor in tensors if tensor.dim() > axis]
        if not sizes:
            raise PretrainedError(f"{path} is not whole: no layer has a mixer.{name} of {axis + 1} or more axes")
        return statistics.mode(sizes)

    def rows(name: str, axis: int, default: int) -> int:
        return state[name].shape[axis] if name in state and state[name].dim() > axis else default

    leaves = {leaf for _, leaf in layers}
    patch_size = tuple(state[PATCH].shape[2:])
    n_cls = int("cls_token" in state)
    patches = max(1, rows(POS_EMBED, 1, 1 + n_cls) - n_cls)
    mlp = any(name.startswith("classifier.") for name in state)
    embed_dim, d_inner = usual("out_proj.weight", 0), usual("out_proj.weight", 1)
    try:
        return AuMConfig(
            n_mels=patch_size[0],
            target_length=patches * patch_size[1],  # some grid of that many patches
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=1 + max(i for i, _ in layers),
            d_state=usual("A_log", 1),
            d_conv=usual("conv1d.weight", 2),
            expand=d_inner // embed_dim,
            n_classes=rows("classifier.5.weight", 0, 1) if mlp else rows("head.weight", 0, 1),
            direction="bi_bi" if "D_b" in leaves else "fo_bi" if "A_b_log" in leaves else "fo_fo",
            paired_layers=kind == EARLIER,
            pool="cls" if n_cls else "mean",  # as published
            cls_position="middle" if n_cls else "none",
            pos_embed=POS_EMBED in state,
            head="mlp" if mlp else "linear",
        )
    except ValueError as error:
        raise PretrainedError(f"{path} is no Audio Mamba: {error}") from error


def _refuse_other_tensors(source: Source) -> None:
    """Raise `PretrainedError`, naming the tensors, where the file's are not those of a model of its shape."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in AudioMamba(source.config).state_dict().items()}
    if not source.head():  # none was saved
        expected = {name: shape for name, shape in expected.items() if not name.startswith(HEADS)}
    state = source.state
    both = expected.keys() & state.keys()
    wrong = [
        f"{name} {tuple(state[name].shape)}, not {tuple(expected[name])}"
        for name in expected
        if name in both and state[name].shape != expected[name]
    ]
    problems = {
        "missing": [name for name in expected if name not in both],
        "unexpected": [source.names.get(name, name) for name in state if name not in both],
        "of a wrong shape": wrong,
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {_first(found)}" for what, found in problems.items() if found)
        config = source.config
        raise PretrainedError(
            f"{source.path} is not a whole checkpoint ({source.kind}, {config.direction}, {config.depth} layers of "
            f"{config.embed_dim}): {said}"
        )


def _first(found: Iterable[str], shown: int = 3) -> str:
    found = list(found)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more
