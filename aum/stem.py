"""Optional layers before the patches: a norm against recording devices, and a few convolutions.

The published AuM has neither. docs/aum_nano.md tells what they gain in a small one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum.init import init_stem
from aum.scan import grid

EXPANSION = 2  # of an inverted residual's depthwise channels over its own


class RelaxedMeanNorm(nn.Module):
    """Subtract ``share`` of each mel bin's mean over the frames from a log-mel (b, 1, n_mels, frames).

    A recording device adds a constant to each mel bin of the log-mel, the same in every frame. Subtracting the whole
    mean, as cepstral mean normalisation does (Atal, JASA 55(6), 1974), removes the clip's own spectrum too; subtracting
    a part is the compromise of relaxed instance frequency-wise normalization, arXiv:2206.12513. Unlike there, the
    deviations and the clip's level stay.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x - self.share * x.mean(3, keepdim=True)


class Stem(nn.Sequential):
    """Log-mel (b, 1, n_mels, frames) -> (b, channels[-1], n_mels / 2^k, frames / 2^k), rounded up.

    k convolutions, each 3 x 3 with stride 2, BatchNorm and ReLU; then ``blocks`` inverted residuals. Small Audio Mambas
    learn edges, tones and onsets slowly; convolutions learn them sooner. Source: early convolutions,
    arXiv:2106.14881.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int):
        before = (1, *channels)
        convolutions = [_conv(*pair, 3, stride=2) for pair in zip(before, channels, strict=False)]
        super().__init__(*convolutions, *(InvertedResidual(channels[-1]) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        plain = all(map(is_plain, self.modules())) and all(type(x) is nn.Conv2d for x in convolutions)
        if not (plain and grid.fits(x)):
            return super().forward(x)
        x = Normed(x.permute(0, 2, 3, 1))
        for layer in self:
            x = layer.on_grid(x) if isinstance(layer, InvertedResidual) else convolve(x, *layer)
        return x.values().permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """(b, c, h, w) -> (b, c, h, w): 1 x 1 to more channels, depthwise 3 x 3, 1 x 1 back, added to the input; ReLU.

    Source: MobileNetV2, arXiv:1801.04381; the ReLU after the sum is CP-Mobile's.
    """

    def __init__(self, channels: int):
        super().__init__()
        wide = EXPANSION * channels
        self.expand = _conv(channels, wide, 1)
        self.depthwise = _conv(wide, wide, 3, groups=wide)
        self.project = _conv(wide, channels, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.project(self.depthwise(self.expand(x))))

    def on_grid(self, x: "Normed") -> "Normed":
        y = x
        for layer in (self.expand, self.depthwise, self.project):
            y = convolve(y, *layer)
        return Normed(grid.relu_sum(x.x, x.affine, x.relu, y.x, y.affine))


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Return a convolution without bias, BatchNorm and, by default, ReLU."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    init_stem(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))


# ---- the same on the CPU, channel-last and with norms that the next convolution applies ------------------------------


class Normed(NamedTuple):
    """An activation (b, h, w, c) before its norm, a scale and a shift of each channel (2, c), and its ReLU."""

    x: Tensor
    affine: Tensor | None = None
    relu: bool = False

    def values(self) -> Tensor:
        x = self.x if self.affine is None else torch.addcmul(self.affine[1], self.x, self.affine[0])
        return F.relu(x) if self.relu else x


def is_plain(module: nn.Module) -> bool:
    """Return whether `convolve` computes what a module would: it is of its kind, nothing is hooked in, and it has no
    option that the kernels lack."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return False
    if isinstance(module, nn.Conv2d):
        plain = module.padding_mode == "zeros" and module.dilation == (1, 1) and isinstance(module.padding, tuple)
        return plain and module.kernel_size[0] <= grid.MOST_ROWS and module.groups in (1, module.out_channels)
    if isinstance(module, nn.BatchNorm2d):
        plain = module.affine and module.track_running_stats and module.momentum is not None
        return plain and type(module) is nn.BatchNorm2d
    return type(module) in (nn.ReLU, nn.Sequential, Stem, InvertedResidual)


def convolve(x: Normed, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, relu: nn.ReLU | None = None) -> Normed:
    """Return a convolution's output with its norm and ReLU to be applied. It has no second derivative."""
    train = norm is not None and norm.training
    if x.x.stride(3) != 1 and x.x.shape[3] > 1:
        x = x._replace(x=x.x.contiguous())
    y, sums = grid.convolution(*x, conv.weight, conv.bias, list(conv.stride), list(conv.padding), train)
    if norm is None:
        return Normed(y)
    mean, var = norm.running_mean, norm.running_var
    if train:
        n = y[..., 0].numel()
        if n < 2:
            raise ValueError(f"a BatchNorm needs more than one value per channel in training; got {tuple(y.shape)}")
        mean, square = sums / n
        var = (square - mean * mean).clamp(min=0)
        with torch.no_grad():
            norm.running_mean.lerp_(mean.float(), norm.momentum)
            norm.running_var.lerp_((var * (n / (n - 1))).float(), norm.momentum)
            norm.num_batches_tracked += 1
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return Normed(y, torch.stack([scale, norm.bias - mean * scale]).float(), relu is not None)
