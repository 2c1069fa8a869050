"""Count a model's parameters, bytes and multiply-accumulates (MACs) against the limits of DCASE2025 Task 1.

    python -m dcase.complexity --model aum_small
    python -m dcase.complexity --model cp_mobile --weight_bits 16 --enforce    # exit code 1 where a limit is exceeded

One MAC is one multiplication, with or without an addition. Pure additions, divisions by a constant, exp, softplus,
sigmoid, means and biases are not counted. For products and convolutions this agrees with
``torch.utils.flop_counter`` (two FLOPs to a MAC), which is blind to the rest. The rest follows Algorithm 2 of
arXiv:2312.00752 (Mamba) and the published code of AuM (arXiv:2406.03344, kaistmm/Audio-Mamba-AuM).

| layer | MACs | why |
|---|---|---|
| convolution | outputs x weights of one output | flop_counter; the padding counts as input |
| transposed convolution | inputs x weights of one input | flop_counter |
| Linear | outputs x inputs, every token | flop_counter; torchinfo counts it once for all tokens |
| RMSNorm, LayerNorm, GroupNorm, InstanceNorm | 3 an element | square, times 1 / deviation, times weight |
| TokenNorm | 1 an element | a scale and shift before a ReLU, with no layer to fold them into |
| RelaxedMeanNorm | 1 a mel bin | its mean times the share |
| BatchNorm | 2 a channel | a fixed scale and shift, folded into the convolution beside it; as torchinfo counts it |
| BiMamba: in_proj, x_proj, dt_proj, out_proj, conv1d | weights, every token | as Linear and convolution |
| BiMamba: scan, of each direction | d_inner (4 d_state + 2), every token | delta A, (delta u) B, h, C h; delta u, D u |
| BiMamba: gate, of each direction | d_inner, every token | y silu(z) |
| BiMamba: halving, ``bi_bi`` only | d_inner, every token | (y_f + y_b) / 2 |

In ``fo_bi`` both directions share one conv1d, x_proj and dt_proj. A layer with parameters that has no rule here, or
that the forward pass never calls, is refused, so that nothing is free by oversight.

The challenge's own checker is torchinfo 1.8.0's ``summary(model).total_mult_adds``. It counts a Linear once instead of
once per token, and 0 for operations outside modules: the scan, the gate, functional products
(github.com/TylerYep/torchinfo/issues/77, /126). Both figures are given; only ours says what the model costs.

For memory the checker adds up the parameters by their dtypes, without buffers; ``weight_bits`` 32, "as stored", does
the same. 16 and 8 count everything that must be stored to run the model with weights of that many bits: scales, tensors
that keep more bits, and BatchNorm's running statistics (`dcase.model.quantisation.stored_bytes`).
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torchinfo
from torch import Tensor, nn

from aum import AudioMamba, BiMamba
from aum.model import TokenNorm
from aum.stem import RelaxedMeanNorm
from dcase.cli import parse
from dcase.errors import UserError, run
from dcase.model.named import ModelConfig, build
from dcase.model.quantisation import stored_bytes

# The rules of DCASE2025 Task 1 (its baseline's complexity.py): per model, for one clip of 1 s.
MAX_PARAMS_MEMORY = 128_000  # bytes
MAX_MACS = 30_000_000
BYTES_PER_DTYPE = {  # the same file's table
    torch.float32: 4,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.int32: 4,
    torch.int8: 1,
    torch.uint8: 1,
    torch.qint8: 1,
    torch.quint8: 1,
}

NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RULES = (  # types, (layer, its inputs, its output) -> MACs of one call
    ((nn.Conv1d, nn.Conv2d), lambda layer, inputs, y: y.numel() * layer.weight[0].numel()),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d), lambda layer, inputs, y: inputs[0].numel() * layer.weight[0].numel()),
    ((nn.Linear,), lambda layer, inputs, y: y.numel() * layer.in_features),
    (NORMS, lambda layer, inputs, y: (2 if layer.weight is None else 3) * y.numel()),
    ((RelaxedMeanNorm,), lambda layer, inputs, y: y.numel() // y.shape[3]),
    ((TokenNorm,), lambda layer, inputs, y: y.numel()),
    (BATCH_NORMS, lambda layer, inputs, y: 2 * layer.num_features),
)
# Parts by the beginning of a layer's name; the others go by the name of the model's direct child.
PARTS = {
    "classifier": "head",
    "in_c": "stem",
    **{f"stages.s{number}": f"stage_{number}" for number in (1, 2, 3)},
    "feed_forward": "head",
}
WeightBits = Literal[32, 16, 8]


@dataclass(frozen=True)
class Complexity:
    """The cost of one forward pass of one clip."""

    input_size: tuple[int, ...]
    params: int
    param_bytes: dict[str, int]
    """Bytes by dtype: of the parameters; with ``weight_bits`` 16 or 8, of everything that is stored."""
    macs_by_part: dict[str, int]
    torchinfo_macs: int
    """MACs by the challenge's checker."""
    weight_bits: WeightBits = 32
    """Bits of the stored weights; 32: those of the parameters."""
    bytes_in_bits: dict[int, int] = field(default_factory=dict)
    """Bits -> bytes of everything that is stored with weights of 16 and of 8 bits."""

    @property
    def macs(self) -> int:
        """All MACs, including the scan's."""
        return sum(self.macs_by_part.values())

    @property
    def total_param_bytes(self) -> int:
        return sum(self.param_bytes.values())

    @property
    def memory_within_limit(self) -> bool:
        return self.total_param_bytes <= MAX_PARAMS_MEMORY

    @property
    def macs_within_limit(self) -> bool:
        return self.macs <= MAX_MACS

    @property
    def within_limits(self) -> bool:
        """Whether the model is within both limits, by our count of MACs."""
        return self.memory_within_limit and self.macs_within_limit

    def as_dict(self) -> dict:
        """Return plain values, including the limits, for ``results.json`` and the report."""
        return {
            "input_size": list(self.input_size),
            "params": self.params,
            "weight_bits": self.weight_bits,
            "param_bytes": dict(self.param_bytes),
            "total_param_bytes": self.total_param_bytes,
            "max_param_bytes": MAX_PARAMS_MEMORY,
            **{f"bytes_in_{bits}_bit": total for bits, total in self.bytes_in_bits.items()},
            "macs": self.macs,
            "macs_by_part": dict(self.macs_by_part),
            "torchinfo_macs": self.torchinfo_macs,
            "max_macs": MAX_MACS,
            "within_limits": self.within_limits,
        }


