"""`selective_scan_fn`: shapes, semantics and argument order of ``mamba_ssm``'s function of that name.

Also the causal convolution before it, for the backends that are not fused with it.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aum.scan import cuda_kernels, fused, loop_scan, torch_scan
from aum.scan.backends import choose

NO_STEP = -1e4  # before its softplus, a delta that is 0 after it, in every dtype


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = C_t . h_t + D u_t.

    Axes: b batch, d channels, l steps, n states, g groups of d/g channels that share B and C.

    Args:
        u: (b, d, l), the input; its dtype is the output's.
        delta: (b, d, l), the step size.
        A: (d, n), real.
        B, C: (d, n), constant in time, or (b, n, l), or (b, g, n, l).
        D: (d,), the skip connection.
        z: (b, d, l); y is multiplied by silu(z).
        delta_bias: (d,), added to delta.
        delta_softplus: apply softplus to delta, after the bias.
        return_last_state: also return the state after the last step scanned, (b, d, n), in the dtype of the state.
            Its gradient is the true one (``mamba_ssm`` leaves it out).
        reverse: scan from the last step to the first; the last state is then the one after step 0.
        lengths: (b,), the steps of each clip of a padded batch; those after them are padding of finite values, which
            takes no part: y is 0 there, and the last state is that of the clip alone. None: all l.
        backend: one of `available_backends()`; ``None``: the environment variable ``AUM_SCAN_BACKEND``, else the
            fastest that fits the tensors. ``mamba_ssm`` gives the last state no gradient.

    Returns:
        y (b, d, l), or (y, last state). The state is float32, or float64 where an input is float64.

    Raises:
        ValueError: shapes or lengths that do not fit each other, a complex A, or a backend that does not exist or does
            not fit.

    Source: Algorithm 2 of arXiv:2312.00752; the signature is that of state-spaces/mamba,
    mamba_ssm/ops/selective_scan_interface.py, but for the keyword-only arguments.
    """
    if A.is_complex():
        raise ValueError("A is complex: only real A is supported (AuM and Mamba-1 models have A = -exp(A_log))")
    b, d, l = u.shape
    n = A.shape[-1]
    _expect("delta", delta, (b, d, l))
    _expect("A", A, (d, n))
    _expect("D", D, (d,))
    _expect("z", z, (b, d, l))
    _expect("delta_bias", delta_bias, (d,))
    B, C = _grouped("B", B, b, d, n, l), _grouped("C", C, b, d, n, l)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (u, delta, B, C, z) if x is not None))
    state = functools.reduce(torch.promote_types, (x.dtype for x in (A, D, delta_bias) if x is not None), torch.float32)
    if state != torch.float32:
        dtype = torch.promote_types(dtype, state)
    padding = padding_mask(lengths, b, l, u.device)
    if padding is not None and delta_bias is not None and not delta_softplus:
        delta, delta_bias = delta + delta_bias.unsqueeze(-1), None  # so that delta can be 0 there
        dtype = torch.promote_types(dtype, delta.dtype)
    name = choose(u.device.type, dtype, backend)
    with torch.autocast(u.device.type, enabled=False):  # the state, A, D and the bias stay in float32
        u_, delta_, B, C, z = (x if x is None else x.to(dtype) for x in (u, delta, B, C, z))
        A, D, delta_bias = (x if x is None else x.to(state) for x in (A, D, delta_bias))
        if padding is not None:  # with u and delta of 0, a step leaves the state as it is
            padding = padding.unsqueeze(1)
            u_, delta_ = u_.masked_fill(padding, 0), delta_.masked_fill(padding, NO_STEP if delta_softplus else 0)
        scan = _SCANS.get(name) or functools.partial(_channel_last, name)
        y, last_state = scan(u_, delta_, A, *_same_groups(B, C), D, z, delta_bias, delta_softplus, reverse)
        y = (y if padding is None else y.masked_fill(padding, 0)).to(u.dtype)
    return (y, last_state) if return_last_state else y


