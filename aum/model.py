"""Audio Mamba: log-mel patches through bidirectional Mamba blocks to class scores.

log-mel (b, 1, n_mels, frames) -> patches (b, tokens, embed_dim) -> blocks -> pooled (b, embed_dim) -> logits
(b, n_classes). Tokens are numbered with time running fastest, the lowest mel band first.

Source: AuM, arXiv:2406.03344 (kaistmm/Audio-Mamba-AuM), after Vim, arXiv:2401.09417.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aum.hub import Pretrained
from aum.init import init_last_linear, init_patch_embed, init_token, scale_out_proj
from aum.mamba import BiMamba, Block, Direction, wide
from aum.scan import padding_mask
from aum.scan.grid import fits
from aum.stem import Normed, RelaxedMeanNorm, Stem, convolve, is_plain

CLASSIFIER_WIDTH = 512  # hidden units of the MLP head
# The largest values of whole numbers: far above any model of use, and refused before memory is taken for them.
MOST = {
    "n_mels": 2048, "target_length": 2**16, "embed_dim": 8192, "depth": 256, "d_state": 1024, "d_conv": 64,
    "expand": 16, "n_classes": 100_000, "stem_blocks": 64,
}  # fmt: skip
MOST_VALUES = 10**9  # of all weights of a model, 4 GB


@dataclass(frozen=True)
class AuMConfig:
    """Shape of an Audio Mamba. Raises ValueError, naming the field, where the values do not make a model.

    Attributes:
        n_mels: Mel bins of the log-mel.
        target_length: Frames of the log-mel.
        freq_norm: Share of each mel bin's mean over the frames subtracted from the log-mel, 0 to 1 (aum_small: 0).
        stem: Channels of 3 x 3 convolutions before the patches, as 8,32. Each halves mel bins and frames.
        stem_blocks: Inverted residual blocks after the stem's convolutions (aum_small: 0).
        patch_size: Mel bins and frames of a patch (aum_small: 16,16); with a stem, of the stem's output.
        strides: Mel bins and frames from one patch to the next. None: those of the patch.
        embed_dim: Width of a token (aum_small: 384).
        depth: Number of blocks (aum_small: 24).
        d_state: States per channel (aum_small: 16).
        d_conv: Taps of the causal convolution (aum_small: 4).
        expand: Channels inside a block, as a multiple of embed_dim (aum_small: 2).
        n_classes: Number of scenes (10).
        direction: AuM's Bi-Bi, Fo-Bi or Fo-Fo blocks (aum_small: bi_bi).
        paired_layers: Pair forward with flipped layers, as the earlier code does (aum_small: False).
        pool: Classify the mean over all tokens or the class token (aum_small: mean).
        cls_position: Position of the class token in the sequence (aum_small: middle).
        pos_embed: Add a learned position embedding (aum_small: False).
        factorised_pos_embed: Make the position embedding the sum of one for mel and one for time, instead of a vector
            per patch (aum_small: False).
        row_scan: Scan each mel row of patches separately, along time (aum_small: False).
        local_conv: Add a 3 x 3 depthwise convolution over the grid of patches before each block (aum_small:
            False).
        head: Classifier of the pooled features (an MLP of 512 units, or one linear layer), or of every patch, whose
            scores are then pooled (aum_small: mlp).
        dropout: Dropout in the MLP head, 0 to 1 (aum_small: 0.1).
        drop_path: Stochastic depth, the probability at the last block, 0 to 1 (aum_small: 0).
        norm_eps: Added to the mean square in norms.
    """

    n_mels: int = 256
    target_length: int = 65
    freq_norm: float = 0.0
    stem: tuple[int, ...] = ()
    stem_blocks: int = 0
    patch_size: tuple[int, int] = (16, 16)
    strides: tuple[int, int] | None = None
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
    factorised_pos_embed: bool = False
    row_scan: bool = False
    local_conv: bool = False
    head: Literal["mlp", "linear", "patch"] = "mlp"
    dropout: float = 0.1
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("patch_size", "strides", "stem"):  # JSON and checkpoints hold lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, most in MOST.items():
            value, least = getattr(self, name), 0 if name == "stem_blocks" else 1
            _check(_is_whole(value, least, most), f"{name} is a whole number from {least} to {most}; got {value!r:.50}")
        for name in ("patch_size", "strides"):
            pair = getattr(self, name) or (1, 1)
            _check(
                isinstance(pair, tuple)
                and len(pair) == 2
                and all(_is_whole(n, 1, MOST["target_length"]) for n in pair),
                f"{name} is two numbers of at least 1, mel bins and frames; got {pair!r:.50}",
            )
        stem = self.stem if isinstance(self.stem, tuple) and len(self.stem) <= 8 else (0,)
        _check(
            all(_is_whole(channels, 1, 512) for channels in stem),
            f"stem is at most 8 channels, each from 1 to 512; got {self.stem!r:.50}",
        )
        _check(not self.stem_blocks or bool(self.stem), f"stem_blocks above 0 needs a stem; got {self.stem_blocks}")
        size, patch = self.after_stem(self.n_mels, self.target_length), self.patch_size
        _check(
            patch[0] <= size[0] and patch[1] <= size[1],
            f"patch_size {patch} does not fit into a log-mel of {size[0]} mel bins x {size[1]} frames"
            + (" (after the stem)" if self.stem else ""),
        )
        for name, allowed in (
            ("direction", ("fo_fo", "fo_bi", "bi_bi")),
            ("pool", ("mean", "cls")),
            ("cls_position", ("middle", "start", "end", "none")),
            ("head", ("mlp", "linear", "patch")),
        ):
            _check(
                getattr(self, name) in allowed,
                f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r:.50}",
            )
        for name in ("dropout", "drop_path"):
            _check(0 <= getattr(self, name) < 1, f"{name} is in [0, 1); got {getattr(self, name)}")
        _check(0 < self.norm_eps < 1, f"norm_eps is above 0 and below 1; got {self.norm_eps}")
        _check(
            not (self.pool == "cls" and self.cls_position == "none"), "pool 'cls' needs a cls_position other than none"
        )
        _check(not (self.head == "patch" and self.pool == "cls"), "head 'patch' needs pool mean")
        _check(0 <= self.freq_norm <= 1, f"freq_norm is from 0 to 1; got {self.freq_norm}")
        plain = self.cls_position == "none" and not self.paired_layers
        for name in ("row_scan", "local_conv"):
            _check(plain or not getattr(self, name), f"{name} needs cls_position none and no paired_layers")
        _check(not (self.paired_layers and self.depth % 2), f"paired_layers needs an even depth; got {self.depth}")
        block = self.expand * self.embed_dim * (3 * self.embed_dim + 6 * self.d_state + 2 * self.d_conv)
        tokens = math.prod(self.patch_size) * max(self.stem, default=1) + bool(self.pos_embed) * math.prod(self.grid)
        n = self.depth * block + self.embed_dim * tokens  # of its large parts
        shape = f"embed_dim {self.embed_dim}, depth {self.depth}, expand {self.expand}, patch_size {patch}"
        _check(n <= MOST_VALUES, f"{shape} make {n:,} weights: at most {MOST_VALUES:,}")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the patches along (mel, time). Bins and frames left over at the upper and right edge are not used."""
        return self.grid_of(self.target_length)

    def grid_of(self, frames: int) -> tuple[int, int]:
        """Return the patches along (mel, time) of a log-mel of ``frames`` frames."""
        (p_mel, p_time), (s_mel, s_time) = self.patch_size, self.strides or self.patch_size
        mels, frames = self.after_stem(self.n_mels, frames)
        return (mels - p_mel) // s_mel + 1, (frames - p_time) // s_time + 1

    @property
    def mixing(self) -> list[str]:
        """Return the fields that keep a model from taking ``lengths``: they mix the frames of a clip and its padding
        outside the blocks, or are for one length."""
        names = [name for name in ("freq_norm", "stem", "pos_embed", "local_conv") if getattr(self, name)]
        return [*names, *(["head patch"] if self.head == "patch" else [])]

    def cls_index_of(self, grid: tuple[int, int]) -> int | None:
        """Return the class token's index among the tokens of a grid of patches; None where there is none."""
        l = grid[0] * grid[1]
        return {"start": 0, "middle": l // 2, "end": l, "none": None}[self.cls_position]

    def after_stem(self, *size: int) -> tuple[int, ...]:
        """Return the stem's output size for mel bins and frames: each convolution halves them, rounded up."""
        return tuple(-(-n // 2 ** len(self.stem)) for n in size)


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class PatchEmbed(nn.Module):
    """(b, channels, mel bins, frames) -> tokens (b, grid_mel * grid_time, embed_dim), time running fastest."""

    def __init__(self, config: AuMConfig):
        super().__init__()
        strides = config.strides or config.patch_size
        channels = config.stem[-1] if config.stem else 1
        self.proj = nn.Conv2d(channels, config.embed_dim, kernel_size=config.patch_size, stride=strides)
        init_patch_embed(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1 == x.stride(1) and fits(x) and is_plain(self.proj):  # the stem's, channel-last
            return convolve(Normed(x.permute(0, 2, 3, 1)), self.proj).x.flatten(1, 2)
        return rearrange(self.proj(x), "b d m t -> b (m t) d")


class PositionEmbedding(nn.Module):
    """A learned vector per token: row 0 is the class token's (if there is one), then the grid, time running fastest.

    ``grid`` says what the rows stand for: patches along (mel, time). Equal row counts can hide different grids.
    """

    def __init__(self, grid: tuple[int, int], n_cls: int, embed_dim: int):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, n_cls + grid[0] * grid[1], embed_dim))
        init_token(self.pos_embed)

    def rows(self) -> Tensor:
        """(1, n_cls + grid_mel * grid_time, embed_dim)"""
        return self.pos_embed


class FactorisedPositionEmbedding(nn.Module):
    """A position embedding of grid_mel + grid_time vectors: a patch's is the sum of its mel row's and its time
    column's."""

    def __init__(self, grid: tuple[int, int], n_cls: int, embed_dim: int):
        super().__init__()
        self.grid = grid
        self.pos_embed_cls = nn.Parameter(torch.empty(1, n_cls, embed_dim))
        self.pos_embed_mel = nn.Parameter(torch.empty(1, grid[0], 1, embed_dim))
        self.pos_embed_time = nn.Parameter(torch.empty(1, 1, grid[1], embed_dim))
        for part in (self.pos_embed_cls, self.pos_embed_mel, self.pos_embed_time):
            init_token(part)

    def rows(self) -> Tensor:
        """(1, n_cls + grid_mel * grid_time, embed_dim)"""
        grid = rearrange(self.pos_embed_mel + self.pos_embed_time, "b m t d -> b (m t) d")
        return torch.cat([self.pos_embed_cls, grid], 1)


class LocalConv(nn.Conv2d):
    """A convolution over neighbours in mel and time: tokens (b, l, d) of a grid -> (b, l, d), to be added to them.

    Source: conditional position encodings, arXiv:2102.10882.
    """

    def __init__(self, d: int):
        super().__init__(d, d, 3, padding=1, groups=d)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if fits(x) and is_plain(self):
            return convolve(Normed(x.unflatten(1, grid)), self).x.flatten(1, 2)
        x = super().forward(rearrange(x, "b (m t) d -> b d m t", m=grid[0]))
        return rearrange(x, "b d m t -> b (m t) d")


class TokenNorm(nn.BatchNorm1d):
    """BatchNorm of tokens, (b, l, d) -> (b, l, d). A ReLU follows, so no matrix can absorb its scale."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class PatchHead(nn.Module):
    """Tokens (b, l, d) -> logits (b, n_classes): the mean of all tokens' scores.

    The layers are BatchNorm, ReLU, linear, and BatchNorm of the scores. BatchNorm, unlike RMSNorm, leaves a token
    without energy small. Source: the last layers of CP-Mobile (`dcase.model.cp_mobile`).
    """

    def __init__(self, d: int, n_classes: int):
        super().__init__()
        self.norm = TokenNorm(d)
        self.linear = nn.Linear(d, n_classes, bias=False)
        self.scores = nn.BatchNorm1d(n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the features that are classified, (b, l, d) -> (b, l, d)."""
        return F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(self.features(x))
        return self.scores(scores.flatten(0, 1)).view_as(scores).mean(1)


class AudioMamba(nn.Module, Pretrained):
    """Audio Mamba (arXiv:2406.03344) over log-mel patches. `hub.Pretrained` saves and loads it."""

    config_class = AuMConfig

    def __init__(self, config: AuMConfig):
        super().__init__()
        self.config = config
        d = config.embed_dim
        if config.freq_norm:
            self.freq_norm = RelaxedMeanNorm(config.freq_norm)
        if config.stem:
            self.stem = Stem(config.stem, config.stem_blocks)
        self.patch_embed = PatchEmbed(config)
        has_cls = config.cls_position != "none"
        if has_cls:
            self.cls_token = nn.Parameter(torch.empty(1, 1, d))
            init_token(self.cls_token)
        if config.pos_embed:
            kind = FactorisedPositionEmbedding if config.factorised_pos_embed else PositionEmbedding
            self.pos_embed = kind(config.grid, int(has_cls), d)
        drop_path = [
            config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)
        ]  # more often in deeper layers
        self.layers = nn.ModuleList(
            Block(BiMamba(d, config.d_state, config.d_conv, config.expand, config.direction), config.norm_eps, p)
            for p in drop_path
        )
        if config.local_conv:
            self.local = nn.ModuleList(LocalConv(d) for _ in self.layers)
        if config.head != "patch":
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
        elif config.head == "linear":
            self.head = nn.Linear(d, config.n_classes)
        else:
            self.head = PatchHead(d, config.n_classes)
        if config.head != "patch":
            init_last_linear(self.classifier[-1] if config.head == "mlp" else self.head)
        for layer in self.layers:
            scale_out_proj(layer.mixer.out_proj, config.depth)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> logits (b, n_classes).

        ``lengths`` (b,): the frames of each clip of a batch that is padded at the end, with finite values; best on
        the CPU. Each clip's logits and gradients are then those of the clip alone: its patches are those within its own
        frames, and the class token stands among them.

        Raises ValueError where the log-mel does not have ``config.n_mels`` bins, is shorter than one patch, or, with a
        position embedding, does not give the grid it was made for; where a clip is shorter than one patch or longer
        than the log-mel; and where ``lengths`` are given to a model that mixes frames before or after its blocks.
        """
        if self.config.head == "patch":
            return self.head(self._blocks(x, lengths)[0])
        return self.forward_head(self.forward_features(x, lengths))

    def forward_features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> (b, embed_dim): the mean over every token, or the class token. ``lengths``
        as in `forward`."""
        x, cls_index, padding = self._blocks(x, lengths)
        x = self._normed(x)
        if self.config.pool == "cls":
            return x[:, cls_index] if padding is None else x[torch.arange(len(x), device=x.device), cls_index]
        if padding is None:
            return x.mean(1)
        x = x.masked_fill(padding.unsqueeze(-1), 0)  # a norm or mixer put in place of ours may have a bias
        return x.sum(1) / (~padding).sum(1, keepdim=True)

    def forward_head(self, features: Tensor) -> Tensor:
        """Features (b, embed_dim) of `forward_features` -> logits (b, n_classes); in evaluation, those of `forward`."""
        if self.config.head == "patch":  # in training, its BatchNorms need the tokens
            return self.head.scores(self.head.linear(features))
        return self.classifier(features) if self.config.head == "mlp" else self.head(features)

    def forward_tokens(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> tokens (b, l, embed_dim) after the final norm, before pooling.

        Patches are in the order of ``config.grid_of(frames)``, time running fastest; the class token stands at
        ``config.cls_index_of(grid)``. With ``lengths``, a clip's row holds the tokens of the clip alone, in the order
        of its own grid, and then zeros; with ``row_scan``, the zeros are at the end of each row of patches.
        """
        return self._normed(self._blocks(x, lengths)[0])

    def forward_layers(self, x: Tensor, lengths: Tensor | None = None, *, norm: bool = False) -> list[Tensor]:
        """Log-mel (b, 1, n_mels, frames) -> the tokens (b, l, embed_dim) after each layer, after each pair with
        ``paired_layers``. ``norm``: with the final norm, so that the last are those of `forward_tokens`."""
        kept: list[Tensor] = []
        self._blocks(x, lengths, kept)
        return [self._normed(x) for x in kept] if norm else kept

    def _normed(self, x: Tensor) -> Tensor:
        return self.head.features(x) if self.config.head == "patch" else self.norm_f(x)

    def _blocks(
        self, x: Tensor, lengths: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> tuple[Tensor, int | Tensor | None, Tensor | None]:
        """Log-mel -> tokens (b, l, embed_dim) after all blocks, the class token's index, or each clip's, and the
        padding (b, l), whose tokens are 0. ``kept`` gets the tokens after each layer."""
        grid = self.config.grid_of(x.shape[-1])
        x, cls_index, padding = self._tokens(x, lengths)
        x = wide(x)  # the residual stream
        if self.config.paired_layers:
            # In the earlier code's pairs, both layers add to the stream that the pair was given, so it doubles.
            for forward, backward in zip(self.layers[::2], self.layers[1::2], strict=True):
                x = 2 * x + forward(x, padding) + _flip(backward(_flip(x, padding), padding), padding)
                if kept is not None:
                    kept.append(x)
        else:
            for i, layer in enumerate(self.layers):
                if self.config.local_conv:
                    x = x + self.local[i](x, grid)
                if self.config.row_scan:
                    of_rows = None if padding is None else rearrange(padding, "b (m t) -> (b m) t", t=grid[1])
                    rows = layer(rearrange(x, "b (m t) d -> (b m) t d", t=grid[1]), of_rows)
                    x = x + rearrange(rows, "(b m) t d -> b (m t) d", m=grid[0])
                else:
                    x = x + layer(x, padding)
                if kept is not None:
                    kept.append(x)
        return x, cls_index, padding

    def _tokens(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, int | Tensor | None, Tensor | None]:
        """Log-mel -> tokens (b, l, embed_dim) with the class token in its place, and the rest of `_blocks`."""
        config = self.config
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] != config.n_mels:
            raise ValueError(f"a log-mel is (b, 1, {config.n_mels}, frames) for this model; got {tuple(x.shape)}")
        (seen,) = config.after_stem(x.shape[3])
        if seen < config.patch_size[1]:
            raise ValueError(f"{seen} frames are fewer than the {config.patch_size[1]} of one patch")
        grid = config.grid_of(x.shape[3])
        if config.pos_embed and grid != self.pos_embed.grid:
            raise ValueError(
                f"{x.shape[3]} frames make a grid of {grid[0]} x {grid[1]} patches, but the position embedding is for "
                f"{self.pos_embed.grid[0]} x {self.pos_embed.grid[1]}: target_length is {config.target_length} frames"
            )
        padding = None if lengths is None else self._padding(lengths, *x.shape[::3], x.device)
        x = self.freq_norm(x) if config.freq_norm else x
        x = self.patch_embed(self.stem(x) if config.stem else x)
        b = x.shape[0]  # not len(x): torch.export would take it for a constant
        if config.cls_position == "none":
            x = x + self.pos_embed.rows() if config.pos_embed else x
            return (x, None, None) if padding is None else self._own_tokens(x, None, padding)
        cls = self.cls_token
        if config.pos_embed:
            rows = self.pos_embed.rows()
            cls, x = cls + rows[:, :1], x + rows[:, 1:]
        cls = cls.expand(b, -1, -1).to(x.dtype)
        if padding is not None:
            return self._own_tokens(x, cls, padding)
        index = config.cls_index_of(grid)
        return torch.cat([x[:, :index], cls, x[:, index:]], dim=1), index, None

    def _padding(self, lengths: Tensor, b: int, frames: int, device: torch.device) -> Tensor | None:
        """Frames of each clip -> which columns of patches are padding, (b, grid_time); None where none is."""
        config = self.config
        if config.mixing:
            raise ValueError(
                f"lengths do not go with {', '.join(config.mixing)}, which would mix a clip with its padding, or are "
                "for one length: give this model batches of one length"
            )
        p, stride = config.patch_size[1], (config.strides or config.patch_size)[1]
        padding_mask(lengths, b, frames, device, least=p)  # refuses what does not fit
        columns = (torch.as_tensor(lengths).long() - p) // stride + 1
        return padding_mask(columns, b, config.grid_of(frames)[1], device)

    def _own_tokens(self, x: Tensor, cls: Tensor | None, padding: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens (b, m t, d) of a padded grid -> what `_tokens` returns: each clip's own first, the class token among
        them, then zeros. With row_scan the tokens stay where they are, each row with its own padding."""
        m, t = x.shape[1] // padding.shape[1], padding.shape[1]
        if self.config.row_scan:
            padding = padding.repeat(1, m)
            return x.masked_fill(padding.unsqueeze(-1), 0), None, padding
        n_cls, own = int(cls is not None), (~padding).sum(1, keepdim=True)  # columns of a clip
        n = m * own
        at = {"start": torch.zeros_like(n), "middle": n // 2}.get(self.config.cls_position, n)
        step = torch.arange(m * t + n_cls, device=x.device)
        of_grid = step - (step > at).long() * n_cls
        index = n_cls + of_grid // own * t + of_grid % own
        padding = step >= n + n_cls
        index = index.masked_fill(padding | (step == at), 0)  # 0 is the class token
        x = torch.cat([cls, x], 1) if n_cls else x
        x = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])).masked_fill(padding.unsqueeze(-1), 0)
        return x, at.squeeze(1), padding


