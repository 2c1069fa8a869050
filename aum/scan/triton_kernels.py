"""The depthwise convolution and the selective scan as Triton kernels, forward and backward.

Axes: b batch, l time steps, d channels, n states, g groups of channels that share B and C, s scans (1 or 2 directions,
``reverse`` says which run from the last step to the first), k convolutions (likewise), w taps. Tensors are
(b, l, d), channels last; T is the dtype of u. All arithmetic and the state are float32.

One program of one warp takes one clip and a tile of channels with all their states, and runs through time with the
state in registers. Both directions run in the same program, one after the other, because the gate needs the sum of
their outputs: the first leaves its output in a float32 buffer, which the second finds in the L2 cache. That costs less
than two outputs and a separate kernel for the gate; it halves the programs, which b times the tiles can spare.

Time goes in chunks: load the steps of a chunk, compute, store, so that many loads are under way at once. The forward
pass stores the state before every segment of ``EVERY`` chunks. The backward pass goes through a segment twice: forward
from the stored state, to leave the state before each chunk in a buffer that the L2 cache holds, then back from chunk to
chunk, recomputing the states within one and keeping them in registers. So few states are kept from the forward pass,
and few in registers.

The tile is [n, channels]. Its layout over the warp follows from the loads of A and of the stored states, where the
states of a channel lie side by side: four states and four channels a thread, for n = 16 on 4 lanes over states and 8
over channels. That balances the sums over states (o, du, ddelta) against those over channels (dB, dC): 48 shuffles a
step backward, where all lanes on channels would need none for the first and 160 for the second. What is per channel
(softplus, gate) is done once, one lane a channel. A load or store of whole tiles in another order would give the loop
a second layout, and a copy of everything in it.

Shapes and the strides of time are compiled in (addresses within a chunk are then constants, masks that are always true
vanish), so a new length or width compiles once more; the batch does not.

Nothing is added atomically: sums over the batch or over tiles of channels leave the kernels as partial sums, which are
added afterwards in a fixed order, so the same input gives the same bits.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# To be tuned on a GPU. None of these changes a result by more than the order of its sums.
TILE = 512  # states times channels of a program: 16 registers a thread and copy of the state. More: fewer programs
WIDEST = 64  # most channels of a program, where n is small
# Most steps of a chunk in the backward pass; the forward pass takes twice as many. A longer chunk has more loads under
# way, but the backward pass holds a copy of the state for each step in registers, and the code is longer. For sm_90 and
# n = 16, 2 take 229 registers; 3 spill at 255.
CHUNK = 2
STORE = 1.2  # steps between stored states, times n: what is saved is then below 1.5 times what must be kept in 16 bits
MOST = 12  # chunks of a segment: a backward pass needs a buffer of so many states
CONV_TIMES, CONV_CHANNELS = 16, 64  # of the tile of a program's 4 warps; a program goes through all times
SUM_BLOCK = 256  # elements of dB or dC a program sums up


@triton.jit
def _sum(x, axis: tl.constexpr):
    """tl.sum, in a form that the interpreter also takes where triton was imported without TRITON_INTERPRET."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _softplus(x):
    """log(1 + e^x) and its derivative: both exact to float32 from e = exp(-|x|), where 1 + e would lose e."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    inverse = 1.0 / (1.0 + e)
    s = e / (2.0 + e)  # log(1 + e) = 2 atanh(s), s <= 1/3: the terms left out are below 2e-7 of it
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series, tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


# ------------------------------------------------------------------------------------------------- convolution


@triton.jit
def _weights(weight_ptr, k, d: tl.constexpr, c, mask_c, W: tl.constexpr):
    """The taps of convolution k at channels c: a tuple, loaded once a program, as they do not lie side by side."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + (k * d + c) * W + j, mask=mask_c, other=0.0)[None, :],)
    return taps


