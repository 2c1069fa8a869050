"""Load a checkpoint's weights into a model with another input size and other classes.

Patch kernels of another size are resized so that a resized patch gives the same output (PI-resize,
FlexiViT, arXiv:2212.08013); position embeddings are interpolated over the grid of patches, with antialiasing.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aum.model import AudioMamba, AuMConfig
from aum.pretrained.layouts import PretrainedError
from aum.pretrained.source import HEADS, PATCH, POS_EMBED, RUN, SAVED, Source, read_source

MUST_FIT = (
    "direction", "paired_layers", "embed_dim", "depth", "d_state", "d_conv", "expand", "stem", "stem_blocks",
    "local_conv",
)  # fmt: skip
SHOWN = 40  # kinds of names, at most
COMPUTES = ("pool", "cls_position", "row_scan", "freq_norm", "norm_eps")  # no tensor shows these


@dataclass
class Report:
    """A readable report of every tensor of a checkpoint and of the model."""

    title: str
    loaded: list[str] = field(default_factory=list)
    """The model's tensors that were loaded unchanged."""
    adapted: dict[str, str] = field(default_factory=dict)
    """The model's tensors that were adapted -> how."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The file's tensors that were not used -> why."""
    initial: dict[str, str] = field(default_factory=dict)
    """The model's tensors that keep their initial value -> why."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.title]
        for what, names in (
            ("loaded", dict.fromkeys(self.loaded, "")),
            ("adapted", self.adapted),
            ("left out", self.left_out),
            ("left at its initial value", self.initial),
        ):
            lines.append(f"  {what}: {len(names)} {'tensor' if len(names) == 1 else 'tensors'}")
            for why in dict.fromkeys(names.values()):
                text = ", ".join(_collapsed(name for name, reason in names.items() if reason == why))
                text += f": {why}" if why else ""
                lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="      ")
        lines += [
            line
            for note in self.notes
            for line in textwrap.wrap(note, 112, initial_indent="  ", subsequent_indent="    ")
        ]
        return "\n".join(lines)


def _collapsed(names: Iterable[str]) -> list[str]:
    """Join names that differ only in a number: layers.0-23.norm.weight. Many names become device_models.*."""
    numbers: dict[tuple[str, str], list[int]] = {}
    beginnings: Counter[str] = Counter()
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        before, after = (name[: found.start()], name[found.end() :]) if found else (name, "")
        numbers.setdefault((before, after), []).extend([int(found[0])] if found else [])
        beginnings[name.partition(".")[0]] += 1
    if len(numbers) > SHOWN:
        return [f"{beginning}.* ({n})" if n > 1 else beginning for beginning, n in beginnings.items()]
    return [before + _ranges(sorted(found)) + after for (before, after), found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


@torch.no_grad()
def load_pretrained(
    model: AudioMamba, path: Path | str | Source, *, source_grid: tuple[int, int] | None = None
) -> Report:
    """Load a checkpoint's weights into ``model``. The report accounts for every tensor of both.

    Args:
        path: a file of Vim, AuM, the earlier code or a run (`source`), .safetensors or what torch.load reads; or a
            folder of `save_pretrained`.
        source_grid: patches along (mel, time) that its position embedding stands for, where the file does not say.

    Raises:
        UnknownGrid: ``source_grid`` is needed, or does not fit; the message names the candidates.
        PretrainedError: a ValueError, one line. The file cannot be read, would run code or is not whole, or the model
            has another shape; the message names the field of `AuMConfig` to change. The model is then unchanged.
    """
    if not isinstance(model, AudioMamba):
        raise PretrainedError(f"{type(model).__name__} is no Audio Mamba, and takes no weights of one")
    source = path if isinstance(path, Source) else read_source(path)
    _refuse_other_shape(source, model.config)
    report = Report(_title(source), notes=_notes(source, model.config))
    report.left_out |= source.beside
    own = model.state_dict()
    new = dict(source.state)
    done = dict(source.changed)
    if new[PATCH].shape[2:] != own[PATCH].shape[2:]:
        size = tuple(own[PATCH].shape[2:])
        _add(done, PATCH, f"{_by(new[PATCH].shape[2:])} resized to {_by(size)} by pseudo-inverse")
        new[PATCH] = resized_kernel(new[PATCH], size)
    _fit_position_embedding(new, done, report, source, model, source_grid)
    _fit_head(new, report, source, model)
    for name in [name for name in new if name not in own]:  # the class token, where the model has none
        report.left_out[source.names[name]] = "this model has none"
        del new[name]
    for name in own:
        if name not in new:
            report.initial.setdefault(name, "the file has none")
        elif name in done:
            report.adapted[name] = done[name]
        else:
            report.loaded.append(name)
    model.load_state_dict(new, strict=False)
    return report


def _add(done: dict[str, str], name: str, what: str) -> None:
    done[name] = f"{done[name]}; {what}" if name in done else what


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _shown(value) -> str:
    return (",".join(map(str, value)) or '""') if isinstance(value, tuple) else str(value)


def _refuse_other_shape(source: Source, config: AuMConfig) -> None:
    """Raise `PretrainedError`, naming what to change, where the model's blocks are not the file's."""
    for name in MUST_FIT:
        theirs, ours = getattr(source.config, name), getattr(config, name)
        if theirs != ours:
            raise PretrainedError(
                f"{source.path} ({source.kind}) has {name} {_shown(theirs)}, and this model {_shown(ours)}: give "
                f"--{name} {_shown(theirs)}"
            )
    if config.cls_position != "none" and not source.n_cls:
        raise PretrainedError(f"{source.path} ({source.kind}) has no class token: give --cls_position none")


def _title(source: Source) -> str:
    config = source.config
    paired = ", paired" if config.paired_layers else ""
    return (
        f"pretrained weights of {source.path}, {len(source.names) + len(source.beside)} tensors in the layout of "
        f"{source.kind}: {config.direction}{paired}, {config.depth} layers of {config.embed_dim}"
    )


def _notes(source: Source, config: AuMConfig) -> list[str]:
    """Return the differences that no tensor shows."""
    notes = []
    for name in COMPUTES:
        theirs, ours = getattr(source.config, name), getattr(config, name)
        if theirs != ours:
            there = "there" if source.kind in (RUN, SAVED) else "in the published model"
            notes.append(f"computes differently: {name} is {theirs} {there}, {ours} here (--{name})")
    if any(file.rpartition("rope.")[1] for file in source.beside):
        notes.append("computes differently: rotary position embedding there, none here")
    if source.kind == RUN:
        notes.append(
            "the clips it was trained on are not compared with those held out here (--init_from RUN_ID does that)"
        )
    return notes


def _fit_head(new: dict[str, Tensor], report: Report, source: Source, model: AudioMamba) -> None:
    """Leave out the whole head where its kind or number of classes differs."""
    theirs, ours = source.config, model.config
    if (theirs.head, theirs.n_classes) == (ours.head, ours.n_classes) or not source.head():
        return
    heads = [f"{config.head}, {config.n_classes} classes" for config in (theirs, ours)]
    for name in source.head():
        report.left_out[source.names[name]] = f"another head ({heads[0]}; here {heads[1]})"
        del new[name]
    for name in model.state_dict():
        if name.startswith(HEADS):
            report.initial[name] = "the file has another head"


def _fit_position_embedding(
    new: dict[str, Tensor],
    done: dict[str, str],
    report: Report,
    source: Source,
    model: AudioMamba,
    source_grid: tuple[int, int] | None,
) -> None:
    """Resize the position embedding to the model's grid, or leave it out where the model has none of its kind."""
    theirs = {name for name in new if name.startswith("pos_embed.")}
    ours = {name for name in model.state_dict() if name.startswith("pos_embed.")}
    if source_grid is not None:
        if POS_EMBED not in theirs:
            raise PretrainedError(f"{source.path} has no position embedding, so leave --source_grid out")
        source.find_grid(source_grid)
    if theirs != ours:
        for name in theirs:
            kind = "of this kind (--factorised_pos_embed)" if ours else "(--pos_embed True)"
            report.left_out[source.names[name]] = f"this model has no position embedding {kind}"
            del new[name]
        return
    n_cls = int(model.config.cls_position != "none")
    if POS_EMBED in ours:
        grid = source.find_grid(source_grid)
        cls, rows = new[POS_EMBED].split([source.n_cls, grid[0] * grid[1]], 1)
        if cls.shape[1] > n_cls:
            _add(done, POS_EMBED, "the class token's row left out")
        rows = rows.unflatten(1, grid)
        if grid != model.pos_embed.grid:
            _add(done, POS_EMBED, f"grid {_by(grid)} resized to {_by(model.pos_embed.grid)} (mel x time)")
            rows = resized_grid(rows, model.pos_embed.grid)
        new[POS_EMBED] = torch.cat([cls[:, :n_cls], rows.flatten(1, 2)], 1)
        return
    for name in ours:  # factorised: a vector per mel row, and one per time column
        own = model.state_dict()[name]
        if own.dim() == 4 and own.shape != new[name].shape:
            _add(done, name, f"{_by(new[name].shape[1:3])} resized to {_by(own.shape[1:3])} (mel x time)")
            new[name] = resized_grid(new[name], tuple(own.shape[1:3]))
        elif own.dim() == 3 and new[name].shape[1] > n_cls:
            _add(done, name, "the class token's row left out")
            new[name] = new[name][:, :n_cls]


# ---- resizing --------------------------------------------------------------------------------------------------------


def resized_grid(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Position embedding (1, mel, time, d) -> (1, *size, d), in float32."""
    maps = rows.float().permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size, mode="bilinear", antialias=True, align_corners=False)
    return maps.permute(0, 2, 3, 1)


def resized_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch kernel (d, channels, mel bins, frames) -> (d, channels, *size), in float32, by pseudo-inverse.

    With B the matrix that resizes a patch x, the new kernel is the w' for which B x . w' is nearest to x . w: the same
    where the patch becomes larger. Source: PI-resize, arXiv:2212.08013, section 3.4.
    """
    old = tuple(kernel.shape[2:])
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    B = F.interpolate(pixels, size, mode="bilinear", antialias=False, align_corners=False).flatten(1).T
    return (kernel.double().flatten(2) @ torch.linalg.pinv(B, rtol=1e-6)).float().unflatten(2, size)
