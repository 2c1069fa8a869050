"""The selective scan in plain PyTorch: sequential in time, vectorised over batch, channels and states.

Glossary (lower case: axes; upper case: the matrices of the state-space model)
    b  batch            l  time steps (tokens)
    d  d_inner          n  d_state              g  groups of channels that share B and C
    u      (b, d, l)    input                   delta  (b, d, l)   step size
    A      (d, n)       decay                   B, C   (b, g, n, l)  input and output matrices
    h      (b, d, n)    state

Forward, per channel and state (Algorithm 2 of arXiv:2312.00752; zero-order hold for A, Euler for B):
    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,    y_t = C_t . h_t

The states of one layer are n = 16 times as large as its input, so they are not kept: the forward pass stores the
state before every chunk of `CHUNK` steps, and the backward pass recomputes the rest chunk by chunk. What is kept
for a layer then grows with b l d (n / CHUNK times the input, on top of the inputs), not with b l d n.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # steps between stored states: fewer cost memory, more leave the cache


def _over_groups(x: Tensor, g: int) -> Tensor:
    """(t, b, d, n) -> (t, b, g, d/g, n), without a copy."""
    t, b, d, n = x.shape
    return x.view(t, b, g, d // g, n)


def _recompute(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h: Tensor, reverse: bool):
    """Decays exp(delta A), the states before each step, and those after it, of one chunk: each (t, b, d, n).

    ``h`` (b, d, n) is the state before the chunk. Both sets of states are views of one buffer of t + 1.
    """
    t, b, d = u.shape
    g, n = B.shape[2:]
    dA = (delta.unsqueeze(-1) * A).exp_()
    buffer = u.new_empty(t + 1, b, d, n)
    before, after = (buffer[1:], buffer[:-1]) if reverse else (buffer[:-1], buffer[1:])
    torch.mul((delta * u).view(t, b, g, d // g, 1), B.unsqueeze(-2), out=_over_groups(after, g))
    buffer[t if reverse else 0] = h
    for i in reversed(range(t)) if reverse else range(t):
        after[i].addcmul_(dA[i], before[i])
    return dA, before, after


@torch.library.custom_op("aum::torch_scan", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the states before each chunk from u, delta (l, b, d), A (d, n), B, C (l, b, g, n).

    All contiguous, of one float dtype. ``delta`` is the step size itself (its bias added, softplus applied).
    ``reverse`` runs from the last step to the first. Returns y (l, b, d), h (b, d, n), both differentiable (once), and
    the states (chunks, b, d, n). It is a custom operation so that torch.compile does not unroll its loops.
    """
    l, b, d = u.shape
    g, n = B.shape[2:]
    y = torch.empty_like(u)
    h = u.new_zeros(b, d, n)
    count = -(-l // CHUNK)
    checkpoints = u.new_empty(count, b, d, n)
    for k in reversed(range(count)) if reverse else range(count):
        checkpoints[k] = h
        chunk = slice(k * CHUNK, (k + 1) * CHUNK)
        _, _, H = _recompute(u[chunk], delta[chunk], A, B[chunk], h, reverse)
        h = H[0 if reverse else -1]
        y[chunk] = (_over_groups(H, g) @ C[chunk].unsqueeze(-1)).view(-1, b, d)
    return y, h.clone(), checkpoints


@_scan.register_fake
def _(u, delta, A, B, C, reverse):
    (l, b, d), n = u.shape, A.shape[1]
    return torch.empty_like(u), u.new_empty(b, d, n), u.new_empty(-(-l // CHUNK), b, d, n)


@torch.library.custom_op("aum::torch_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    checkpoints: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C."""
    count = len(checkpoints)
    b, d = u.shape[1:]
    g, n = B.shape[2:]
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    dA_total = torch.zeros_like(A)
    carry = dlast  # gradient of the state after the chunk
    for k in range(count) if reverse else reversed(range(count)):
        chunk = slice(k * CHUNK, (k + 1) * CHUNK)
        u_, delta_, B_, C_, dy_ = (x[chunk] for x in (u, delta, B, C, dy))
        decay, before, H = _recompute(u_, delta_, A, B_, checkpoints[k], reverse)
        t = len(H)
        dy_ = dy_.view(t, b, g, 1, d // g)
        dC[chunk] = (dy_ @ _over_groups(H, g)).squeeze(-2)

        # G_t, the gradient of h_t: what y_t sends, and what h_{t+1} sends back through its decay.
        G = (dy_.transpose(-1, -2) * C_.unsqueeze(-2)).view(t, b, d, n)
        last, step = (0, 1) if reverse else (t - 1, -1)
        G[last] += carry
        for i in range(last + step, t if reverse else -1, step):
            G[i].addcmul_(decay[i - step], G[i - step])
        first = t - 1 - last
        carry = decay[first] * G[first]

        dinput = (_over_groups(G, g) @ B_.unsqueeze(-1)).view(t, b, d)  # gradient of delta u
        dB[chunk] = ((delta_ * u_).view(t, b, g, 1, d // g) @ _over_groups(G, g)).squeeze(-2)
        du[chunk] = dinput * delta_
        exponent = decay.mul_(before).mul_(G)  # gradient of delta A
        ddelta[chunk] = torch.mul(exponent, A, out=G).sum(-1).addcmul_(dinput, u_)
        dA_total += exponent.mul_(delta_.unsqueeze(-1)).sum((0, 1))
    return du, ddelta, dA_total, dB, dC


@_scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, checkpoints, reverse):
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C))


def _keep(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, dy, dlast, _):
    return *_scan_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors, ctx.reverse), None


_scan.register_autograd(_backward, setup_context=_keep)


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
    """u, delta, z (b, d, l), A (d, n), B, C (b, g, n, l), D, bias (d,) -> y (b, d, l), last state (b, d, n).

    Everything in the widest dtype among them, float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    u, delta = (x.permute(2, 0, 1).to(dtype).contiguous() for x in (u, delta))  # (l, b, d)
    B, C = (x.permute(3, 0, 1, 2).to(dtype).contiguous() for x in (B, C))  # (l, b, g, n)
    if bias is not None:
        delta = delta + bias.to(dtype)
    if softplus:
        delta = F.softplus(delta)
    y, last, _ = _scan(u, delta, A.to(dtype).contiguous(), B, C, reverse)
    if D is not None:
        y = torch.addcmul(y, u, D.to(dtype))
    if z is not None:
        y = y * F.silu(z.permute(2, 0, 1).to(dtype))
    return y.permute(1, 2, 0), last
