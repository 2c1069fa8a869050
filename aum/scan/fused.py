"""Two operations for torch: the selective scan, and all that lies between the mixer's in_proj and out_proj.

Autograd over separate operations would keep and copy several times what the mixer needs: here its gradients are written
in place, into slices of one tensor. Both operations are registered with torch.library, so that torch.compile sees one
node each, and torch's flop counter what they cost. ``backend`` names the kernels, a module of one contract:

``conv_forward(x, weight, bias, reverse) -> u``, ``conv_backward(du, x, weight, bias, reverse, dx) -> dweight, dbias``
    x (b, l, d), weight (k, d, w), bias (k, d) or None -> u (k, b, l, d): SiLU of a depthwise convolution into the past
    or, where ``reverse[k]``, into the future. ``du`` may be overwritten; ``dx`` is written.
``scan_forward(u, delta, A, B, C, D, z, bias, softplus, reverse, scale, keep) -> y, last, states``
    u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, g, n), D, bias (s, d) or None, z (b, l, d) or None ->
    y (b, l, d) = scale * (sum of the scans and their skips) * silu(z), and last (s, b, n, d), the states after the last
    steps scanned. ``states`` is what the backward needs to recompute the others; empty where not ``keep``.
``scan_backward(dy, dlast, u, ..., scale, states, du, ddelta, dB, dC, dz) -> dA, dD, dbias``
    writes du, ddelta (s, b, l, d), dB, dC and dz.
``states_shape(s, b, l, d, g, n) -> tuple``
    the shape of ``states`` where they are kept.

Data are of one dtype and channel-last: stride 1 on d, any other strides (0 where scans share u and delta); B and C have
any strides. Parameters and states are float32. The same input gives the same bits every time.

Axes: k convolutions, s scans, b batch, l tokens, d channels, g groups that share B and C, n states, r dt_rank.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from aum.scan.flops import register_flop_formula


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{backend}_kernels")


def _kept(backend: str, keep: bool, *sizes: int) -> tuple[int, ...]:
    return _kernels(backend).states_shape(*sizes) if keep else (0,)


# ---- the selective scan ----------------------------------------------------------------------------------------------


@torch.library.custom_op("aum::scan", mutates_args=())
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
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, delta, z (b, l, d), A (d, n), B, C (b, l, g, n), D, bias (d,) -> y (b, l, d), last (b, n, d), states."""
    u, delta, A, B, C, D, bias = (x if x is None else x[None] for x in (u, delta, A, B, C, D, bias))
    y, last, states = _kernels(backend).scan_forward(u, delta, A, B, C, D, z, bias, softplus, (reverse,), 1.0, keep)
    return y, last[0], states


@scan.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, reverse, keep, backend):
    (b, l, d), n = u.shape, A.shape[1]
    return u.new_empty(b, l, d), A.new_empty(b, n, d), A.new_empty(_kept(backend, keep, 1, b, l, d, B.shape[2], n))


