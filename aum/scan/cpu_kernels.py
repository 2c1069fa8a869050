"""The kernels of cpu_kernels.c on torch's tensors. `aum.scan.fused` says what each computes and makes the gradients.

The dtype of the data is float32 or bfloat16; parameters and states are float32. Each raises MemoryError where there
is no memory for the kernels' scratch.
"""

import ctypes
import math
from functools import partial

import torch
from torch import Tensor

from aum.scan.build import call, fill, library, padded, structure

STEPS = 40  # of a chunk, at most: more need more scratch in the caches, fewer keep more states
MOST_TAPS = 32  # MAX_TAPS of vectors.h
LOG2_E = math.log2(math.e)
UNITS = 32  # pieces of work, at least, where the sizes allow: enough for many threads to share evenly

_int = ctypes.c_int64

# As the structs of the same names in cpu_kernels.c
_Conv = structure(
    "Conv",
    "i:k i:b i:l i:d i:w i:half i:threads i:batch_pieces i:channel_pieces I:reverse i:x_b i:x_l i:dx_b i:dx_l "
    "p:x p:weight p:bias p:u p:du p:dx p:dweight p:dbias",
)
_Scan = structure(
    "Scan",
    "i:s i:b i:l i:d i:g i:n i:half i:softplus i:threads i:batch_pieces i:channel_pieces i:steps i:chunks I:reverse "
    "f:scale i:u_s i:u_b i:u_l i:delta_s i:delta_b i:delta_l i:B_s i:B_b i:B_l i:B_g i:B_n "
    "i:C_s i:C_b i:C_l i:C_g i:C_n "
    "i:z_b i:z_l i:dz_b i:dz_l i:du_s i:du_b i:du_l i:ddelta_s i:ddelta_b i:ddelta_l "
    "p:u p:delta p:B p:C p:z p:dy p:A p:D p:bias p:dlast p:y p:du p:ddelta p:dz p:last p:states "
    "p:dA p:dD p:dbias p:dB p:dC",
)