def measure(model: nn.Module, input_size: tuple[int, ...], weight_bits: WeightBits = 32) -> Complexity:
    """Count the cost of one forward pass of ``model`` on a log-mel of ``input_size`` (1, 1, n_mels, frames).

    ``weight_bits``: bits of the stored weights; 32: the parameters without buffers, as the checker counts. The model is
    not changed, and no random number is drawn. Two passes run over a copy, one of them complete, because torchinfo
    needs it.

    Raises:
        ValueError: ``input_size`` is not of one clip.
        UserError: a parameter's dtype is not in the challenge's table, a layer has no rule to count it by, or the
            forward pass does not call it.
    """
    as_they_are = param_bytes(model)
    stored = {bits: stored_bytes(model, bits) for bits in (16, 8)}
    return Complexity(
        input_size=tuple(input_size),
        params=sum(p.numel() for p in model.parameters()),
        param_bytes=stored.get(weight_bits, as_they_are),
        macs_by_part=macs_by_part(model, input_size),
        torchinfo_macs=torchinfo_macs(model, input_size),
        weight_bits=weight_bits,
        bytes_in_bits={bits: sum(by_dtype.values()) for bits, by_dtype in stored.items()},
    )


def param_bytes(model: nn.Module) -> dict[str, int]:
    """Return the parameters' bytes by name of dtype. Raises UserError for a dtype not in the challenge's table."""
    total: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.dtype not in BYTES_PER_DTYPE:
            allowed, given = ", ".join(map(_dtype_name, BYTES_PER_DTYPE)), _dtype_name(parameter.dtype)
            raise UserError(f"parameter {name} is {given}; the challenge counts only {allowed}: cast it to one of them")
        total[_dtype_name(parameter.dtype)] += parameter.numel() * BYTES_PER_DTYPE[parameter.dtype]
    return dict(total)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torchinfo_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Return the MACs that the challenge's checker prints, by a complete forward pass. Raises as `measure`."""
    probe, clip = _probe(model, input_size)
    try:
        return torchinfo.summary(probe, input_data=clip, verbose=0).total_mult_adds
    finally:
        torchinfo.torchinfo._cached_forward_pass.clear()  # it would hold the copy for as long as the program runs