def padding_mask(
    lengths: Tensor | Sequence[int] | None, b: int, l: int, device: torch.device, least: int = 1
) -> Tensor | None:
    """Return which steps of a batch are padding, (b, l), True where they are, on ``device``; None where none is.

    ``lengths``: the steps of each clip, (b,), padded at the end. A mask that this function returned is returned
    again. Reading lengths on a GPU waits for the GPU; those on the CPU cost nothing.

    Raises ValueError, which begins with "lengths", where they are not whole numbers from ``least`` to l. While a model
    is compiled or exported, their values are not checked.
    """
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    is_mask = lengths.dtype == torch.bool
    if is_mask and tuple(lengths.shape) == (b, l):
        return lengths
    if is_mask or tuple(lengths.shape) != (b,) or lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(
            f"lengths are {b} whole numbers, one for each clip; got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if b and not torch.compiler.is_compiling():  # a compiled model cannot depend on their values
        shortest, longest = map(int, lengths.aminmax())
        if shortest < least or longest > l:
            raise ValueError(f"lengths are from {least} to {l} here; got {shortest} to {longest}")
        if shortest == l:
            return None
    return torch.arange(l, device=device) >= lengths.to(device).unsqueeze(1)


_SCANS = {"torch": torch_scan.scan, "mamba_ssm": cuda_kernels.scan, "loop": loop_scan.scan}  # the others are fused


def _channel_last(backend: str, u, delta, A, B, C, D, z, bias, softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """The scan of `aum.scan.fused`, whose data have stride 1 along the channels."""

    def turned(x: Tensor | None) -> Tensor | None:
        x = x if x is None else x.transpose(1, 2)
        return x if x is None or x.stride(2) == 1 else x.contiguous()

    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, delta, A, B, C, D, z, bias))
    B, C = (x.permute(0, 3, 1, 2) for x in (B, C))
    A, D, bias = (x if x is None else x.contiguous() for x in (A, D, bias))
    y, last, _ = fused.scan(turned(u), turned(delta), A, B, C, D, turned(z), bias, softplus, reverse, keep, backend)
    return y.transpose(1, 2), last.transpose(1, 2)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, backend: str) -> Tensor:
    """SiLU of a depthwise convolution in time: x (b, d, l), weight (d, w), bias (d,) or None -> (b, d, l).

    ``reverse`` convolves against time: output t sees inputs t ... t + w - 1, which is what flipping, convolving and
    flipping back gives, but only the kernel of w taps is flipped. ``backend`` is that of the scan it goes before.
    """
    published = cuda_kernels.causal_conv1d(x, weight, bias, reverse) if backend == "mamba_ssm" else None
    if published is not None:
        return published
    (d, w), kernel = weight.shape, weight.flip(-1) if reverse else weight
    pad = (0, w - 1) if reverse else (w - 1, 0)
    return F.silu(F.conv1d(F.pad(x, pad), kernel.unsqueeze(1), bias, groups=d))


def _expect(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {shape} fits the other arguments")


def _grouped(name: str, x: Tensor, b: int, d: int, n: int, l: int) -> Tensor:
    """(d, n), (b, n, l) or (b, g, n, l) -> (b, g, n, l), a view."""
    if x.dim() == 2:
        _expect(name, x, (d, n))
        return x.unsqueeze(-1).expand(b, d, n, l)
    if x.dim() == 3:
        _expect(name, x, (b, n, l))
        return x.unsqueeze(1)
    if x.dim() != 4 or d % x.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it is (d, n), (b, n, l) or (b, g, n, l), g a divisor of {d}"
        )
    _expect(name, x, (b, x.shape[1], n, l))
    return x


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Give B and C, each (b, g, n, l), one number of groups."""
    groups = math.lcm(B.shape[1], C.shape[1])
    return tuple(x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
