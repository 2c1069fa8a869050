"""The selective scan as torch.export sees it: plain operations around torch's own scan operator, one loop over time.

What is exported then needs nothing of this package, and ONNX gets it as its Scan operator. It is chosen while a model
is exported, and only then (`backends.choose`): called directly, the other backends are many times faster.

Axes: l tokens, b batch, d channels, g groups that share B and C, n states, r dt_rank, k branches, s scans of a mixer.
Time comes first, so that a step's data lie together; channels last. What does not depend on the state is calculated for
all steps at once, because in small models a step's cost is the number of its operations.
"""

import operator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """u, delta (l, ..., d), A (..., n, d), B, C (l, ..., n) -> y (l, ..., d), without D u; last state (..., n, d)."""
    from torch._higher_order_ops.scan import scan_op  # not public: only an export may depend on it

    decay = (delta.unsqueeze(-2) * A).exp()
    push = B.unsqueeze(-1) * (delta * u).unsqueeze(-2)

    def step(h: Tensor, decay: Tensor, push: Tensor, C: Tensor) -> list[Tensor]:
        h = decay * h + push
        return [h, C @ h]

    start = torch.zeros_like(push[0], memory_format=torch.contiguous_format)
    # Not torch's function around it, which runs torch.compile, and whose cache mixes up one export with the next.
    last, y = scan_op(step, [start], [decay.contiguous(), push.contiguous(), C.unsqueeze(-2)], ())
    return y.squeeze(-2), last


def _softplus(x: Tensor) -> Tensor:
    """ONNX Runtime's Softplus takes 20 times as long as these."""
    return x.relu() + (-x.abs()).exp().log1p()


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
    """u, delta, z (b, d, l), A (d, n), B, C (b, g, n, l), D, bias (d,) -> y (b, d, l), last state (b, d, n)."""
    d, g = u.shape[1], B.shape[1]
    delta = delta if bias is None else delta + bias.unsqueeze(-1)
    delta = _softplus(delta) if softplus else delta
    u_, delta, B, C = (x.flip(-1) if reverse else x for x in (u, delta, B, C))
    u_, delta = (x.unflatten(1, (g, d // g)).permute(3, 0, 1, 2) for x in (u_, delta))
    B, C = (x.permute(3, 0, 1, 2) for x in (B, C))
    y, last = _loop(u_, delta, A.unflatten(0, (g, d // g)).mT, B, C)
    y = y.flatten(2).permute(1, 2, 0)
    y = y.flip(-1) if reverse else y
    y = y if D is None else y + D.unsqueeze(-1) * u
    return y if z is None else y * F.silu(z), last.mT.flatten(1, 2)


def mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """xz (b, l, 2d) -> y (b, l, d): `fused.mixer`, which has the parameters, with both directions in one loop."""
    x, z = xz.transpose(0, 1).chunk(2, -1)  # (l, b, d)
    (s, _, n), k, r = A_log.shape, len(D), dt_proj.shape[2]
    us, deltas, Bs, Cs, skips = [], [], [], [], []
    for i in range(k):
        u = _conv(x, conv_weight[i], conv_bias[i], reverse=i == 1)
        u = u if padding is None else u.masked_fill(padding.mT.unsqueeze(-1), 0)
        dt, B, C = F.linear(u, x_proj[i]).split([r, n, n], -1)
        us.append(u)
        deltas.append(_softplus(F.linear(dt, dt_proj[i], dt_bias[i])))
        Bs.append(B)
        Cs.append(C / k)  # of two branches the mean is taken
        skips.append(u * (D[i] * (s / k**2)))

    def directions(branches: list[Tensor]) -> Tensor:
        """(l, b, ...) of each branch -> (l, s, b, ...), the second scan's backward in time."""
        return torch.stack([branches[0], branches[-1].flip(0)][:s], 1)

    A = -A_log.float().exp().mT.unsqueeze(1)  # (s, 1, n, d)
    y, _ = _loop(*map(directions, (us, deltas)), A, *map(directions, (Bs, Cs)))
    y = reduce(operator.add, [y[:, 0], *(y[:, i].flip(0) for i in range(1, s))])
    return ((y + reduce(operator.add, skips)) * F.silu(z)).transpose(0, 1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """SiLU of a depthwise convolution into the past, or the future: x (l, b, d), weight (d, w), bias (d,).

    Tap by tap: ONNX Runtime's convolution would want another layout, and copy the data there and back.
    """
    l, w = len(x), weight.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, w - 1) if reverse else (0, 0, 0, 0, w - 1, 0))
    taps = weight.flip(1).unbind(1) if reverse else weight.unbind(1)
    return F.silu(reduce(operator.add, (padded[i : i + l] * tap for i, tap in enumerate(taps)), bias))
