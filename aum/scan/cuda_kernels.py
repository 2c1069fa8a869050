"""The published CUDA kernels of mamba-ssm and causal-conv1d, where they are installed.

They are found by the compiled symbols, not by the packages: after 2.3.2.post1 mamba-ssm installs without the kernels
of Mamba-1 by default (state-spaces/mamba#977), and its import can fail for unrelated reasons.
Interfaces: state-spaces/mamba, csrc/selective_scan/selective_scan.cpp; Dao-AILab/causal-conv1d.
"""

import functools
import importlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from causal_conv1d import causal_conv1d_fn
except Exception:  # not installed, or broken: torch's convolution does
    causal_conv1d_fn = None


@functools.cache
def missing() -> str | None:
    """Why the scan's kernels cannot be used; None where they can."""
    try:
        module = importlib.import_module("selective_scan_cuda")
    except Exception as error:  # built for another torch, CUDA or Python: an ImportError, or worse
        if isinstance(error, ModuleNotFoundError) and error.name == "selective_scan_cuda":
            return "mamba-ssm's CUDA kernels are not installed (requirements-cuda.txt says how)"
        return f"mamba-ssm's CUDA kernels cannot be loaded: {_one_line(error)}"
    lacking = [name for name in ("fwd", "bwd") if not hasattr(module, name)]
    return f"selective_scan_cuda has no {' and no '.join(lacking)}" if lacking else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Scan(torch.autograd.Function):
    """u, delta, z (b, d, l), A (d, n), B, C (b, g, n, l), D, bias (d,) -> y (b, d, l), last state (b, d, n).

    The last state has no gradient: the kernels leave it out.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        kernels = importlib.import_module("selective_scan_cuda")
        y, states, *gated = kernels.fwd(u, delta, A, B, C, D, z, bias, softplus)
        last = states[:, :, -1, 1::2].contiguous()
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states, None if z is None else y)
        ctx.softplus = softplus
        ctx.mark_non_differentiable(last)
        return (y if z is None else gated[0]), last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        kernels = importlib.import_module("selective_scan_cuda")
        u, delta, A, B, C, D, z, bias, states, y = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, *dz = kernels.bwd(
            *(u, delta, A, B, C, D, z, bias, dy.contiguous(), states, y, None, ctx.softplus, False)
        )
        dB, dC = dB.to(B.dtype), dC.to(C.dtype)
        optional = (g if x is not None else None for x, g in ((D, dD), (z, dz[0] if dz else None), (bias, dbias)))
        return du, ddelta, dA, dB, dC, *optional, None


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As `aum.scan.interface` calls it. The kernels scan forward only: data are flipped for the other direction."""
    if reverse:
        u, delta, B, C, z = (x if x is None else x.flip(-1) for x in (u, delta, B, C, z))
    y, last = _Scan.apply(*(x if x is None else x.contiguous() for x in (u, delta, A, B, C, D, z, bias)), softplus)
    return (y.flip(-1) if reverse else y), last


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor | None:
    """SiLU of a depthwise convolution, x (b, d, l), weight (d, w); None where causal-conv1d cannot do it."""
    if causal_conv1d_fn is None or not 2 <= weight.shape[1] <= 4 or weight.shape[0] % 8:
        return None
    bias = bias if bias is None else bias.to(x.dtype)
    y = causal_conv1d_fn(x.flip(-1) if reverse else x, weight.to(x.dtype), bias, activation="silu")
    return y.flip(-1) if reverse else y
