"""Round weights to their stored form in 32, 16 or 8 bits. Names of parameters and modules stay unchanged.

| bits | stored |
|---|---|
| 32 | every tensor as float32 |
| 16 | every tensor as float16 |
| 8 | matrices and kernels as int8 codes with a float16 scale per output channel; every other tensor as float16 |

At 8 bits these stay at 16 (`is_8_bit` has the rule): A_log, D and the delta bias, because a state-space model's
accuracy is most sensitive to the state matrix and the state (arXiv:2506.12480); norms, other biases, class token and
position embedding, because each of their values acts on a whole channel or token; and kernels of short rows, where the
scales would cost what the codes save: Mamba's depthwise convolution of 4 taps would take 6 bytes a channel, not 8.

A channel's weights w, with m the largest |w|, become code * scale: scale = m / 127 rounded to float16, code = w / scale
rounded to an integer, -127 to 127, so that 0 stays 0 (symmetric, per channel: arXiv:1712.05877). Rounding is
idempotent to the bit: a stored model, loaded and stored again, is the same file.

BatchNorm's running mean and variance are part of a model, so they are rounded, stored and counted like the rest.
Integer buffers (BatchNorm's count of batches) are not stored: no computation uses them.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dcase.errors import UserError

WIDTHS = (32, 16, 8)
CODE_MAX = 127
MIN_8_BIT_ROW = 8  # weights per output channel from which 2 bytes of scale pay off
SCALE = ".scale"  # a stored int8 tensor's name and this: its scales
SMALLEST = 2.0**-24  # of float16, above 0
FINE = 2.0**-17  # from here on float16 has at least 128 steps of its size


def is_8_bit(name: str, tensor: Tensor) -> bool:
    """Return whether a parameter is stored as int8: a matrix or kernel of at least 8 weights per output channel."""
    long_rows = tensor.ndim >= 2 and tensor.numel() >= MIN_8_BIT_ROW * tensor.shape[0] > 0
    return long_rows and name.endswith("weight")


def encode(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return a state dict in its stored form, in new tensors on the same device.

    A float tensor ``name`` becomes ``name`` in float32 or float16, or int8 ``name`` and float16 ``name.scale``
    (channels,).

    Raises `UserError`, naming the tensor, for a value that is not finite, or that float16 cannot hold.
    """
    _check(bits)
    stored = {}
    for name, value in _floats(state).items():
        value = value.detach()
        if not value.isfinite().all():
            raise UserError(f"weight {name} is not finite, so it cannot be stored: train again with a lower --lr")
        if bits == 8 and is_8_bit(name, value):
            scale = _scale(_largest(value))
            stored[name] = _codes(value.float(), scale).to(torch.int8).contiguous()
            stored[name + SCALE] = in_float = scale.half()
        else:
            dtype = torch.float32 if bits == 32 else torch.float16
            stored[name] = in_float = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not in_float.isfinite().all():
            largest = f"{value.abs().max().item():.4g}"
            raise UserError(f"weight {name} has values up to {largest}, too large for --weight_bits {bits}: use 32")
    return stored


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that `encode` stored, in new float32 tensors, without the integer buffers.

    Raises `UserError`, naming the tensor, for another dtype, an int8 tensor without its scales, or a value that is not
    finite.
    """
    state = {}
    for name, value in stored.items():
        if value.dtype not in (torch.int8, torch.float16, torch.float32):
            raise UserError(f"tensor {name} is {_dtype_name(value.dtype)}, not int8, float16 or float32")
        if _is_scale(name, stored):
            continue
        state[name] = value.to(torch.float32, copy=True)
        if value.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if scale is None or scale.dtype != torch.float16 or scale.shape != value.shape[:1]:
                raise UserError(f"tensor {name} is int8 without {name}{SCALE}, a float16 scale for each channel")
            state[name].mul_(_along(scale.float(), value))
        if not state[name].isfinite().all():
            raise UserError(f"tensor {name} is not finite")
    return state


def stored_bytes(model: nn.Module | Mapping[str, Tensor], bits: int) -> dict[str, int]:
    """Return the stored bytes of a model or its state dict by dtype: parameters, scales and buffers.

    This encodes nothing.
    """
    _check(bits)
    total: Counter[str] = Counter()
    for name, value in _floats(model.state_dict() if isinstance(model, nn.Module) else model).items():
        if bits == 32:
            total["float32"] += 4 * value.numel()
        elif bits == 8 and is_8_bit(name, value):
            total["int8"] += value.numel()
            total["float16"] += 2 * len(value)
        else:
            total["float16"] += 2 * value.numel()
    return dict(total)


def bytes_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of tensors by name of dtype; for the result of `encode`, as `stored_bytes`."""
    total: Counter[str] = Counter()
    for value in tensors.values():
        total[_dtype_name(value.dtype)] += value.numel() * value.element_size()
    return dict(total)


