"""Convolutions over a grid (b, rows, columns, channels) of float32 on a CPU, by grid_kernels.c.

Each is one operation together with what lies beside it in a small network: before the convolution the norm and ReLU of
its input, after it the sums that the norm of its output needs. So activations are read and written once, where separate
operations read and write them four times. A norm is a scale and a shift of each channel, an *affine* (2, c). Autograd
follows it from the sums, so that its backward is a BatchNorm's.
"""

import torch
from torch import Tensor

from aum.scan.backends import choose
from aum.scan.build import call, fill, library, padded, structure
from aum.scan.cpu_kernels import UNITS
from aum.scan.flops import register_flop_formula

MOST_ROWS = 16  # of a kernel: MAX_ROWS of products.h

# As the structs of the same names in grid_kernels.c
_Grid = structure(
    "Grid",
    "i:b i:h i:w i:c i:o i:kh i:kw i:sh i:sw i:ph i:pw i:h_out i:w_out i:depthwise i:relu i:pieces i:threads "
    "i:x_b i:x_h i:x_w i:c_pad i:o_pad p:x p:scale p:shift p:weight p:turned p:bias p:y p:sums p:dy p:dsum p:dsquare "
    "p:dx p:dweight p:dbias p:daffine",
)
_Sum = structure(
    "Sum",
    "i:n i:c i:relu i:pieces i:threads p:x p:x_scale p:x_shift p:y p:scale p:shift p:out p:dout p:dx p:dy "
    "p:dx_affine p:dy_affine",
)


def fits(x: Tensor) -> bool:
    """Return whether these operations can take the place of PyTorch's for an input."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and choose("cpu", torch.float32) == "cpu"


def _whole(n: int) -> int:
    """Return n rounded up to whole vectors."""
    return n + -n % library().aum_vector_lanes()


def _packed(weight: Tensor, depthwise: bool) -> Tensor:
    """(o, c, kh, kw) -> (kh, kw c, o) in whole vectors; depthwise, (c, 1, kh, kw) -> (kh, kw, c)."""
    if depthwise:
        return padded(weight.squeeze(1).permute(1, 2, 0))
    return padded(weight.permute(2, 3, 1, 0).flatten(1, 2))


def _turned(weight: Tensor, depthwise: bool) -> Tensor:
    """Return the weight that leads from outputs to inputs: (kh, o, kw c); depthwise, (kh, kw, c) turned around."""
    return _packed(weight.flip(2, 3), True) if depthwise else padded(weight.permute(2, 0, 3, 1).flatten(2))


def _unpacked(packed: Tensor, weight: Tensor, depthwise: bool) -> Tensor:
    """Return a gradient in the weight's layout."""
    o, c, kh, kw = weight.shape
    x = packed[..., :o]
    return x.permute(2, 0, 1)[:, None] if depthwise else x.view(kh, kw, c, o).permute(3, 2, 0, 1)