def _flip(x: Tensor, padding: Tensor | None) -> Tensor:
    """Tokens (b, l, d) of each clip in reverse order, with the padding left at the end."""
    if padding is None:
        return x.flip(1)
    step = torch.arange(x.shape[1], device=x.device)
    index = torch.where(padding, step, (~padding).sum(1, keepdim=True) - 1 - step)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


# Named sizes: fields that differ from AuMConfig's defaults. Tiny, small and base are AuM's. aum_nano (16 bit) and
# aum_nano_8bit fit the challenge's limits, 128,000 bytes and 30 million MACs; docs/aum_nano.md tells how.
_NANO = {
    "freq_norm": 0.5,
    "stem": (8, 32),
    "stem_blocks": 1,
    "patch_size": (4, 1),
    "depth": 2,
    "d_state": 4,
    "cls_position": "none",
    "pos_embed": True,
    "factorised_pos_embed": True,
    "row_scan": True,
    "local_conv": True,
    "head": "patch",
}
SIZES = {
    "aum_nano": {**_NANO, "embed_dim": 48},
    "aum_nano_8bit": {**_NANO, "embed_dim": 64},
    "aum_tiny": {"embed_dim": 192},
    "aum_small": {"embed_dim": 384},
    "aum_base": {"embed_dim": 768},
}