@torch.library.custom_op("aum::scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    states: Tensor,
    softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z and bias; those of what is None are empty."""
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C))
    dz = u.new_empty(0 if z is None else z.shape)
    dlast, u, delta, A, B, C, D, bias = (x if x is None else x[None] for x in (dlast, u, delta, A, B, C, D, bias))
    dA, dD, dbias = _kernels(backend).scan_backward(
        *(dy, dlast, u, delta, A, B, C, D, z, bias, softplus, (reverse,), 1.0, states),
        *(du[None], ddelta[None], dB[None], dC[None], None if z is None else dz),
    )
    dD, dbias = (A.new_empty(0) if x is None else x[0] for x in (dD, dbias))
    return du, ddelta, dA[0], dB, dC, dD, dz, dbias


@scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, D, z, bias, states, softplus, reverse, backend):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, bias))


def _keep_for_scan(ctx, inputs, output):
    *tensors, softplus, reverse, keep, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = softplus, reverse, backend


def _backward_of_scan(ctx, dy, dlast, _):
    *tensors, states = ctx.saved_tensors
    u = tensors[0]
    dy = torch.zeros(u.shape, dtype=u.dtype, device=u.device) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    gradients = scan_backward(dy, dlast, *tensors, states, *ctx.options)
    return *(None if x is None else g for x, g in zip(tensors, gradients, strict=True)), None, None, None, None


scan.register_autograd(_backward_of_scan, setup_context=_keep_for_scan)


def scan_macs(steps: int, d: int, n: int, gated: bool = False) -> int:
    """MACs of a scan over ``steps`` steps of d channels: delta A, (delta u) B, h, C h; delta u, D u; the gate."""
    return steps * d * (4 * n + 2 + gated)


@register_flop_formula(torch.ops.aum.scan)
def _(u, delta, A, B, C, D, z, *_, out_shape=None, **__) -> int:
    return 2 * scan_macs(u[0] * u[1], u[2], A[1], z is not None)


@register_flop_formula(torch.ops.aum.scan_backward)
def _(dy, dlast, u, delta, A, B, C, D, z, *_, out_shape=None, **__) -> int:
    return 4 * scan_macs(u[0] * u[1], u[2], A[1], z is not None)


# ---- the mixer between its projections -------------------------------------------------------------------------------


@torch.library.custom_op("aum::mixer", mutates_args=())
def mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """xz (b, l, 2d) -> y (b, l, d), and what the backward needs: u, p, delta, states.

    Of each branch k: conv_weight (k, d, w), conv_bias (k, d), x_proj (k, r + 2n, d), dt_proj (k, d, r), dt_bias (k, d),
    D (k, d); of each scan s: A_log (s, d, n). The second scan runs backward, and so does the second branch's
    convolution. Two branches (``bi_bi``) are averaged; two scans of one branch (``fo_bi``) are added.
    """
    kernels, (x, z) = _kernels(backend), xz.chunk(2, dim=-1)
    (b, l, d), k, r = x.shape, len(D), dt_proj.shape[2]
    if _is_short(backend, l, d, k, len(A_log), xz.dtype):
        parameters = map(_f32, (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D))
        y, nothing = kernels.mixer_forward(xz, *parameters), xz.new_empty(0)
        return y, nothing, nothing.clone(), nothing.clone(), nothing.clone()
    with torch.autocast(xz.device.type, enabled=False):
        u = kernels.conv_forward(x, _f32(conv_weight), _f32(conv_bias), (False, True)[:k])
        p = u.view(k, b * l, d) @ x_proj.to(u.dtype).transpose(1, 2)
        delta = (p[..., :r] @ dt_proj.to(u.dtype).transpose(1, 2)).view(k, b, l, d)
        y, _, states = kernels.scan_forward(*_scan_arguments(u, p, delta, z, dt_bias, A_log, D, r), keep)
    return (y, u, p, delta, states) if keep else (y, u.new_empty(0), u.new_empty(0), u.new_empty(0), states)


def _is_short(backend: str, *sizes) -> bool:
    """Return whether the kernels compute the whole mixer at once, and keep nothing but its input."""
    kernels = _kernels(backend)
    return hasattr(kernels, "is_short") and kernels.is_short(*sizes)


def _f32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _scan_arguments(u: Tensor, p: Tensor, delta: Tensor, z: Tensor, dt_bias, A_log, D, r: int) -> tuple:
    s, n = A_log.shape[0], A_log.shape[2]
    k, b, l, _ = u.shape
    u, delta, D, dt_bias = (x.expand(s, *x.shape[1:]) for x in (u, delta, _f32(D), _f32(dt_bias)))
    B, C = (x.view(k, b, l, 1, n).expand(s, b, l, 1, n) for x in p[..., r:].split(n, dim=-1))
    scale = 1 / k
    return u, delta, -_f32(A_log).exp(), B, C, D.contiguous(), z, dt_bias.contiguous(), True, (False, True)[:s], scale


@mixer.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, keep, backend):
    (b, l, _), (s, d, n), k = xz.shape, A_log.shape, D.shape[0]
    keep = keep and not _is_short(backend, l, d, k, s, xz.dtype)
    kept = ((k, b, l, d), (k, b * l, x_proj.shape[1]), (k, b, l, d)) if keep else ((0,), (0,), (0,))
    states = xz.new_empty(_kept(backend, keep, s, b, l, d, 1, n), dtype=torch.float32)
    return xz.new_empty(b, l, d), *(xz.new_empty(shape) for shape in kept), states


@torch.library.custom_op("aum::mixer_backward", mutates_args=())
def mixer_backward(
    dy: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    u: Tensor,
    p: Tensor,
    delta: Tensor,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log and D."""
    kernels, (x, z) = _kernels(backend), xz.chunk(2, dim=-1)
    (b, l, d), k, (s, _, n), r = x.shape, len(D), A_log.shape, dt_proj.shape[2]
    if _is_short(backend, l, d, k, s, xz.dtype):
        parameters = conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D
        dxz, *gradients = kernels.mixer_backward(dy, xz, *map(_f32, parameters))
        return dxz, *(g.to(x.dtype) for g, x in zip(gradients, parameters, strict=True))
    dxz = torch.empty_like(xz)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dp = (u.new_empty(s, b * l, width) for width in (d, d, r + 2 * n))
    with torch.autocast(xz.device.type, enabled=False):
        arguments = _scan_arguments(u, p, delta, z, dt_bias, A_log, D, r)
        dBC = (x.view(s, b, l, 1, n) for x in dp[..., r:].split(n, dim=-1))
        dA, dD, dbias = kernels.scan_backward(
            dy, None, *arguments, states, du.view(s, b, l, d), ddelta.view(s, b, l, d), *dBC, dz
        )
        if s > k:  # two scans of one branch
            du, ddelta, dp, dD, dbias = (x.sum(0, keepdim=True) for x in (du, ddelta, dp, dD, dbias))
        torch.bmm(ddelta, dt_proj.to(u.dtype), out=dp[..., :r])
        ddt_proj = (p[..., :r].transpose(1, 2) @ ddelta).transpose(1, 2).contiguous()  # this way round it is faster
        du.baddbmm_(dp, x_proj.to(u.dtype))
        dx_proj = dp.transpose(1, 2) @ u.view(k, b * l, d)
        dconv, dconv_bias = kernels.conv_backward(
            du.view(k, b, l, d), x, _f32(conv_weight), _f32(conv_bias), (False, True)[:k], dx
        )
    gradients = dconv, dconv_bias, dx_proj, ddt_proj, dbias, dA * arguments[2], dD
    parameters = conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D
    return dxz, *(g.to(x.dtype) for g, x in zip(gradients, parameters, strict=True))


@mixer_backward.register_fake
def _(dy, *tensors):
    return tuple(torch.empty_like(x) for x in tensors[:8])


def _keep_for_mixer(ctx, inputs, output):
    *tensors, keep, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.backend = backend


def _backward_of_mixer(ctx, dy, *_):
    gradients = mixer_backward(dy.contiguous(), *ctx.saved_tensors, ctx.backend)
    return *gradients, None, None


mixer.register_autograd(_backward_of_mixer, setup_context=_keep_for_mixer)


def _mixer_macs(xz, conv_weight, x_proj, dt_proj, A_log) -> int:
    (s, d, n), steps = A_log, xz[0] * xz[1]
    per_step = sum(a * b * c for a, b, c in (conv_weight, x_proj, dt_proj))
    halving = d if conv_weight[0] == 2 else 0
    return steps * (per_step + halving) + s * scan_macs(steps, d, n, gated=True)


@register_flop_formula(torch.ops.aum.mixer)
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, *_, out_shape=None, **__) -> int:
    return 2 * _mixer_macs(xz, conv_weight, x_proj, dt_proj, A_log)


@register_flop_formula(torch.ops.aum.mixer_backward)
def _(dy, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, *_, out_shape=None, **__) -> int:
    return 4 * _mixer_macs(xz, conv_weight, x_proj, dt_proj, A_log)
