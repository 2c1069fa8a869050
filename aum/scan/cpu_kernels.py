"""The kernels of cpu_kernels.c on torch's tensors. `aum.scan.fused` says what each computes and makes the gradients.

The dtype of the data is float32 or bfloat16; parameters and states are float32. Each raises MemoryError where there
is no memory for the kernels' scratch.
"""

import ctypes

import torch
from torch import Tensor

from aum.scan.build import library

STEPS = 40  # of a chunk, at most: more need more scratch in the caches, fewer keep more states
UNITS = 32  # pieces of work, at least, where the sizes allow: enough for many threads to share evenly

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """``fields``: names, each ``type:name`` with i (int64), p (pointer), f (float), or I (two int64)."""
    types = {"i": _int, "p": _pointer, "f": ctypes.c_float, "I": _int * 2}
    return type(
        name, (ctypes.Structure,), {"_fields_": [(n, types[t]) for t, n in (x.split(":") for x in fields.split())]}
    )


# As the structs of the same names in cpu_kernels.c
_Conv = _structure(
    "Conv",
    "i:k i:b i:l i:d i:w i:half i:threads i:batch_pieces i:channel_pieces I:reverse i:x_b i:x_l i:dx_b i:dx_l "
    "p:x p:weight p:bias p:u p:du p:dx p:dweight p:dbias",
)
_Scan = _structure(
    "Scan",
    "i:s i:b i:l i:d i:g i:n i:half i:softplus i:threads i:batch_pieces i:channel_pieces i:steps i:chunks I:reverse "
    "f:scale i:u_s i:u_b i:u_l i:delta_s i:delta_b i:delta_l i:B_s i:B_b i:B_l i:B_g i:B_n "
    "i:C_s i:C_b i:C_l i:C_g i:C_n "
    "i:z_b i:z_l i:dz_b i:dz_l i:du_s i:du_b i:du_l i:ddelta_s i:ddelta_b i:ddelta_l "
    "p:u p:delta p:B p:C p:z p:dy p:A p:D p:bias p:dlast p:y p:du p:ddelta p:dz p:last p:states "
    "p:dA p:dD p:dbias p:dB p:dC",
)


def _fill(kind: type[ctypes.Structure], **values) -> ctypes.Structure:
    return kind(**{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()})


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides by the names of the structs: ``_strides(u_sbl=u)`` is {"u_s": u.stride(0), "u_b": u.stride(1), ...}."""
    result = {}
    for key, x in tensors.items():
        name, axes = key.split("_")
        if x is not None:
            result |= {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}
    return result


def _call(function: str, arguments: ctypes.Structure, backward: bool) -> None:
    if getattr(library(), function)(ctypes.byref(arguments), int(backward)):
        raise MemoryError("no memory for the scratch of the CPU scan")


def _pieces(b: int, channels: int, groups: int = 1) -> tuple[int, int]:
    """Return the numbers of pieces to cut the clips and a group's channels into. They depend only on the sizes."""
    tiles = -(-channels // library().aum_vector_lanes())
    by_channel = min(tiles, max(-(-channels // 256), -(-UNITS // max(1, 4 * b * groups))))
    return min(b, -(-UNITS // (by_channel * groups))), by_channel


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...]) -> Tensor:
    """x (b, l, d), weight (k, d, w), bias (k, d) -> u (k, b, l, d)."""
    u = x.new_empty(len(weight), *x.shape)
    if u.numel():
        _call("aum_conv", _conv(x, weight, bias, reverse, u=u), backward=False)
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
    _call("aum_conv", _conv(x, weight, bias, reverse, du=du, dx=dx, dweight=dweight, dbias=dbias), backward=True)
    return dweight.sum(0), None if bias is None else dbias.sum(0)


def _conv(x, weight, bias, reverse, dx=None, **buffers) -> ctypes.Structure:
    (b, l, d), (k, _, w) = x.shape, weight.shape
    batch_pieces, channel_pieces = _pieces(b, d)
    return _fill(
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
        _call("aum_scan", arguments, backward=False)
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
    _call("aum_scan", arguments, backward=True)
    for out, partial in ((dB, dB_), (dC, dC_)):
        out.copy_(partial[0] if channel_pieces == 1 else partial.sum(0))
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
    return _fill(
        _Scan,
        **dict(s=s, b=b, l=l, d=d, g=g, n=n, half=u.dtype == torch.bfloat16, softplus=softplus),
        **dict(threads=torch.get_num_threads(), batch_pieces=batch_pieces, channel_pieces=channel_pieces),
        **dict(steps=-(-l // chunks), chunks=chunks, reverse=(_int * 2)(*reverse), scale=scale),
        **_strides(u_sbl=u, delta_sbl=delta, B_sblgn=B, C_sblgn=C, z_bl=z, dz_bl=dz, du_sbl=du, ddelta_sbl=ddelta),
        **dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, bias=bias, du=du, ddelta=ddelta, dz=dz),
        **buffers,
    )