def rounded(model: nn.Module | Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return the parameters of a model, or named weights, as they are after storing and loading.

    Use this to train with rounded weights, and to evaluate the stored model, without changing the module:

        logits = torch.func.functional_call(model, rounded(model, 8), (x,))

    The gradient passes as if nothing had been rounded (straight through, arXiv:1308.3432), to the weights as they were
    given, so that steps smaller than the rounding's add up. Frozen weights stay frozen. Buffers are left to the model,
    where training updates them; give ``model.state_dict()`` to evaluate with rounded ones.

    Unlike `encode` it does not check for values that are not finite or too large, which would make a GPU wait: the loss
    shows them.
    """
    _check(bits)
    weights = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    floats = _floats(weights)
    if bits < 32 and floats:
        in_8_bit = tuple(bits == 8 and is_8_bit(name, value) for name, value in floats.items())
        weights.update(zip(floats, _StraightThrough.apply(in_8_bit, *floats.values()), strict=True))
    return weights


class _StraightThrough(torch.autograd.Function):
    """Round all weights of a model as one node: with a hundred small tensors, every saved operation counts.

    The plain w + (round(w) - w).detach() has the same gradient, in three operations more per tensor.
    """

    @staticmethod
    def forward(ctx, in_8_bit: tuple[bool, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that is not used has no gradient, rather than zeros
        largest = [_largest(w) for w, is_int8 in zip(weights, in_8_bit, strict=True) if is_int8]
        scales = iter(_scale(torch.cat(largest)).split([len(x) for x in largest]) if largest else ())
        outputs = tuple(
            (_through_codes(w.float(), next(scales)) if is_int8 else w.half()).to(w.dtype)
            for w, is_int8 in zip(weights, in_8_bit, strict=True)
        )
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(y for y, is_needed in zip(outputs, needed, strict=True) if not is_needed))
        return outputs

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients


def _largest(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each channel, (channels, ...) -> (channels,), float32."""
    return weight.float().abs().flatten(1).amax(1)


def _scale(largest: Tensor) -> Tensor:
    """Channels' largest magnitudes -> their scales, both (channels,): values of float16, above 0, in float32.

    Below `FINE`, float16 is so coarse that the largest code need not be 127, and a second rounding could find another
    scale. Powers of two, rounded upwards, are safe there: with a code of 64 or more, m / 127 lies above the next lower
    power. From `FINE` on, scale is within 1 / 256 of m / 127, so that m / scale rounds to 127, and 127 * scale leads
    back to the same scale. Neither case gives a code above 127. A channel of zeros has the smallest scale.
    """
    scale = (largest / CODE_MAX).clamp(min=SMALLEST)
    mantissa = scale.frexp().mantissa  # in [0.5, 1)
    power = scale / mantissa.masked_fill(mantissa == 0.5, 1)  # exact
    return torch.where(scale < FINE, power, scale.half().float())


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    """(channels, ...), (channels,) -> integers from -127 to 127, in float32, of the weight's shape."""
    return (weight / _along(scale, weight)).round_()


def _through_codes(weight: Tensor, scale: Tensor) -> Tensor:
    return _codes(weight, scale).mul_(_along(scale, weight))


def _along(scale: Tensor, weight: Tensor) -> Tensor:
    """(channels,) -> (channels, 1, ...), to go with the weight."""
    return scale.view(-1, *(1,) * (weight.ndim - 1))


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def _is_scale(name: str, stored: Mapping[str, Tensor]) -> bool:
    of = stored.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return of is not None and of.dtype == torch.int8


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise UserError(f"--weight_bits is {', '.join(map(str, WIDTHS))}; got {bits}")
