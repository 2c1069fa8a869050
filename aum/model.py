"""Audio Mamba: log-mel patches through bidirectional Mamba blocks to class scores.

log-mel (b, 1, n_mels, frames) -> patches (b, tokens, embed_dim) -> blocks -> pooled (b, embed_dim) -> logits
(b, n_classes). Tokens are numbered with time running fastest, the lowest mel band first.

Source: AuM, arXiv:2406.03344 (kaistmm/Audio-Mamba-AuM), after Vim, arXiv:2401.09417.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from aum.init import init_last_linear, init_patch_embed, init_token, scale_out_proj
from aum.mamba import BiMamba, Block, Direction, wide

CLASSIFIER_WIDTH = 512  # hidden units of the MLP head


@dataclass(frozen=True)
class AuMConfig:
    """Shape of an Audio Mamba. Raises ValueError, naming the field, where the values do not make a model."""

    n_mels: int = 256
    target_length: int = 65
    """Frames of the log-mel."""
    patch_size: tuple[int, int] = (16, 16)
    """Mel bins and frames of a patch."""
    strides: tuple[int, int] | None = None
    """Mel bins and frames from one patch to the next; None: patch_size."""
    embed_dim: int = 384
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    n_classes: int = 10
    direction: Direction = "bi_bi"
    paired_layers: bool = False
    pool: Literal["mean", "cls"] = "mean"
    cls_position: Literal["middle", "start", "end", "none"] = "middle"
    pos_embed: bool = False
    head: Literal["mlp", "linear"] = "mlp"
    dropout: float = 0.1
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("patch_size", "strides"):  # a list, from JSON or a checkpoint, is as good as a tuple
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("n_mels", "target_length", "embed_dim", "depth", "d_state", "d_conv", "expand", "n_classes"):
            _check(getattr(self, name) >= 1, f"{name} is at least 1; got {getattr(self, name)}")
        for name in ("patch_size", "strides"):
            pair = getattr(self, name) or (1, 1)
            _check(
                len(pair) == 2 and min(pair) >= 1,
                f"{name} is two numbers of at least 1, mel bins and frames; got {pair}",
            )
        size, patch = (self.n_mels, self.target_length), self.patch_size
        _check(
            patch[0] <= size[0] and patch[1] <= size[1],
            f"patch_size {patch} does not fit into a log-mel of {size[0]} mel bins x {size[1]} frames",
        )
        for name, allowed in (
            ("direction", ("fo_fo", "fo_bi", "bi_bi")),
            ("pool", ("mean", "cls")),
            ("cls_position", ("middle", "start", "end", "none")),
            ("head", ("mlp", "linear")),
        ):
            _check(
                getattr(self, name) in allowed, f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}"
            )
        for name in ("dropout", "drop_path"):
            _check(0 <= getattr(self, name) < 1, f"{name} is in [0, 1); got {getattr(self, name)}")
        _check(self.norm_eps > 0, f"norm_eps is above 0; got {self.norm_eps}")
        _check(
            not (self.pool == "cls" and self.cls_position == "none"), "pool 'cls' needs a cls_position other than none"
        )
        _check(not (self.paired_layers and self.depth % 2), f"paired_layers needs an even depth; got {self.depth}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (mel, time). What is left over at the upper and right edge is not seen."""
        return self.grid_of(self.target_length)

    def grid_of(self, frames: int) -> tuple[int, int]:
        """Patches along (mel, time) of a log-mel of ``frames`` frames."""
        (p_mel, p_time), (s_mel, s_time) = self.patch_size, self.strides or self.patch_size
        return (self.n_mels - p_mel) // s_mel + 1, (frames - p_time) // s_time + 1


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class PatchEmbed(nn.Module):
    """Log-mel (b, 1, n_mels, frames) -> tokens (b, grid_mel * grid_time, embed_dim), time running fastest."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        strides = config.strides or config.patch_size
        self.proj = nn.Conv2d(1, config.embed_dim, kernel_size=config.patch_size, stride=strides)
        init_patch_embed(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PositionEmbedding(nn.Module):
    """A learned vector per token: row 0 is the class token's (if there is one), then the grid, time running fastest.

    ``grid`` says what the rows stand for: patches along (mel, time). Equal row counts can hide different grids.
    """

    def __init__(self, grid: tuple[int, int], n_cls: int, embed_dim: int):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, n_cls + grid[0] * grid[1], embed_dim))
        init_token(self.pos_embed)


class AudioMamba(nn.Module):
    """Audio Mamba (arXiv:2406.03344) over log-mel patches."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        self.config = config
        d = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        has_cls = config.cls_position != "none"
        if has_cls:
            self.cls_token = nn.Parameter(torch.empty(1, 1, d))
            init_token(self.cls_token)
        if config.pos_embed:
            self.pos_embed = PositionEmbedding(config.grid, int(has_cls), d)
        drop_path = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]  # deeper, more often
        self.layers = nn.ModuleList(
            Block(BiMamba(d, config.d_state, config.d_conv, config.expand, config.direction), config.norm_eps, p)
            for p in drop_path
        )
        self.norm_f = nn.RMSNorm(d, eps=config.norm_eps)
        if config.head == "mlp":
            self.classifier = nn.Sequential(
                nn.LayerNorm(d),
                nn.Dropout(config.dropout),
                nn.Linear(d, CLASSIFIER_WIDTH),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(CLASSIFIER_WIDTH, config.n_classes),
            )
        else:
            self.head = nn.Linear(d, config.n_classes)
        init_last_linear(self.classifier[-1] if config.head == "mlp" else self.head)
        for layer in self.layers:
            scale_out_proj(layer.mixer.out_proj, config.depth)

    def forward(self, x: Tensor) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> logits (b, n_classes).

        Raises ValueError where the log-mel does not have ``config.n_mels`` bins, is shorter than one patch, or, with a
        position embedding, does not give the grid it was made for.
        """
        features = self.forward_features(x)
        return self.classifier(features) if self.config.head == "mlp" else self.head(features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> (b, embed_dim): the mean over every token, or the class token."""
        x, cls_index = self._tokens(x)
        x = wide(x)  # the residual stream
        if self.config.paired_layers:
            # The earlier code's pairs: both layers of a pair hand on the stream they were given, so it doubles.
            for forward, backward in zip(self.layers[::2], self.layers[1::2], strict=True):
                x = 2 * x + forward(x) + backward(x.flip(1)).flip(1)
        else:
            for layer in self.layers:
                x = x + layer(x)
        x = self.norm_f(x)
        return x.mean(1) if self.config.pool == "mean" else x[:, cls_index]

    def _tokens(self, x: Tensor) -> tuple[Tensor, int | None]:
        """Log-mel -> tokens (b, l, embed_dim) with the class token in its place, and its index."""
        config = self.config
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] != config.n_mels:
            raise ValueError(f"a log-mel is (b, 1, {config.n_mels}, frames) for this model; got {tuple(x.shape)}")
        if x.shape[3] < config.patch_size[1]:
            raise ValueError(f"{x.shape[3]} frames are fewer than the {config.patch_size[1]} of one patch")
        grid = config.grid_of(x.shape[3])
        if config.pos_embed and grid != self.pos_embed.grid:
            raise ValueError(
                f"{x.shape[3]} frames make a grid of {grid[0]} x {grid[1]} patches, but the position embedding is for "
                f"{self.pos_embed.grid[0]} x {self.pos_embed.grid[1]}: target_length is {config.target_length} frames"
            )
        x = self.patch_embed(x)
        b, l, _ = x.shape
        if config.cls_position == "none":
            return (x + self.pos_embed.pos_embed if config.pos_embed else x), None
        cls = self.cls_token
        if config.pos_embed:
            cls, x = cls + self.pos_embed.pos_embed[:, :1], x + self.pos_embed.pos_embed[:, 1:]
        index = {"start": 0, "middle": l // 2, "end": l}[config.cls_position]
        cls = cls.expand(b, -1, -1).to(x.dtype)
        return torch.cat([x[:, :index], cls, x[:, index:]], dim=1), index


# Named sizes: what differs from AuMConfig's defaults. Tiny, small and base are AuM's; aum_nano, for demos and laptops,
# fits the challenge's memory limit in 16 bit.
SIZES = {
    "aum_nano": {"embed_dim": 48, "depth": 2, "d_state": 8, "pos_embed": True, "head": "linear"},
    "aum_tiny": {"embed_dim": 192},
    "aum_small": {"embed_dim": 384},
    "aum_base": {"embed_dim": 768},
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(SIZES)


def create_config(name: str, **overrides) -> AuMConfig:
    """The configuration of a named size, with any field of `AuMConfig` overridden.

    Raises ValueError for an unknown name, an unknown field or a value that makes no model.
    """
    _check(name in SIZES, f"no model {name!r}; there is {', '.join(SIZES)}")
    unknown = set(overrides) - {field.name for field in dataclasses.fields(AuMConfig)}
    _check(not unknown, f"AuMConfig has no field {', '.join(sorted(unknown))}")
    return AuMConfig(**{**SIZES[name], **overrides})


def create_model(name: str, **overrides) -> AudioMamba:
    """An `AudioMamba` of a named size; ``overrides`` are `AuMConfig` fields. Raises ValueError as `create_config`."""
    return AudioMamba(create_config(name, **overrides))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The model's parameters for an optimiser: matrices and kernels with weight decay, the rest without.

    Spared are A_log and D (decay would pull A towards -1 and the skip towards 0), biases, norms, the class token and
    the position embedding. Source: the ``_no_weight_decay`` marks of Mamba and Vim, which plain optimisers ignore.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        whole = parameter.ndim < 2 or leaf in ("A_log", "A_b_log", "cls_token", "pos_embed")
        (spared if whole else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
