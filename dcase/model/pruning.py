"""Make a trained Audio Mamba smaller: `shrink` removes the least important channels, states and layers.

Whole channels are removed, so that the result is an ordinary smaller model, ready for fine-tuning. Source: structured
magnitude pruning, arXiv:1608.08710, which removes the filters with the smallest weights. The importance of a channel
in an Audio Mamba is ours: the energy (sum of squared weights) that writes it times the energy that reads it. Scaling
the one up and the other down, which changes no output, does not change the choice. Several writers or readers in
parallel count equally, independent of the size of their weights.

| size | removed | written by | read by |
|---|---|---|---|
| ``embed_dim`` | channels of the residual stream, everywhere the same | tokens, out_proj | norm and in_proj, head |
| ``expand`` | inner channels of each mixer (expand * embed_dim) | x of in_proj, conv1d | z and out_proj, x_proj |
| ``d_state`` | states of each x_proj | its rows B | its rows C |
| ``stem`` | channels of each convolution (not the last one's before blocks) | its BatchNorm | next convolution |
| ``depth`` | layers; evenly spread ones stay, among them the first and the last | | |

With ``embed_dim`` the rank of delta falls, a 16th of it: dt_proj and x_proj's first rows become the nearest product of
the lower rank. Depth does not go by magnitude, because the residual stream grows with depth, and weights of different
layers do not compare; evenly spread is what LayerDrop, arXiv:1909.11556, calls "every other".

Norms over the residual stream divide by a mean over channels, which changes as channels go. Their weights make up for
it by the factor by which it is expected to change, judging by the energy that writes the channels left out. This is
exact (but for norm_eps) where nothing writes them, approximate otherwise; so is the MLP head's LayerNorm, whose mean
over channels is not made up for. Fine-tuning has to do the rest.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from aum import AuMConfig
from dcase.errors import UserError

SIZES = ("embed_dim", "depth", "d_state", "expand")  # may be smaller, as the stem's channels
HEADS = {  # name of the first matrix after the stream's end, and of the norm before it
    "mlp": ("classifier.2.weight", "norm_f.weight"),
    "linear": ("head.weight", "norm_f.weight"),
    "patch": ("head.linear.weight", "head.norm.weight"),
}
FREE = ("dropout", "drop_path")  # used only in training: any value fits any weights

State = dict[str, Tensor]


@torch.no_grad()
def shrink(state: Mapping[str, Tensor], large: AuMConfig, small: AuMConfig) -> State:
    """Return a copy of the state dict of ``AudioMamba(large)``, pruned to one of ``AudioMamba(small)``.

    Raises `UserError`, naming the field, where ``small`` is larger in any size or differs in anything else.
    """
    _refuse(large, small)
    state = _of_layers(state, _spread(large, small.depth))
    for i, channels in enumerate(small.stem):
        _prune_stem(state, i, channels, last=i + 1 == len(small.stem))
    _prune_stream(state, small)
    for i in range(small.depth):
        _prune_mixer(state, f"layers.{i}.", large, small)
    return {name: value.detach().clone() for name, value in state.items()}


def _refuse(large: AuMConfig, small: AuMConfig) -> None:
    for field in dataclasses.fields(AuMConfig):
        name = field.name
        before, after = getattr(large, name), getattr(small, name)
        if name == "strides":
            before, after = before or large.patch_size, after or small.patch_size
        if name in SIZES:
            too_large, same = after > before, True
        elif name == "stem":
            same = len(after) == len(before) and not (large.stem_blocks and after[-1:] != before[-1:])
            too_large = same and any(a > b for a, b in zip(after, before, strict=True))
        else:
            too_large, same = False, after == before or name in FREE
        if too_large:
            raise UserError(
                f"--{name} {_shown(after)} is more than the {_shown(before)} of the model of --init_from, which can "
                "only be made smaller: give at most that"
            )
        if not same:
            raise UserError(
                f"--{name} {_shown(after)} does not fit the model of --init_from, which has {_shown(before)}: give that"
            )


def _shown(value) -> str:
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


# ---- importance ------------------------------------------------------------------------------------------------------


def _energy(weight: Tensor, axis: int = 0) -> Tensor:
    """Return the squares of a weight, summed over all axes but one, in float64."""
    return weight.double().movedim(axis, 0).reshape(weight.shape[axis], -1).square().sum(1)


def _sum_of_shares(energies: Iterable[Tensor]) -> Tensor:
    """Return the sum of several weights' energies by channel, each divided by its total: all weights count equally."""
    return sum(energy / energy.sum().clamp(min=1e-300) for energy in energies)