def macs_by_part(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """Return the MACs of one forward pass by part, in the order in which the parts first run. Raises as `measure`.

    The parts of the mixers are those of the table above; other layers are named by `PARTS` or by the model's direct
    child that holds them ("patch_embed", "stem", "head"), norms under "norms". The scan itself is not run.
    """
    probe, clip = _probe(model, input_size)
    parts: Counter[str] = Counter()
    mixers = [module for module in probe.modules() if isinstance(module, BiMamba)]
    inside = {module for mixer in mixers for module in mixer.modules()}
    for mixer in mixers:
        mixer.forward = partial(_mixer_pass, mixer, parts)
    waiting = set()
    for name, layer in probe.named_modules():
        if layer not in inside:
            layer.register_forward_hook(partial(_layer_pass, name, parts, waiting))
            if _rule(layer) is not None:
                waiting.add(name)
    with torch.no_grad():
        probe(clip)
    if waiting:
        raise UserError(f"layer {min(waiting)!r} is never called as a module, so its MACs cannot be counted")
    return dict(parts)


def _probe(model: nn.Module, input_size: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """Return a copy of the model in float32 (counts do not depend on the dtype), and a clip for it."""
    if input_size[0] != 1:
        raise ValueError(f"complexity is of one clip: input_size starts with 1; got {tuple(input_size)}")
    probe = copy.deepcopy(model).float().eval()
    device = next((p.device for p in probe.parameters()), None)
    return probe, torch.zeros(input_size, device=device)


def _mixer_pass(mixer: BiMamba, parts: Counter[str], hidden: Tensor) -> Tensor:
    """Replace a mixer's forward: count its MACs for ``hidden`` (1, l, d_model), and compute nothing."""
    branches = 2 if mixer.direction == "bi_bi" else 1
    scans = 1 if mixer.direction == "fo_fo" else 2
    d_inner, d_state = mixer.A_log.shape
    per_token = {
        "in_proj": mixer.in_proj.weight.numel(),
        "conv1d": branches * mixer.conv1d.weight.numel(),
        "x_proj": branches * mixer.x_proj.weight.numel(),
        "dt_proj": branches * mixer.dt_proj.weight.numel(),
        "scan": scans * d_inner * (4 * d_state + 2),
        "gate": scans * d_inner,
        "halving": d_inner if mixer.direction == "bi_bi" else 0,
        "out_proj": mixer.out_proj.weight.numel(),
    }
    tokens = hidden.numel() // hidden.shape[-1]
    parts.update({part: tokens * macs for part, macs in per_token.items() if macs})
    return hidden


def _layer_pass(name: str, parts: Counter[str], waiting: set[str], layer: nn.Module, inputs: tuple, output) -> None:
    """Forward hook: add the cost of one call of ``layer``."""
    waiting.discard(name)
    rule = _rule(layer)
    if rule is not None:
        parts[_part(name, layer)] += rule(layer, inputs, output)
    elif list(layer.parameters(recurse=False)) or hasattr(layer, "_packed_params"):  # the latter: a quantised layer
        if not isinstance(layer, AudioMamba):  # its class token costs nothing
            raise UserError(f"dcase.complexity has no rule to count {type(layer).__name__} (layer {name!r}): add one")


def _rule(layer: nn.Module) -> Callable[[nn.Module, tuple, Tensor], int] | None:
    return next((rule for types, rule in RULES if isinstance(layer, types)), None)


def _part(name: str, layer: nn.Module) -> str:
    if isinstance(layer, (*NORMS, *BATCH_NORMS, RelaxedMeanNorm)):
        return "norms"
    child = name.partition(".")[0] or type(layer).__name__
    return next((part for start, part in PARTS.items() if f"{name}.".startswith(f"{start}.")), child)


def table(complexity: Complexity, name: str) -> str:
    """Return two aligned Markdown tables, totals against the limits and MACs by part, and the verdicts."""
    stored = " + ".join(f"{dtype} {size:,} B" for dtype, size in complexity.param_bytes.items())
    totals = [
        ("Parameters", complexity.params, "", None),
        ("Memory, as stored", complexity.total_param_bytes, " B", MAX_PARAMS_MEMORY),
        *((f"Memory, in {bits} bit", n, " B", MAX_PARAMS_MEMORY) for bits, n in complexity.bytes_in_bits.items()),
        ("MACs", complexity.macs, "", MAX_MACS),
        ("MACs, challenge's checker", complexity.torchinfo_macs, "", MAX_MACS),
    ]
    lines = [
        f"Complexity of {name}, one clip of {' x '.join(map(str, complexity.input_size[2:]))} (mel bins x frames)",
        "",
        f"| {'':<25} | {'Value':>17} | {'Limit':>12} | {'Of the limit':>16} |",
        f"| {'-' * 25} | {'-' * 16}: | {'-' * 11}: | {'-' * 15}: |",
        *(_total_line(*total) for total in totals),
        "",
        f"| {'MACs by part':<25} | {'MACs':>17} | {'Share':>7} |",
        f"| {'-' * 25} | {'-' * 16}: | {'-' * 6}: |",
        *(f"| {part:<25} | {n:>17,} | {n / complexity.macs:>7.2%} |" for part, n in complexity.macs_by_part.items()),
        "",
        f"As stored: {stored}.",
        _checker_line(complexity),
        f"Memory: {_verdict(complexity.total_param_bytes, MAX_PARAMS_MEMORY)} B",
        f"MACs: {_verdict(complexity.macs, MAX_MACS)}",
    ]
    return "\n".join(lines)


def _total_line(label: str, value: int, unit: str, limit: int | None) -> str:
    of_limit = "-" if limit is None else f"{value / limit:,.3g} x, {'over' if value > limit else 'within'}"
    limit_cell = "-" if limit is None else f"{limit:,}{unit}"
    return f"| {label:<25} | {f'{value:,}{unit}':>17} | {limit_cell:>12} | {of_limit:>16} |"


def _verdict(value: int, limit: int) -> str:
    return f"{'pass' if value <= limit else 'fail'}, {value:,} of {limit:,}"


def _checker_line(complexity: Complexity) -> str:
    if complexity.torchinfo_macs == complexity.macs:
        return "The challenge's checker (torchinfo) counts the same MACs."
    return (
        f"The challenge's checker (torchinfo) prints {complexity.torchinfo_macs:,} MACs, "
        f"{complexity.torchinfo_macs / complexity.macs:.1%} of the true cost: it counts a Linear layer once instead of "
        "once per token, and 0 for the scan and for other operations outside modules."
    )


def warning(complexity: Complexity, name: str) -> str | None:
    """Return a line to print where the model is over a limit, or None."""
    over = []
    if not complexity.memory_within_limit:
        fits = [bits for bits, n in complexity.bytes_in_bits.items() if n <= MAX_PARAMS_MEMORY]
        instead = f" (within with --weight_bits {fits[0]})" if fits else ""
        over.append(f"memory {complexity.total_param_bytes / MAX_PARAMS_MEMORY:,.3g} x{instead}")
    if not complexity.macs_within_limit:
        over.append(f"MACs {complexity.macs / MAX_MACS:,.3g} x")
    if not over:
        return None
    shown = "python -m dcase.complexity with the model's flags shows where"
    return f"WARNING: {name} is over the challenge's limits: {', '.join(over)} ({shown})"


@dataclass(frozen=True)
class ComplexityConfig:
    """Flags of ``python -m dcase.complexity``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    n_mels: int = 256
    """Mel bins of the log-mel."""
    target_length: int = 65
    """Frames of the log-mel; a 1-s clip has 65."""
    weight_bits: WeightBits = 32
    """Bits of the stored weights, with everything stored beside them. 32: only the parameters, in their own bits."""
    enforce: bool = False
    """End with exit code 1 if a limit is exceeded."""


def main() -> None:
    config = parse(ComplexityConfig, "Parameters, bytes and MACs of a model against DCASE2025 Task 1's limits.")
    model = build(config.model, config.n_mels, config.target_length)
    complexity = measure(model, (1, 1, config.n_mels, config.target_length), config.weight_bits)
    print(table(complexity, config.model.model))
    if config.enforce and not complexity.within_limits:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
