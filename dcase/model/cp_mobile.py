"""CP-Mobile, the baseline of DCASE2025 Task 1, for comparisons with Audio Mamba under the same conditions.

log-mel (b, 1, n_mels, frames) -> logits (b, n_classes).

| part | layers | output for a log-mel of 256 x 65 |
|---|---|---|
| ``in_c`` | two 3 x 3 convolutions of stride 2 | 32 channels of 64 x 17 |
| ``stages.s1`` | inverted-residual blocks b1, b2, b3; b3 halves the frames | 32 of 64 x 9 |
| ``stages.s2`` | b4, b5; b4 halves the mel bins | 56 of 32 x 9 |
| ``stages.s3`` | b6 | 104 of 32 x 9 |
| ``feed_forward`` | 1 x 1 convolution to the classes, BatchNorm, the mean over mel bins and frames | 10 logits |

61,148 parameters (122,296 B in 16 bit, and 5,416 of BatchNorm's statistics) and 29,419,156 MACs.

Source: Schmid et al., "Distilling the knowledge of transformers and CNNs with CP-Mobile", DCASE Workshop 2023, in the
simpler form of the 2024 and 2025 baselines (github.com/CPJKU/dcase2025_task1_baseline): ReLU everywhere and no global
response normalisation. Written from that description. The layers have the baseline's names, so that its state
dicts load. The shape is fixed, because the published figures belong to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stride = tuple[int, int]  # along mel bins and frames

STEM = (8, 32)  # channels after each convolution
STAGES = {  # stage -> block -> (channels in, inside, out, stride)
    "s1": {"b1": (32, 64, 32, (1, 1)), "b2": (32, 64, 32, (1, 1)), "b3": (32, 64, 32, (1, 2))},
    "s2": {"b4": (32, 64, 56, (2, 1)), "b5": (56, 120, 56, (1, 1))},
    "s3": {"b6": (56, 120, 104, (1, 1))},
}


class CPMobile(nn.Module):
    """CP-Mobile as DCASE2025 Task 1's baseline configures it. Any number of mel bins and frames goes in."""

    def __init__(self, n_classes: int = 10):
        super().__init__()
        first, second = STEM
        self.in_c = nn.Sequential(_conv(1, first, 3, (2, 2)), _conv(first, second, 3, (2, 2)))
        self.stages = nn.Sequential()
        for name, blocks in STAGES.items():
            stage = nn.Sequential()
            for block, (c_in, width, c_out, stride) in blocks.items():
                stage.add_module(block, Block(c_in, width, c_out, stride))
            self.stages.add_module(name, stage)
        self.feed_forward = _conv(c_out, n_classes, relu=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # for the ReLU after it: He et al., arXiv:1502.01852
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # a third off a training step on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> logits (b, n_classes)."""
        return self.feed_forward(self.stages(self.in_c(x))).mean((2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """Log-mel (b, 1, n_mels, frames) -> (b, 104): the last stage's mean over mel bins and frames."""
        return self.stages(self.in_c(x)).mean((2, 3))

    def forward_head(self, features: Tensor) -> Tensor:
        """Features (b, 104) -> logits (b, n_classes); in evaluation, those of `forward`."""
        return self.feed_forward(features[:, :, None, None]).flatten(1)


class Block(nn.Module):
    """Inverted residual: (b, c_in, m, t) -> (b, c_out, m / stride, t / stride), rounded up, with ReLU last.

    1 x 1 to ``width`` channels, 3 x 3 in each of them, 1 x 1 to ``c_out``. The shortcut is the input; with a stride,
    its 3 x 3 averages, in which the zeros around the edge count; where the number of channels changes, there is none.
    """

    def __init__(self, c_in: int, width: int, c_out: int, stride: Stride):
        super().__init__()
        depthwise = _conv(width, width, 3, stride, groups=width)
        self.block = nn.Sequential(_conv(c_in, width), depthwise, _conv(width, c_out, relu=False))
        self.has_shortcut = c_in == c_out
        if self.has_shortcut:
            self.shortcut = nn.Identity() if stride == (1, 1) else nn.AvgPool2d(3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return F.relu(y + self.shortcut(x) if self.has_shortcut else y)


def _conv(
    c_in: int, c_out: int, kernel: int = 1, stride: Stride = (1, 1), groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Return a convolution without bias, BatchNorm and, by default, ReLU."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))