def _most_important(importance: Tensor, n: int) -> Tensor:
    """Return the indices of the ``n`` largest values, in their order in the model; the first of equal ones wins."""
    return importance.argsort(descending=True, stable=True)[:n].sort().values


def _keep(state: State, axes: Mapping[str, int], kept: Tensor) -> None:
    """Keep only the indices ``kept`` of the named tensors, along the given axes."""
    for name, axis in axes.items():
        state[name] = state[name].index_select(axis, kept)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _spread(large: AuMConfig, depth: int) -> list[int]:
    """Return the numbers of ``depth`` evenly spread layers, in pairs where layers are paired."""
    step = 2 if large.paired_layers else 1
    heads = torch.linspace(0, large.depth // step - 1, depth // step, dtype=torch.float64).round().long().tolist()
    return [step * head + i for head in heads for i in range(step)]


def _of_layers(state: Mapping[str, Tensor], kept: list[int]) -> State:
    """Return the state dict with only these layers, renumbered."""
    number = {str(old): str(new) for new, old in enumerate(kept)}
    result = {}
    for name, value in state.items():
        parts = name.split(".", 2)
        if parts[0] not in ("layers", "local"):
            result[name] = value
        elif parts[1] in number:
            result[f"{parts[0]}.{number[parts[1]]}.{parts[2]}"] = value
    return result


# ---- the stem --------------------------------------------------------------------------------------------------------


def _prune_stem(state: State, i: int, channels: int, last: bool) -> None:
    """Keep ``channels`` of the stem's convolution ``i``. BatchNorm's weight and bias determine its output's size."""
    reader = "patch_embed.proj.weight" if last else f"stem.{i + 1}.0.weight"
    norm = f"stem.{i}.1"
    written = _energy(state[f"{norm}.weight"]) + _energy(state[f"{norm}.bias"])
    kept = _most_important(written * _energy(state[reader], 1), channels)
    parts = ("weight", "bias", "running_mean", "running_var")
    _keep(state, {f"stem.{i}.0.weight": 0, reader: 1} | {f"{norm}.{part}": 0 for part in parts}, kept)


# ---- the residual stream ---------------------------------------------------------------------------------------------


def _prune_stream(state: State, small: AuMConfig) -> None:
    """Keep ``small.embed_dim`` channels of the residual stream, and compensate in the norms."""
    before, after = len(state["patch_embed.proj.bias"]), small.embed_dim
    if after == before:
        return
    layers = [f"layers.{i}." for i in range(small.depth)]
    head, head_norm = HEADS[small.head]
    after_norm = {f"{layer}mixer.in_proj.weight": f"{layer}norm.weight" for layer in layers} | {head: head_norm}
    out_projs = [f"{layer}mixer.out_proj.weight" for layer in layers]
    tokens = [name for name in state if name == "cls_token" or name.startswith("pos_embed.")]
    local = [f"local.{i}.{part}" for i in range(small.depth) for part in ("weight", "bias") if small.local_conv]
    norms = list(after_norm.values()) + ["classifier.0.weight"] * (small.head == "mlp")

    written = _sum_of_shares([_token_energy(state, tokens), *(_energy(state[name]) for name in out_projs)])
    read = _sum_of_shares(_energy(state[name] * state[norm], 1) for name, norm in after_norm.items())
    kept = _most_important(written * read, after)

    axis_0 = ("patch_embed.proj.weight", "patch_embed.proj.bias", *out_projs, *local, *norms)
    _keep(state, dict.fromkeys(axis_0, 0) | dict.fromkeys(after_norm, 1), kept)
    _keep(state, {name: state[name].dim() - 1 for name in tokens}, kept)
    if small.head == "mlp":
        _keep(state, {"classifier.0.bias": 0}, kept)
    if small.head == "patch":  # its BatchNorm works per channel and needs no compensation
        _keep(state, {f"head.norm.{part}": 0 for part in ("bias", "running_mean", "running_var")}, kept)
        norms.remove(head_norm)
    # The mean square was (energy of all channels) / before; now it is (energy of those kept) / after.
    factor = math.sqrt(written[kept].sum() / written.sum() * before / after)
    for name in norms:
        state[name] = state[name] * factor


def _token_energy(state: State, tokens: list[str]) -> Tensor:
    """The tokens' expected square by channel, for a log-mel of mean square 1: patches, and the means of the rest.

    A local convolution only passes its channel on; its bias adds to it.
    """
    biases = [name for name in state if name.startswith("local.") and name.endswith(".bias")]
    energy = sum(_energy(state[name]) for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", *biases))
    for name in tokens:
        rows = state[name].flatten(0, -2)  # none, in a position embedding without a class token
        energy = energy + _energy(rows, 1) / max(1, len(rows))
    return energy


# ---- the mixers ------------------------------------------------------------------------------------------------------


def _prune_mixer(state: State, layer: str, large: AuMConfig, small: AuMConfig) -> None:
    branches, mixer = ("", "_b") if small.direction == "bi_bi" else ("",), f"{layer}mixer."
    _prune_inner(state, f"{layer}norm.weight", mixer, branches, small)
    for branch in branches:
        decays = ["A_b_log"] if branch else ["A_log", "A_b_log"] if small.direction == "fo_bi" else ["A_log"]
        _prune_states(state, f"{mixer}x_proj{branch}.weight", [mixer + name for name in decays], large, small)
        names = f"{mixer}x_proj{branch}.weight", f"{mixer}dt_proj{branch}.weight"
        _lower_rank(state, *names, math.ceil(small.embed_dim / 16))


def _prune_inner(state: State, norm: str, mixer: str, branches: tuple[str, ...], small: AuMConfig) -> None:
    """Keep ``small.expand * small.embed_dim`` of a mixer's inner channels; in_proj has their x first and z last.

    The rows of x_proj count the same, because B, C and delta's factors may be scaled against each other.
    """
    in_proj, out_proj = f"{mixer}in_proj.weight", f"{mixer}out_proj.weight"
    x, z = (_energy(half * state[norm]) for half in state[in_proj].chunk(2))
    convs = [_energy(state[f"{mixer}conv1d{branch}.weight"]) for branch in branches]
    x_projs = [_energy(F.normalize(state[f"{mixer}x_proj{branch}.weight"], dim=1), 1) for branch in branches]
    out = z * _energy(state[out_proj], 1)
    passed = (conv * _sum_of_shares([out, x_proj]) for conv, x_proj in zip(convs, x_projs, strict=True))
    kept = _most_important(x * _sum_of_shares(passed), small.expand * small.embed_dim)

    _keep(state, {in_proj: 0}, torch.cat([kept, len(x) + kept]))
    axes = {out_proj: 1}
    for branch in branches:
        axes |= {f"{mixer}x_proj{branch}.weight": 1, f"{mixer}D{branch}": 0}
        axes |= {f"{mixer}{name}{branch}.{part}": 0 for name in ("conv1d", "dt_proj") for part in ("weight", "bias")}
    axes |= {f"{mixer}{name}": 0 for name in ("A_log", "A_b_log") if f"{mixer}{name}" in state}
    _keep(state, axes, kept)


def _prune_states(state: State, x_proj: str, decays: list[str], large: AuMConfig, small: AuMConfig) -> None:
    """Keep ``small.d_state`` states of one x_proj, whose rows are delta's (r), B's (n) and C's (n)."""
    n = large.d_state
    r = len(state[x_proj]) - 2 * n
    B, C = state[x_proj][r:].split(n)
    kept = _most_important(_energy(B) * _energy(C), small.d_state)
    _keep(state, dict.fromkeys(decays, 1), kept)
    _keep(state, {x_proj: 0}, torch.cat([torch.arange(r, device=kept.device), r + kept, r + n + kept]))


def _lower_rank(state: State, x_proj: str, dt_proj: str, rank: int) -> None:
    """Delta is dt_proj @ x_proj[:r] @ u: replace the two factors by the nearest product of this rank.

    By singular values (Eckart and Young, 1936), computed from the factors' QR decompositions, which are small.
    """
    left, rows = state[dt_proj], state[x_proj]
    r = left.shape[1]
    if rank == r:
        return
    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(m.double()) for m in (left, rows[:r].T))
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    state[dt_proj] = (q_left @ u[:, :rank] * root).to(left.dtype)
    first = (root[:, None] * v[:rank] @ q_right.T).to(rows.dtype)
    state[x_proj] = torch.cat([first, rows[r:]])
