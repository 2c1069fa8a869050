"""`selective_scan_fn`: shapes, semantics and argument order of ``mamba_ssm``'s function of that name."""

import functools
import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from aum.scan.torch_scan import SelectiveScan

log = logging.getLogger(__name__)


def _torch(*args) -> tuple[Tensor, Tensor]:
    return SelectiveScan.apply(*args)


# Each takes u, delta (l, b, d), A (d, n), B, C (l, b, g, n), reverse; gives y (l, b, d) and the last state (b, d, n).
_BACKENDS = {"torch": _torch}


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` and the environment variable ``AUM_SCAN_BACKEND`` take on this machine."""
    return tuple(_BACKENDS)


@functools.cache
def _say_once(backend: str, why: str) -> None:
    log.info("selective scan: backend %r (%s)", backend, why)


def _choose(backend: str | None) -> str:
    name, why = backend, "asked for"
    if name is None:
        name, why = os.environ.get("AUM_SCAN_BACKEND") or None, "AUM_SCAN_BACKEND"
    if name is None:
        name, why = "torch", "the only one in this version"
    if name not in _BACKENDS:
        raise ValueError(f"no scan backend {name!r} ({why}); there is {', '.join(available_backends())}")
    _say_once(name, why)
    return name


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
        backend: one of `available_backends()`; ``None``: the environment variable ``AUM_SCAN_BACKEND``, else the
            fastest that fits the tensors.

    Returns:
        y (b, d, l), or (y, last state). The state is float32, or float64 where an input is float64.

    Raises:
        ValueError: shapes that do not fit each other, a complex A, or a backend that does not exist.

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
    name = _choose(backend)

    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (u, delta, A, B, C)), torch.float32)
    with torch.autocast(u.device.type, enabled=False):  # the state, A, D and the bias stay in `dtype`
        u_, delta_ = (x.permute(2, 0, 1).to(dtype).contiguous() for x in (u, delta))  # (l, b, d)
        if delta_bias is not None:
            delta_ = delta_ + delta_bias.to(dtype)
        if delta_softplus:
            delta_ = F.softplus(delta_)
        B_, C_ = _grouped(_time_first("B", B, b, d, n, l).to(dtype), _time_first("C", C, b, d, n, l).to(dtype))
        y, last_state = _BACKENDS[name](u_, delta_, A.to(dtype).contiguous(), B_, C_, reverse)
        if D is not None:
            y = torch.addcmul(y, u_, D.to(dtype))
        if z is not None:
            y = y * F.silu(z.permute(2, 0, 1).to(dtype))
        y = y.permute(1, 2, 0).to(u.dtype)
    return (y, last_state) if return_last_state else y


def _expect(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {shape} fits the other arguments")


def _time_first(name: str, x: Tensor, b: int, d: int, n: int, l: int) -> Tensor:
    """(d, n), (b, n, l) or (b, g, n, l) -> (l, b, g, n)."""
    if x.dim() == 2:
        _expect(name, x, (d, n))
        return x.expand(l, b, d, n)
    if x.dim() == 3:
        _expect(name, x, (b, n, l))
        return x.permute(2, 0, 1).unsqueeze(2)
    if x.dim() != 4 or d % x.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it is (d, n), (b, n, l) or (b, g, n, l), g a divisor of {d}"
        )
    _expect(name, x, (b, x.shape[1], n, l))
    return x.permute(3, 0, 1, 2)


def _grouped(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Give B and C, each (l, b, g, n), one number of groups, and a layout the backends can read."""
    gB, gC = B.shape[2], C.shape[2]
    groups = torch.lcm(torch.tensor(gB), torch.tensor(gC)).item() if gB != gC else gB
    B, C = (x if x.shape[2] == groups else x.repeat_interleave(groups // x.shape[2], 2) for x in (B, C))
    return B.contiguous(), C.contiguous()