_Short = structure(
    "Short",
    "i:k i:b i:l i:d i:n i:r i:w i:q_pad i:r_pad i:pieces i:threads i:xz_b i:xz_l f:scale p:xz p:conv p:conv_bias "
    "p:in_q p:q_out p:dt p:dt_out p:bias p:A p:D p:y p:dy p:dxz p:dconv p:dq p:ddt p:dA p:dD_bias",
)


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides by the names of the structs: ``_strides(u_sbl=u)`` is {"u_s": u.stride(0), "u_b": u.stride(1), ...}."""
    result = {}
    for key, x in tensors.items():
        name, axes = key.split("_")
        if x is not None:
            result |= {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}
    return result


def _pieces(b: int, channels: int, groups: int = 1) -> tuple[int, int]:
    """Return the numbers of pieces to cut the clips and a group's channels into. They depend only on the sizes."""
    tiles = -(-channels // library().aum_vector_lanes())
    by_channel = min(tiles, max(-(-channels // 256), -(-UNITS // max(1, 4 * b * groups))))
    return min(b, -(-UNITS // (by_channel * groups))), by_channel


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...]) -> Tensor:
    """x (b, l, d), weight (k, d, w), bias (k, d) -> u (k, b, l, d)."""
    u = x.new_empty(len(weight), *x.shape)
    if u.numel():
        call("aum_conv", _conv(x, weight, bias, reverse, u=u), backward=False)
    return u


def conv_backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...], dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """du (k, b, l, d), overwritten -> dweight, dbias; dx (b, l, d) is written."""
    k, b, l, d = du.shape
    if not du.numel():
        return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    pieces = _pieces(b, d)[0]
    dweight, dbias = weight.new_empty(pieces, *weight.shape), weight.new_empty(pieces, k, d)
    call("aum_conv", _conv(x, weight, bias, reverse, du=du, dx=dx, dweight=dweight, dbias=dbias), backward=True)
    return dweight.sum(0), None if bias is None else dbias.sum(0)


def _check_taps(w: int) -> None:
    if w > MOST_TAPS:
        raise ValueError(f"d_conv is at most {MOST_TAPS} on a CPU; got {w} (AUM_SCAN_BACKEND=torch has no limit)")


def _conv(x, weight, bias, reverse, dx=None, **buffers) -> ctypes.Structure:
    (b, l, d), (k, _, w) = x.shape, weight.shape
    _check_taps(w)
    batch_pieces, channel_pieces = _pieces(b, d)
    return fill(
        _Conv,
        **dict(k=k, b=b, l=l, d=d, w=w, half=x.dtype == torch.bfloat16, threads=torch.get_num_threads()),
        **dict(batch_pieces=batch_pieces, channel_pieces=channel_pieces, reverse=(_int * 2)(*reverse)),
        **_strides(x_bl=x, dx_bl=dx),
        **dict(x=x, weight=weight, bias=bias, dx=dx),
        **buffers,
    )


def scan_forward(u, delta, A, B, C, D, z, bias, softplus, reverse, scale, keep) -> tuple[Tensor, Tensor, Tensor]:
    """u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, g, n) -> y (b, l, d), last and kept states."""
    s, b, l, d = u.shape
    n = A.shape[-1]
    y, last = u.new_empty(b, l, d), A.new_zeros(s, b, n, d)
    states = A.new_empty(states_shape(s, b, l, d, B.shape[3], n) if keep else 0)
    if y.numel():
        arguments = _scan(u, delta, A, B, C, D, z, bias, softplus, reverse, scale, y=y, last=last, states=states)
        call("aum_scan", arguments, backward=False)
    return y, last, states


def scan_backward(
    dy, dlast, u, delta, A, B, C, D, z, bias, softplus, reverse, scale, states, du, ddelta, dB, dC, dz
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy (b, l, d), dlast -> dA, dD, dbias; du, ddelta, dB, dC and dz are written."""
    s, b, l, d = u.shape
    g, n = B.shape[3:]
    batch_pieces, channel_pieces = _pieces(b, d // g, g)
    if not dy.numel():
        return tuple(None if x is None else torch.zeros_like(x) for x in (A, D, bias))
    dA, (dD, dbias) = A.new_empty(batch_pieces, s, d, n), A.new_empty(2, batch_pieces, s, d)
    dB_, dC_ = A.new_empty(2, channel_pieces, s, b, l, g, n)
    gradients = dict(dy=dy, dlast=dlast, du=du, ddelta=ddelta, dz=dz, dA=dA, dD=dD, dbias=dbias, dB=dB_, dC=dC_)
    arguments = _scan(u, delta, A, B, C, D, z, bias, softplus, reverse, scale, states=states, **gradients)
    call("aum_scan", arguments, backward=True)
    for out, of_pieces in ((dB, dB_), (dC, dC_)):
        out.copy_(of_pieces[0] if channel_pieces == 1 else of_pieces.sum(0))
    return dA.sum(0), None if D is None else dD.sum(0), None if bias is None else dbias.sum(0)


def states_shape(s: int, b: int, l: int, d: int, g: int, n: int) -> tuple[int, ...]:
    """Return the shape of the states before each chunk of steps except the first."""
    return s, b, max(_chunks(l), 1) - 1, n, d


def _chunks(l: int) -> int:
    return -(-l // STEPS)


def _scan(u, delta, A, B, C, D, z, bias, softplus, reverse, scale, du=None, ddelta=None, dz=None, **buffers):
    s, b, l, d = u.shape
    g, n = B.shape[3:]
    batch_pieces, channel_pieces = _pieces(b, d // g, g)
    chunks = _chunks(l)
    return fill(
        _Scan,
        **dict(s=s, b=b, l=l, d=d, g=g, n=n, half=u.dtype == torch.bfloat16, softplus=softplus),
        **dict(threads=torch.get_num_threads(), batch_pieces=batch_pieces, channel_pieces=channel_pieces),
        **dict(steps=-(-l // chunks), chunks=chunks, reverse=(_int * 2)(*reverse), scale=scale),
        **_strides(u_sbl=u, delta_sbl=delta, B_sblgn=B, C_sblgn=C, z_bl=z, dz_bl=dz, du_sbl=du, ddelta_sbl=ddelta),
        **dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias, du=du, ddelta=ddelta, dz=dz),
        **buffers,
    )


# ---- the whole mixer, for short sequences ----------------------------------------------------------------------------

WIDEST = 512  # channels for which a sequence's values stay in the caches


def is_short(l: int, d: int, k: int, s: int, dtype: torch.dtype) -> bool:
    """Return whether `mixer_forward` can and should compute a mixer of l steps, d channels, k branches and s scans."""
    fits = l <= STEPS and d <= WIDEST and d % library().aum_vector_lanes() == 0
    return fits and k == s and dtype == torch.float32


def mixer_forward(xz: Tensor, *parameters: Tensor) -> Tensor:
    """Return y (b, l, d) of `aum.scan.fused.mixer` for a short sequence; ``parameters`` as there."""
    b, l, width = xz.shape
    y = xz.new_empty(b, l, width // 2)
    if y.numel():
        call("aum_short", _short(xz, *parameters, y=y), backward=False)
    return y


def mixer_backward(dy: Tensor, xz: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of xz and of ``parameters``."""
    conv_weight, _, x_proj, dt_proj, _, A_log, D = parameters
    (k, d, w), q, r, n = conv_weight.shape, x_proj.shape[1], dt_proj.shape[2], A_log.shape[2]
    dxz, new = xz.new_empty(xz.shape), partial(xz.new_zeros, min(len(xz), UNITS), k)
    dconv, dq, ddt, dA, dD_bias = new(w + 1, d), new(q, d), new(r, d), new(n, d), new(2, d)
    if dy.numel():
        gradients = dict(dy=dy, dxz=dxz, dconv=dconv, dq=dq, ddt=ddt, dA=dA, dD_bias=dD_bias)
        call("aum_short", _short(xz, *parameters, **gradients), backward=True)
    dconv, dq, ddt, dA, dD_bias = (x.sum(0) for x in (dconv, dq, ddt, dA, dD_bias))
    dA = dA.transpose(1, 2) * -A_log.exp()
    dconv, dconv_bias, (dD, dbias) = dconv[:, :w].transpose(1, 2), dconv[:, w], dD_bias.unbind(1)
    gradients = dconv, dconv_bias, dq, ddt.transpose(1, 2), dbias, dA, dD
    return dxz, *(x.clone(memory_format=torch.contiguous_format) for x in gradients)  # an operation returns no views


def _short(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, **buffers):
    (b, l, _), (k, d, w), r, n = xz.shape, conv_weight.shape, dt_proj.shape[2], A_log.shape[2]
    _check_taps(w)
    tensors = dict(
        conv=conv_weight.transpose(1, 2),
        conv_bias=conv_bias,
        in_q=padded(x_proj.transpose(1, 2)),
        q_out=x_proj,
        dt=dt_proj.transpose(1, 2),
        dt_out=padded(dt_proj),
        bias=dt_bias,
        A=-A_log.exp().transpose(1, 2) * LOG2_E,
        D=D,
    )
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    sizes = dict(k=k, b=b, l=l, d=d, n=n, r=r, w=w, pieces=min(b, UNITS), threads=torch.get_num_threads())
    sizes |= dict(q_pad=tensors["in_q"].shape[2], r_pad=tensors["dt_out"].shape[2], scale=1 / k)
    return fill(_Short, **sizes, xz=xz, xz_b=xz.stride(0), xz_l=xz.stride(1), **tensors, **buffers)