def _size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> tuple[int, int, int, int]:
    """Return the output's shape (b, rows, columns, o)."""
    shape = zip(x.shape[1:3], weight.shape[2:], stride, padding, strict=True)
    return len(x), *((size + 2 * p - k) // s + 1 for size, k, s, p in shape), len(weight)


def _long_rows(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> int:
    """Return how many rows can count as one: the kernels calculate long rows faster, and 1 x 1 sees no neighbours."""
    alone = weight.shape[2:] == (1, 1) and stride == [1, 1] and padding == [0, 0] and x.is_contiguous()
    return next((n for n in (4, 2) if alone and x.shape[1] % n == 0 and x.shape[2] * n <= 80), 1)


def _arguments(x, affine, relu, weight, stride, padding, depthwise, packed, **buffers):
    (b, h, w, c), (o, _, kh, kw), (_, h_out, w_out, _) = x.shape, weight.shape, _size(x, weight, stride, padding)
    scale, shift = (None, None) if affine is None else affine.contiguous()
    rows = _long_rows(x, weight, stride, padding)
    h, w, h_out, w_out = h // rows, w * rows, h_out // rows, w_out * rows
    return fill(
        _Grid,
        **dict(b=b, h=h, w=w, c=c, o=o, kh=kh, kw=kw, sh=stride[0], sw=stride[1], ph=padding[0], pw=padding[1]),
        **dict(h_out=h_out, w_out=w_out, depthwise=depthwise, relu=relu, pieces=min(b, UNITS)),
        **dict(threads=torch.get_num_threads(), x_b=x.stride(0), x_h=x.stride(1) * rows, x_w=x.stride(2)),
        **dict(c_pad=_whole(c if depthwise else kw * c), o_pad=packed.shape[-1]),
        **dict(x=x, scale=scale, shift=shift, weight=packed),
        **buffers,
    )


def _is_depthwise(x, affine, relu, weight, bias, stride, padding) -> bool:
    """Return whether the weight is depthwise. Raise ValueError for what the kernels cannot compute."""
    (o, c, kh, kw), channels = weight.shape, x.shape[3]
    for name, tensor in dict(x=x, affine=affine, weight=weight, bias=bias).items():
        if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype != torch.float32):
            raise ValueError(f"{name} is a float32 tensor on the CPU; got {tensor.dtype} on {tensor.device}")
    same = stride == [1, 1] and [kh, kw] == [2 * padding[0] + 1, 2 * padding[1] + 1]
    depthwise = c == 1 < channels
    if kh > MOST_ROWS or (depthwise and not (o == channels and same)) or (not depthwise and c != channels):
        raise ValueError(f"no kernel for a weight {tuple(weight.shape)}, {channels} channels, {stride=}, {padding=}")
    if (x.stride(3) != 1 and channels > 1) or (relu and affine is None):
        raise ValueError("x is contiguous in its channels, and relu needs an affine")
    return depthwise


@torch.library.custom_op("aum::convolution", mutates_args=())
def convolution(
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """x (b, h, w, c), c contiguous; its affine (2, c) and, with ``relu``, a ReLU after that -> y (b, h, w, o), and with
    ``sums`` the sums over b, h and w of y and y^2, (2, o) in float64.

    weight (o, c, kh, kw), or (c, 1, kh, kw): depthwise, of stride 1 and with an odd kernel padded to the same size. A
    kernel has at most `MOST_ROWS` rows.
    """
    depthwise = _is_depthwise(x, affine, relu, weight, bias, stride, padding)
    y = x.new_empty(_size(x, weight, stride, padding))
    partial = x.new_empty(min(len(x), UNITS), 2, len(weight)) if sums else None
    if y.numel():
        packed = _packed(weight, depthwise)
        arguments = (x, affine, relu, weight, stride, padding, depthwise, packed)
        call("aum_grid", _arguments(*arguments, bias=bias, y=y, sums=partial), backward=False)
    return y, partial.double().sum(0) if sums else x.new_empty(0, dtype=torch.float64)


@convolution.register_fake
def _(x, affine, relu, weight, bias, stride, padding, sums):
    total = (2, len(weight)) if sums else 0
    return x.new_empty(_size(x, weight, stride, padding)), x.new_empty(total, dtype=torch.float64)


@torch.library.custom_op("aum::convolution_backward", mutates_args=())
def convolution_backward(
    dy: Tensor,
    dsums: Tensor | None,
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    y: Tensor,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty where not ``of_x``), affine (empty where there is none), weight and bias."""
    depthwise = weight.shape[1] == 1 < x.shape[3]
    packed, turned = _packed(weight, depthwise), _turned(weight, depthwise)
    pieces, (o, c) = min(len(x), UNITS), (len(weight), x.shape[3])
    dx = x.new_empty(x.shape if of_x else 0)
    dweight, dbias = packed.new_zeros(pieces, *packed.shape), x.new_zeros(pieces, o)
    daffine = x.new_zeros(pieces, 2, c)
    if dy.numel():
        dsum, dsquare = (None, None) if dsums is None else dsums.float().contiguous()
        gradients = dict(dx=dx if of_x else None, dweight=dweight, dbias=dbias, daffine=daffine)
        arguments = (x, affine, relu, weight, stride, padding, depthwise, packed)
        call(
            "aum_grid",
            _arguments(*arguments, turned=turned, y=y, dy=dy, dsum=dsum, dsquare=dsquare, **gradients),
            backward=True,
        )
    dweight = _unpacked(dweight.sum(0), weight, depthwise).contiguous()
    return dx, x.new_empty(0) if affine is None else daffine.sum(0), dweight, dbias.sum(0)


@convolution_backward.register_fake
def _(dy, dsums, x, affine, relu, weight, stride, padding, y, of_x):
    daffine = x.new_empty(0 if affine is None else affine.shape)
    return x.new_empty(x.shape if of_x else 0), daffine, torch.empty_like(weight), x.new_empty(len(weight))


def _keep(ctx, inputs, output):
    x, affine, ctx.relu, weight, bias, ctx.stride, ctx.padding, ctx.sums = inputs
    ctx.set_materialize_grads(False)
    if not ctx.sums:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, affine, weight, output[0])
    ctx.has_bias = bias is not None


def _backward(ctx, dy, dsums):
    x, affine, weight, y = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    of_x = any(ctx.needs_input_grad[:2])  # the affine's gradient is made of what would be x's
    options = ctx.relu, weight, ctx.stride, ctx.padding, y, of_x
    dx, daffine, dweight, dbias = convolution_backward(dy, dsums if ctx.sums else None, x, affine, *options)
    dx, daffine = dx if ctx.needs_input_grad[0] else None, None if affine is None else daffine
    return dx, daffine, None, dweight, dbias if ctx.has_bias else None, None, None, None


convolution.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.aum.convolution)
def _(x, affine, relu, weight, *_, out_shape, **__) -> int:
    (b, h, w, o), (_, c, kh, kw) = out_shape[0], weight
    return 2 * b * h * w * o * c * kh * kw


@register_flop_formula(torch.ops.aum.convolution_backward)
def _(dy, dsums, x, affine, relu, weight, *_, out_shape=None, **__) -> int:
    (b, h, w, o), (_, c, kh, kw) = dy, weight
    return 4 * b * h * w * o * c * kh * kw


# ---- the end of a residual -------------------------------------------------------------------------------------------


def _sum_arguments(x, x_affine, relu, y, affine, out, **gradients):
    x_scale, x_shift = (None, None) if x_affine is None else x_affine
    n, pieces = x[..., 0].numel(), min(len(x), UNITS)
    return fill(
        _Sum,
        **dict(n=n, c=x.shape[-1], relu=relu, pieces=pieces, threads=torch.get_num_threads()),
        **dict(x=x, x_scale=x_scale, x_shift=x_shift, y=y, scale=affine[0], shift=affine[1], out=out),
        **gradients,
    )


@torch.library.custom_op("aum::relu_sum", mutates_args=())
def relu_sum(x: Tensor, x_affine: Tensor | None, relu: bool, y: Tensor, affine: Tensor) -> Tensor:
    """Return ReLU of x, with its affine and ``relu``, plus y, with its affine: contiguous (b, h, w, c) each."""
    out = torch.empty_like(x)
    if x.numel():
        call("aum_sum", _sum_arguments(x, x_affine, relu, y, affine, out), backward=False)
    return out


@relu_sum.register_fake
def _(x, x_affine, relu, y, affine):
    return torch.empty_like(x)


@torch.library.custom_op("aum::relu_sum_backward", mutates_args=())
def relu_sum_backward(
    dout: Tensor, x: Tensor, x_affine: Tensor | None, relu: bool, y: Tensor, affine: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x_affine (also where there is none), y and affine."""
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    dx_affine, dy_affine = x.new_zeros(2, min(len(x), UNITS), 2, x.shape[-1])
    if x.numel():
        gradients = dict(dout=dout, dx=dx, dy=dy, dx_affine=dx_affine, dy_affine=dy_affine)
        call("aum_sum", _sum_arguments(x, x_affine, relu, y, affine, out, **gradients), backward=True)
    return dx, dx_affine.sum(0), dy, dy_affine.sum(0)


@relu_sum_backward.register_fake
def _(dout, x, x_affine, relu, y, affine, out):
    return torch.empty_like(x), torch.empty_like(affine), torch.empty_like(y), torch.empty_like(affine)


def _keep_for_sum(ctx, inputs, output):
    x, x_affine, ctx.relu, y, affine = inputs
    ctx.save_for_backward(x, x_affine, y, affine, output)


def _backward_of_sum(ctx, dout):
    x, x_affine, y, affine, out = ctx.saved_tensors
    dx, dx_affine, dy, daffine = relu_sum_backward(dout.contiguous(), x, x_affine, ctx.relu, y, affine, out)
    return dx, None if x_affine is None else dx_affine, None, dy, daffine


relu_sum.register_autograd(_backward_of_sum, setup_context=_keep_for_sum)