def list_models() -> list[str]:
    """Return the names that `create.create_model` takes."""
    return list(SIZES)


def create_config(name: str, **overrides) -> AuMConfig:
    """Return the configuration of a named size, with ``overrides`` of `AuMConfig` fields.

    Raises ValueError for an unknown name, an unknown field or an invalid value.
    """
    _check(name in SIZES, f"no model {name!r}; there is {', '.join(SIZES)}")
    unknown = set(overrides) - {field.name for field in dataclasses.fields(AuMConfig)}
    _check(not unknown, f"AuMConfig has no field {', '.join(sorted(unknown))}")
    return AuMConfig(**{**SIZES[name], **overrides})


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float | None = None, layer_decay: float = 1.0
) -> list[dict]:
    """Return the model's parameters for an optimiser: matrices and kernels with weight decay, the rest without.

    A_log and D (decay would pull A towards -1 and the skip towards 0), biases, norms, the class token and the position
    embedding have no decay. Source: the ``_no_weight_decay`` marks of Mamba and Vim, which plain optimisers ignore.

    With a ``layer_decay`` below 1, the learning rate ``lr`` falls with the distance from the head: its factor is 1 for
    norm_f and head, layer_decay ** (depth - i) for block i, and layer_decay ** (depth + 1) before the blocks. Source:
    BEiT, arXiv:2106.08254. The groups then start at the head. Raises ValueError where the model is no `AudioMamba`.
    """
    _check(layer_decay == 1.0 or lr is not None, "layer_decay needs the learning rate, lr")
    _check(layer_decay == 1.0 or isinstance(model, AudioMamba), "layer_decay needs the layers of an Audio Mamba")
    groups: dict[int, tuple[list, list]] = {}  # distance from the head -> decayed, spared
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        whole = parameter.ndim < 2 or leaf in ("A_log", "A_b_log", "cls_token") or leaf.startswith("pos_embed")
        distance = 0 if layer_decay == 1.0 else _distance(name, model.config.depth)
        groups.setdefault(distance, ([], []))[whole].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay} | ({} if lr is None else {"lr": lr * layer_decay**distance})
        for distance, parts in sorted(groups.items())
        for parameters, decay in zip(parts, (weight_decay, 0.0), strict=True)
    ]


def _distance(name: str, depth: int) -> int:
    """Return the number of blocks from a parameter to the head, its own block included."""
    part, _, rest = name.partition(".")
    if part in ("norm_f", "head", "classifier"):
        return 0
    return depth - int(rest.partition(".")[0]) if part in ("layers", "local") else depth + 1