@triton.jit
def _shifted(ptr, stride, t, shift, l: tl.constexpr, c, mask_c):
    """(b, l, d) of one clip at times t + shift and channels c, zero outside."""
    at = t + shift
    inside = ((at >= 0) & (at < l))[:, None] & mask_c[None, :]
    return tl.load(ptr + tl.cast(at, tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _conv_forward(
    x_ptr, weight_ptr, bias_ptr, u_ptr, b, xb, xl,
    l: tl.constexpr, d: tl.constexpr, K: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (d + BD - 1) // BD
    batch = tl.cast(tl.program_id(0) // tiles, tl.int64)
    c = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    mask_c = c < d
    for k in tl.static_range(K):
        taps = _weights(weight_ptr, k, d, c, mask_c, W)
        bias = None if bias_ptr is None else tl.load(bias_ptr + k * d + c, mask=mask_c, other=0.0)[None, :]
        for start in range(0, l, BT):
            t = start + tl.arange(0, BT)
            pre = tl.full((BT, BD), 0.0, tl.float32)
            if bias is not None:
                pre += bias
            for j in tl.static_range(W):
                pre += taps[j] * _shifted(
                    x_ptr + batch * xb, xl, t, W - 1 - j if (REVERSE >> k) & 1 else j - (W - 1), l, c, mask_c
                )
            to = u_ptr + (k * b + batch) * l * d + tl.cast(t, tl.int64)[:, None] * d + c[None, :]
            tl.store(to, (pre * _sigmoid(pre)).to(u_ptr.dtype.element_ty), mask=(t < l)[:, None] & mask_c[None, :])


@triton.jit
def _conv_backward_weight(
    du_ptr, x_ptr, weight_ptr, bias_ptr, partial_ptr, b, xb, xl,
    l: tl.constexpr, d: tl.constexpr, K: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """du becomes the gradient of the pre-activation; partial (b, k, w + 1, d): that of each tap and of the bias."""
    tiles: tl.constexpr = (d + BD - 1) // BD
    batch = tl.cast(tl.program_id(0) // tiles, tl.int64)
    c = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    mask_c = c < d
    for k in tl.static_range(K):
        taps = _weights(weight_ptr, k, d, c, mask_c, W)
        bias = None if bias_ptr is None else tl.load(bias_ptr + k * d + c, mask=mask_c, other=0.0)[None, :]
        sums = ()
        for _ in tl.static_range(W + 1):
            sums = sums + (tl.full((BT, BD), 0.0, tl.float32),)
        for start in range(0, l, BT):
            t = start + tl.arange(0, BT)
            pre = tl.full((BT, BD), 0.0, tl.float32)
            if bias is not None:
                pre += bias
            xs = ()
            for j in tl.static_range(W):
                x = _shifted(x_ptr + batch * xb, xl, t, W - 1 - j if (REVERSE >> k) & 1 else j - (W - 1), l, c, mask_c)
                pre += taps[j] * x
                xs = xs + (x,)
            sig = _sigmoid(pre)
            mask = (t < l)[:, None] & mask_c[None, :]
            at = du_ptr + (k * b + batch) * l * d + tl.cast(t, tl.int64)[:, None] * d + c[None, :]
            dpre = tl.load(at, mask=mask, other=0.0).to(tl.float32) * sig * (1.0 + pre * (1.0 - sig))
            tl.store(at, dpre.to(du_ptr.dtype.element_ty), mask=mask)
            new = ()
            for j in tl.static_range(W):
                new = new + (sums[j] + dpre * xs[j],)
            sums = new + (sums[W] + dpre,)
        out = partial_ptr + ((batch * K + k) * (W + 1)) * d + c
        for j in tl.static_range(W + 1):
            tl.store(out + j * d, _sum(sums[j], axis=0), mask=mask_c)


@triton.jit
def _conv_backward_input(
    dpre_ptr, weight_ptr, dx_ptr, b, dxb, dxl,
    l: tl.constexpr, d: tl.constexpr, K: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (d + BD - 1) // BD
    batch = tl.cast(tl.program_id(0) // tiles, tl.int64)
    c = tl.program_id(0) % tiles * BD + tl.arange(0, BD)
    mask_c = c < d
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (_weights(weight_ptr, k, d, c, mask_c, W),)
    for start in range(0, l, BT):
        t = start + tl.arange(0, BT)
        dx = tl.full((BT, BD), 0.0, tl.float32)
        for k in tl.static_range(K):
            for j in tl.static_range(W):  # the output that took x_t to its tap j
                dx += taps[k][j] * _shifted(
                    dpre_ptr + (k * b + batch) * l * d, d, t,
                    j - (W - 1) if (REVERSE >> k) & 1 else W - 1 - j, l, c, mask_c,
                )  # fmt: skip
        out = dx_ptr + batch * dxb + tl.cast(t, tl.int64)[:, None] * dxl + c[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=(t < l)[:, None] & mask_c[None, :])


def _on_its_device(function):
    """Triton launches on the current GPU: make it the one of the tensors."""

    @functools.wraps(function)
    def launch(x: Tensor, *args):
        with torch.cuda.device_of(x):
            return function(x, *args)

    return launch


def _bits(reverse: tuple[bool, ...]) -> int:
    return sum(int(r) << i for i, r in enumerate(reverse))


@_on_its_device
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...]) -> Tensor:
    """silu of k depthwise causal convolutions of x: (b, l, d) -> (k, b, l, d), contiguous, in the dtype of x.

    Args:
        x: (b, l, d), stride 1 on d; float32, bfloat16 or float16.
        weight: (k, d, w), float32, contiguous. bias: (k, d), float32.
        reverse: k flags; convolution k looks at x[t] ... x[t + w - 1] where set, at x[t - w + 1] ... x[t] elsewhere.
            The last tap is x[t] either way.
    """
    (b, l, d), (k, _, w) = x.shape, weight.shape
    u = x.new_empty(k, b, l, d)
    if u.numel():
        bt, bd = CONV_TIMES, CONV_CHANNELS
        grid = (b * triton.cdiv(d, bd),)
        _conv_forward[grid](
            x, weight, bias, u, b, x.stride(0), x.stride(1), l=l, d=d, K=k, W=w, REVERSE=_bits(reverse), BT=bt, BD=bd
        )
    return u


@_on_its_device
def conv_backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...], dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `conv_forward`: writes dx (b, l, d), the sum over k; returns dweight (k, d, w), dbias (k, d).

    ``du`` (k, b, l, d), contiguous, is overwritten with the gradient of the pre-activation, in its dtype. dx has stride
    1 on d. dweight and dbias are float32; dbias is None where bias is.
    """
    (b, l, d), (k, _, w) = x.shape, weight.shape
    bt, bd = CONV_TIMES, CONV_CHANNELS
    partial = weight.new_zeros(b, k, w + 1, d) if du.numel() == 0 else weight.new_empty(b, k, w + 1, d)
    if du.numel():
        constants = {"l": l, "d": d, "K": k, "W": w, "REVERSE": _bits(reverse), "BT": bt, "BD": bd}
        tiles = triton.cdiv(d, bd)
        _conv_backward_weight[(b * tiles,)](du, x, weight, bias, partial, b, x.stride(0), x.stride(1), **constants)
        _conv_backward_input[(b * tiles,)](du, weight, dx, b, dx.stride(0), dx.stride(1), **constants)
    total = partial.sum(0)
    return total[:, :w].transpose(1, 2).contiguous(), None if bias is None else total[:, w].contiguous()


# -------------------------------------------------------------------------------------------------------- scan


@triton.jit
def _place(n: tl.constexpr, dg: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """Return this program's clip, group, tile within the group, states j [N], channels c [BD], and their masks."""
    program = tl.program_id(0)
    per_group: tl.constexpr = (dg + BD - 1) // BD
    batch = tl.cast(program // (G * per_group), tl.int64)
    group = program % (G * per_group) // per_group
    tile = program % per_group
    c = tile * BD + tl.arange(0, BD)
    j = tl.arange(0, N)
    # What is always true is written so that the compiler knows.
    mask_n = j < n if n < N else tl.full((N,), 1, tl.int1)
    mask_c = c < dg if dg % BD else tl.full((BD,), 1, tl.int1)
    return batch, tl.cast(group, tl.int64), tl.cast(tile, tl.int64), j, group * dg + c, mask_n, mask_c


@triton.jit
def _load_step(
    ptr,
    STRIDE: tl.constexpr,
    chunk,
    i: tl.constexpr,
    l: tl.constexpr,
    mask,
    CHUNK: tl.constexpr,
    BACK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Step i of the chunk, in the order of the scan, in float32; zero after the last step.
    EXACT: there is none after it.

    A step of zeros with a step size of zero leaves the state and every sum as they are: no remainder to handle.
    """
    ptr += tl.cast(l - 1 - chunk * CHUNK if BACK else chunk * CHUNK, tl.int64) * STRIDE
    inside = mask if EXACT else mask & (chunk * CHUNK + i < l)
    return tl.load(ptr + (-i * STRIDE if BACK else i * STRIDE), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_chunk(
    ptr,
    STRIDE: tl.constexpr,
    chunk,
    l: tl.constexpr,
    mask,
    CHUNK: tl.constexpr,
    BACK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The chunk's steps of a tensor, a tuple."""
    rows = ()
    for i in tl.static_range(CHUNK):
        rows = rows + (_load_step(ptr, STRIDE, chunk, i, l, mask, CHUNK, BACK, EXACT),)
    return rows


@triton.jit
def _store_step(
    ptr, STRIDE: tl.constexpr, row, chunk, i: tl.constexpr, l: tl.constexpr, mask,
    CHUNK: tl.constexpr, BACK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    ptr += tl.cast(l - 1 - chunk * CHUNK if BACK else chunk * CHUNK, tl.int64) * STRIDE
    inside = mask if EXACT else mask & (chunk * CHUNK + i < l)
    tl.store(ptr + (-i * STRIDE if BACK else i * STRIDE), row.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _step_sizes(deltas, bias, chunk, l: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """Step sizes from delta, and their derivatives by it; 0 after the last step."""
    sizes = ()
    slopes = ()
    for i in tl.static_range(CHUNK):
        size = deltas[i]
        slope = size
        if bias is not None:
            size += bias
        if SOFTPLUS:
            size, slope = _softplus(size)
        sizes = sizes + (size if EXACT else tl.where(chunk * CHUNK + i < l, size, 0.0),)
        slopes = slopes + (slope,)
    return sizes, slopes


@triton.jit
def _scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, sum_ptr, last_ptr, states_ptr,
    b, scale, u_st, delta_st, B_st, C_st, z_b,
    u_l: tl.constexpr, delta_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr, z_l: tl.constexpr,
    l: tl.constexpr, d: tl.constexpr, n: tl.constexpr, G: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    batch, group, tile, j, c, mask_n, mask_c = _place(n, d // G, G, N, BD)
    mask_h = mask_n[:, None] & mask_c[None, :]
    row = batch * l * d + c  # in y and in the sum
    EXACT: tl.constexpr = l % CHUNK == 0
    for s in tl.static_range(S):
        A = tl.load(A_ptr + (s * d + c[None, :]) * n + j[:, None], mask=mask_h, other=0.0) * LOG2E
        D = None if D_ptr is None else tl.load(D_ptr + s * d + c, mask=mask_c, other=0.0)
        bias = None if bias_ptr is None else tl.load(bias_ptr + s * d + c, mask=mask_c, other=0.0)
        u_s = u_ptr + s * u_st[0] + batch * u_st[1] + c
        delta_s = delta_ptr + s * delta_st[0] + batch * delta_st[1] + c
        B_s = B_ptr + s * B_st[0] + batch * B_st[1] + group * B_st[2] + tl.cast(j, tl.int64) * B_st[3]
        C_s = C_ptr + s * C_st[0] + batch * C_st[1] + group * C_st[2] + tl.cast(j, tl.int64) * C_st[3]
        last = (s * b + batch) * n * d + j[:, None] * d + c[None, :]
        state = (s * b + batch) * n * d + j[:, None] + c[None, :] * n
        h = tl.full((N, BD), 0.0, tl.float32)
        for chunk in range(0, (l + CHUNK - 1) // CHUNK):
            if states_ptr is not None:  # the first segment starts from zero: nothing to store
                to = states_ptr + tl.cast(chunk // EVERY - 1, tl.int64) * S * b * n * d + state
                tl.store(to, h, mask=mask_h & (chunk > 0) & (chunk % EVERY == 0))
            us = _load_chunk(u_s, u_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
            deltas = _load_chunk(delta_s, delta_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
            Bs = _load_chunk(B_s, B_l, chunk, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
            Cs = _load_chunk(C_s, C_l, chunk, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
            sizes, slopes = _step_sizes(deltas, bias, chunk, l, SOFTPLUS, CHUNK, EXACT)
            os = ()
            for i in tl.static_range(CHUNK):
                h = tl.exp2(sizes[i][None, :] * A) * h + (sizes[i] * us[i])[None, :] * Bs[i][:, None]
                o = _sum(h * Cs[i][:, None], axis=0)
                os = os + (o if D is None else o + D * us[i],)
            if s == S - 1:
                if S > 1:
                    others = _load_chunk(sum_ptr + row, d, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                if z_ptr is not None:
                    zs = _load_chunk(z_ptr + batch * z_b + c, z_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
            for i in tl.static_range(CHUNK):
                if s < S - 1:
                    _store_step(sum_ptr + row, d, os[i], chunk, i, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                else:
                    y = os[i] * scale if S == 1 else (os[i] + others[i]) * scale
                    if z_ptr is not None:
                        y *= zs[i] * _sigmoid(zs[i])
                    _store_step(y_ptr + row, d, y, chunk, i, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
        tl.store(last_ptr + last, h, mask=mask_h)
        tl.debug_barrier()  # the second direction reads what other lanes may have written


@triton.jit
def _scan_backward(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr, starts_ptr, sum_ptr,
    du_ptr, ddelta_ptr, dB_ptr, dC_ptr, dz_ptr, dA_ptr, dD_ptr, dbias_ptr,
    b, scale, u_st, delta_st, B_st, C_st, z_b, du_st, ddelta_st, dz_b,
    u_l: tl.constexpr, delta_l: tl.constexpr, B_l: tl.constexpr, C_l: tl.constexpr, z_l: tl.constexpr,
    du_l: tl.constexpr, ddelta_l: tl.constexpr, dz_l: tl.constexpr,
    l: tl.constexpr, d: tl.constexpr, n: tl.constexpr, G: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """dB, dC (tiles, s, b, l, g, n), dA (b, s, d, n), dD, dbias (b, s, d) are partial sums.
    starts (EVERY, b, d, n): the states before a segment's chunks."""
    batch, group, tile, j, c, mask_n, mask_c = _place(n, d // G, G, N, BD)
    mask_h = mask_n[:, None] & mask_c[None, :]
    row = batch * l * d + c  # in dy and in the sum
    EXACT: tl.constexpr = l % (CHUNK * EVERY) == 0
    chunks: tl.constexpr = (l + CHUNK - 1) // CHUNK
    segments: tl.constexpr = (chunks + EVERY - 1) // EVERY
    starts = starts_ptr + batch * n * d + j[:, None] + c[None, :] * n
    for s in tl.static_range(S):
        A = tl.load(A_ptr + (s * d + c[None, :]) * n + j[:, None], mask=mask_h, other=0.0) * LOG2E
        D = None if D_ptr is None else tl.load(D_ptr + s * d + c, mask=mask_c, other=0.0)
        bias = None if bias_ptr is None else tl.load(bias_ptr + s * d + c, mask=mask_c, other=0.0)
        u_s = u_ptr + s * u_st[0] + batch * u_st[1] + c
        delta_s = delta_ptr + s * delta_st[0] + batch * delta_st[1] + c
        B_s = B_ptr + s * B_st[0] + batch * B_st[1] + group * B_st[2] + tl.cast(j, tl.int64) * B_st[3]
        C_s = C_ptr + s * C_st[0] + batch * C_st[1] + group * C_st[2] + tl.cast(j, tl.int64) * C_st[3]
        part = (((tile * S + s) * b + batch) * l * G + group) * n + j  # in dB and dC
        state = (s * b + batch) * n * d + j[:, None] + c[None, :] * n
        dh = tl.full((N, BD), 0.0, tl.float32)  # gradient of the state after the chunk
        if dlast_ptr is not None:
            dh += tl.load(dlast_ptr + state, mask=mask_h, other=0.0)
        dA = tl.full((N, BD), 0.0, tl.float32)
        dD = tl.full((BD,), 0.0, tl.float32)
        dbias = tl.full((BD,), 0.0, tl.float32)
        for k in range(0, segments):
            first = (segments - 1 - k) * EVERY
            h = tl.load(
                states_ptr + tl.cast(segments - 2 - k, tl.int64) * S * b * n * d + state, mask=mask_h & (first > 0),
                other=0.0,
            )  # fmt: skip
            tl.debug_barrier()  # other lanes may still have to read what this one writes
            # Forward from there: the states before the segment's chunks.
            for q in range(0, EVERY - 1):
                tl.store(starts + tl.cast(q, tl.int64) * b * n * d, h, mask=mask_h)
                us = _load_chunk(u_s, u_l, first + q, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                deltas = _load_chunk(delta_s, delta_l, first + q, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                sizes, slopes = _step_sizes(deltas, bias, first + q, l, SOFTPLUS, CHUNK, EXACT)
                for i in tl.static_range(CHUNK):
                    B = _load_step(B_s, B_l, first + q, i, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                    h = tl.exp2(sizes[i][None, :] * A) * h + (sizes[i] * us[i])[None, :] * B[:, None]
            tl.store(starts + (EVERY - 1) * b * n * d, h, mask=mask_h)
            tl.debug_barrier()  # a lane may read what another has written
            for q in range(0, EVERY):
                chunk = first + EVERY - 1 - q
                h = tl.load(starts + tl.cast(EVERY - 1 - q, tl.int64) * b * n * d, mask=mask_h, other=0.0)
                us = _load_chunk(u_s, u_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                deltas = _load_chunk(delta_s, delta_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                dys = _load_chunk(dy_ptr + row, d, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                if z_ptr is not None:
                    zs = _load_chunk(z_ptr + batch * z_b + c, z_l, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                if z_ptr is not None and 0 < s and s == S - 1:
                    others = _load_chunk(sum_ptr + row, d, chunk, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                sizes, slopes = _step_sizes(deltas, bias, chunk, l, SOFTPLUS, CHUNK, EXACT)

                # Forward again: the states before each step, and for dz the outputs.
                before = ()
                os = ()
                for i in tl.static_range(CHUNK):
                    B = _load_step(B_s, B_l, chunk, i, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                    before = before + (h,)
                    h = tl.exp2(sizes[i][None, :] * A) * h + (sizes[i] * us[i])[None, :] * B[:, None]
                    if z_ptr is not None:
                        C = _load_step(C_s, C_l, chunk, i, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                        o = _sum(h * C[:, None], axis=0)
                        if D is not None:
                            o += D * us[i]
                        if s < S - 1:
                            _store_step(sum_ptr + row, d, o, chunk, i, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                        elif S > 1:
                            o += others[i]
                        os = os + (o,)

                # Backward: dh is what the steps after send; dy adds to it. B and C are loaded one step ahead.
                B_next = _load_step(B_s, B_l, chunk, CHUNK - 1, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                C_next = _load_step(C_s, C_l, chunk, CHUNK - 1, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                for i in tl.static_range(CHUNK - 1, -1, -1):
                    B = B_next
                    C = C_next
                    if i > 0:
                        B_next = _load_step(B_s, B_l, chunk, i - 1, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                        C_next = _load_step(C_s, C_l, chunk, i - 1, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                    do = dys[i] * scale
                    if z_ptr is not None:
                        sig = _sigmoid(zs[i])
                        if s == S - 1:
                            dz = os[i] * do * sig * (1.0 + zs[i] * (1.0 - sig))
                            _store_step(
                                dz_ptr + batch * dz_b + c,
                                dz_l,
                                dz,
                                chunk,
                                i,
                                l,
                                mask_c,
                                CHUNK,
                                (REVERSE >> s) & 1,
                                EXACT,
                            )
                        do *= zs[i] * sig
                    dC = _sum(h * do[None, :], axis=1)
                    _store_step(dC_ptr + part, G * n, dC, chunk, i, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                    h = before[i]
                    dh += do[None, :] * C[:, None]
                    dB = _sum(dh * (sizes[i] * us[i])[None, :], axis=1)
                    _store_step(dB_ptr + part, G * n, dB, chunk, i, l, mask_n, CHUNK, (REVERSE >> s) & 1, EXACT)
                    dinput = _sum(dh * B[:, None], axis=0)  # gradient of size u
                    dh *= tl.exp2(sizes[i][None, :] * A)
                    dexponent = dh * h  # gradient of size A
                    ddelta = _sum(dexponent * A, axis=0) * LN2 + dinput * us[i]
                    dA += dexponent * sizes[i][None, :]
                    du = dinput * sizes[i]
                    if D is not None:
                        du += do * D
                        dD += do * us[i]
                    if SOFTPLUS:
                        ddelta *= slopes[i]
                    if bias is not None:
                        dbias += ddelta if EXACT else tl.where(chunk * CHUNK + i < l, ddelta, 0.0)
                    du_s = du_ptr + s * du_st[0] + batch * du_st[1] + c
                    _store_step(du_s, du_l, du, chunk, i, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
                    ddelta_s = ddelta_ptr + s * ddelta_st[0] + batch * ddelta_st[1] + c
                    _store_step(ddelta_s, ddelta_l, ddelta, chunk, i, l, mask_c, CHUNK, (REVERSE >> s) & 1, EXACT)
        tl.store(dA_ptr + ((batch * S + s) * d + c[None, :]) * n + j[:, None], dA, mask=mask_h)
        if D_ptr is not None:
            tl.store(dD_ptr + (batch * S + s) * d + c, dD, mask=mask_c)
        if bias_ptr is not None:
            tl.store(dbias_ptr + (batch * S + s) * d + c, dbias, mask=mask_c)
        tl.debug_barrier()


@triton.jit
def _sum_tiles(partial_ptr, out_ptr, size, b, l, g, n, out_st, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """partial (tiles, s, b, l, g, n) summed over the tiles, one after the other, into (s, b, l, g, n)."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for tile in range(0, TILES):
        total += tl.load(partial_ptr + tl.cast(tile, tl.int64) * size + at, mask=mask, other=0.0)
    j, row = at % n, at // n
    group, row = row % g, row // g
    t, row = row % l, row // l
    out = row // b * out_st[0] + row % b * out_st[1] + t * out_st[2] + group * out_st[3] + j * out_st[4]
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=mask)


def _chunks(l: int, n: int) -> tuple[int, int]:
    """Steps of a chunk and chunks of a segment, 1 or an even number, such that the sum of steps (the idle ones after
    the last included) and chunks is least."""
    found = []
    for c in range(1, CHUNK + 1):
        chunks = triton.cdiv(l, c)
        fewest = min(math.ceil(STORE * n / c), MOST, chunks)
        for every in range(fewest + fewest % 2, MOST + 1, 2) if chunks > 1 else (1,):
            found.append((triton.cdiv(chunks, every) * every * (c + 1), c, every))
    return min(found)[1:]


def _tile(l: int, d: int, g: int, n: int) -> tuple[int, int, int, int]:
    """States and channels of a program's tile, both powers of 2; the steps of a chunk, and the chunks of a segment."""
    N = triton.next_power_of_2(n)
    BD = min(triton.next_power_of_2(d // g), max(TILE // N, 1), WIDEST)
    return N, BD, *_chunks(l, n)


def states_shape(s: int, b: int, l: int, d: int, g: int, n: int) -> tuple[int, ...]:
    """Return the shape of the states before each segment except the first."""
    _, _, chunk, every = _tile(l, d, g, n)
    return max(triton.cdiv(l, chunk * every), 1) - 1, s, b, d, n


def _launch(u, delta, A, B, C, z, softplus: bool, reverse: tuple[bool, ...]) -> tuple[int, dict]:
    """Tiles of channels in a group, and the strides and constants that both passes take."""
    (s, _, l, d), g, n = u.shape, B.shape[3], A.shape[2]
    N, BD, chunk, every = _tile(l, d, g, n)
    strides = {
        "u_st": u.stride()[:2], "delta_st": delta.stride()[:2], "z_b": 0 if z is None else z.stride(0),
        "B_st": (*B.stride()[:2], *B.stride()[3:]), "C_st": (*C.stride()[:2], *C.stride()[3:]),
        "u_l": u.stride(2), "delta_l": delta.stride(2), "z_l": 0 if z is None else z.stride(1),
        "B_l": B.stride(2), "C_l": C.stride(2),
    }  # fmt: skip
    constants = {"S": s, "REVERSE": _bits(reverse), "SOFTPLUS": softplus}
    constants |= {"l": l, "d": d, "n": n, "G": g, "N": N, "BD": BD, "CHUNK": chunk, "EVERY": every, "num_warps": 1}
    return triton.cdiv(d // g, BD), strides | constants


@_on_its_device
def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    reverse: tuple[bool, ...],
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = scale silu(z) (o_1 + ... + o_s) of s scans: h_t = e^(dl_t A) h_{t-1} + dl_t u_t B_t, o_t = C_t . h_t + D u_t.

    Args:
        u, delta: (s, b, l, d), dtype T, stride 1 on d. The step size dl is delta + bias, softplus of it where set.
        A: (s, d, n). B, C: (s, b, l, g, n), dtype T. D, bias: (s, d). z: (b, l, d), dtype T, stride 1 on d.
        reverse: s flags: scan from the last step to the first.
        keep: store what `scan_backward` needs. A, D and bias are float32 and contiguous.

    Returns:
        y (b, l, d), contiguous, dtype T; the state after the last step scanned (s, b, n, d), float32; the states
        between the segments (segments - 1, s, b, d, n), float32, empty without ``keep``.
    """
    (s, b, l, d), n = u.shape, A.shape[2]
    y = u.new_empty(b, l, d)
    last = A.new_zeros(s, b, n, d)
    states = A.new_empty(states_shape(s, b, l, d, B.shape[3], n) if keep else 0)
    if y.numel() == 0:
        return y, last, states
    tiles, shared = _launch(u, delta, A, B, C, z, softplus, reverse)
    if shared["EVERY"] > 1:  # the forward pass has registers to spare
        shared |= {"CHUNK": 2 * shared["CHUNK"], "EVERY": shared["EVERY"] // 2}
    total = None if s == 1 else y if y.dtype == torch.float32 else A.new_empty(b, l, d)
    _scan_forward[(b * B.shape[3] * tiles,)](
        u, delta, A, B, C, D, z, bias, y, total, last, states if keep else None, b, float(scale), **shared
    )
    return y, last, states


@_on_its_device
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
    softplus: bool,
    reverse: tuple[bool, ...],
    scale: float,
    states: Tensor,
    du: Tensor,
    ddelta: Tensor,
    dB: Tensor,
    dC: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `scan_forward`, whose arguments these are, from those of y and of the last state (or None).

    Writes du, ddelta (s, b, l, d; stride 1 on d), dB, dC (s, b, l, g, n) and dz (b, l, d; stride 1 on d), all of dtype
    T. Returns dA (s, d, n), dD and dbias (s, d; None where D or bias is), float32.
    """
    (s, b, l, d), g, n = u.shape, B.shape[3], A.shape[2]
    if dy.numel() == 0:
        return tuple(None if x is None else torch.zeros_like(x) for x in (A, D, bias))
    tiles, shared = _launch(u, delta, A, B, C, z, softplus, reverse)
    dB_parts, dC_parts = (A.new_empty(tiles, s, b, l, g, n) for _ in range(2))
    dA = A.new_empty(b, s, d, n)
    dD, dbias = (None if x is None else A.new_empty(b, s, d) for x in (D, bias))
    total = A.new_empty(b, l, d) if s > 1 and z is not None else None
    starts = A.new_empty(shared["EVERY"], b, d, n)
    if dlast is not None:
        dlast = dlast.transpose(
            2, 3
        ).contiguous()  # (s, b, d, n), as A lies, so that both have one layout in the kernel
    _scan_backward[(b * g * tiles,)](
        dy, dlast, u, delta, A, B, C, D, z, bias, states, starts, total,
        du, ddelta, dB_parts, dC_parts, dz, dA, dD, dbias, b, float(scale),
        du_st=du.stride()[:2], ddelta_st=ddelta.stride()[:2], dz_b=0 if z is None else dz.stride(0),
        du_l=du.stride(2), ddelta_l=ddelta.stride(2), dz_l=0 if z is None else dz.stride(1), **shared,
    )  # fmt: skip
    size = dB.numel()
    for parts, out in ((dB_parts, dB), (dC_parts, dC)):
        _sum_tiles[(triton.cdiv(size, SUM_BLOCK),)](
            parts, out, size, b, l, g, n, out.stride(), TILES=tiles, BLOCK=SUM_BLOCK
        )
    return dA.sum(0), None if D is None else dD.sum(0), None if bias is None else dbias.sum(0)
