"""What may stand before the patches: a norm against recording devices, and a few convolutions.

Neither is in the published AuM. docs/aum_nano.md has what they give a small one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum.init import init_stem

EXPANSION = 2  # of an inverted residual's depthwise channels over its own


class RelaxedFreqNorm(nn.Module):
    """A log-mel (b, 1, n_mels, frames), partly normalised by mel bin: share * IFN(x) + (1 - share) * LN(x).

    What a recording device does to a mel bin is the same in every frame, so that IFN, which gives each mel bin of each
    clip mean 0 and deviation 1 over its frames, takes it away; with it goes the clip's own spectrum, which LN, the same
    over the whole clip, leaves. Source: relaxed instance frequency-wise normalization, arXiv:2206.12513.
    """

    def __init__(self, n_mels: int, share: float):
        super().__init__()
        self.share = share
        self.by_mel = nn.InstanceNorm1d(n_mels)
        self.whole = nn.GroupNorm(1, 1, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.by_mel(x[:, 0])[:, None] + (1 - self.share) * self.whole(x)


class Stem(nn.Sequential):
    """Log-mel (b, 1, n_mels, frames) -> (b, channels[-1], n_mels / 2^k, frames / 2^k), rounded up.

    k convolutions, each 3 x 3 with stride 2, BatchNorm and ReLU; then ``blocks`` inverted residuals. Small Audio Mambas
    learn slowly what edges, tones and onsets are; convolutions see it sooner. Source: early convolutions,
    arXiv:2106.14881.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int):
        before = (1, *channels)
        convolutions = [_conv(*pair, 3, stride=2) for pair in zip(before, channels, strict=False)]
        super().__init__(*convolutions, *(InvertedResidual(channels[-1]) for _ in range(blocks)))
        self.to(memory_format=torch.channels_last)  # a tenth off AuM-Nano's training step on a CPU


class InvertedResidual(nn.Module):
    """(b, c, h, w) -> the same: 1 x 1 to more channels, 3 x 3 in each of them, 1 x 1 back, added to the input; ReLU.

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
    """Convolution without bias, BatchNorm and, unless told otherwise, ReLU."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    init_stem(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))
