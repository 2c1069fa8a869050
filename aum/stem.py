"""Optional layers before the patches: a norm against recording devices, and a few convolutions.

The published AuM has neither. docs/aum_nano.md tells what they gain in a small one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from aum.init import init_stem

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


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Return a convolution without bias, BatchNorm and, by default, ReLU."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    init_stem(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))
