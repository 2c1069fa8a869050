"""Train a control in place of Audio Mamba: what a part of it is worth shows in what is lost without it.

    python benchmarks/controls.py --model aum_nano_conv --dataset_dir DIR      # the flags are train_base.py's

- ``aum_nano_conv``: `aum_nano` without a scan. Its mixers are gated convolutions over the same rows of tokens, with as
  many bytes and 6 % fewer MACs.
- ``aum_nano_fine_conv``: the same for log-mels of 128 x 129, where a row has 33 tokens.
- ``cp_mobile_norm``: CP-Mobile after `aum_nano`'s norm of the input, half of each mel bin's mean over time subtracted.

The models exist only here: a run of them can be trained, tested and compared, not exported or fine-tuned.
"""

import sys
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aum
import train_base
from aum.init import scale_out_proj
from aum.stem import RelaxedMeanNorm
from dcase import errors
from dcase.model.cp_mobile import CPMobile
from dcase.model.named import FIXED

D_INNER, TAPS = 104, 17  # of the gated convolutions: with both aum_nano's bytes; a row has 17 tokens


class GatedConvolutions(nn.Module):
    """Two depthwise convolutions along time, gated as Mamba's mixer is: (b, l, d_model) -> (b, l, d_model).

    Two of 17 taps reach 16 tokens either way, so that every token of a row of 17 sees the whole row.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * D_INNER, bias=False)
        self.first, self.second = (nn.Conv1d(D_INNER, D_INNER, TAPS, padding="same", groups=D_INNER) for _ in range(2))
        self.out_proj = nn.Linear(D_INNER, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)  # (b, d_inner, l) each
        y = self.second(F.silu(self.first(x))) * F.silu(z)
        return self.out_proj(y.transpose(1, 2))


def without_scan(n_classes: int, **shape: int) -> aum.AudioMamba:
    """Return `aum_nano`, for log-mels of 256 x 65 or another ``shape``, with `GatedConvolutions` for mixers."""
    model = aum.create_model("aum_nano", n_classes=n_classes, **shape)
    for block in model.layers:
        block.mixer = GatedConvolutions(model.config.embed_dim)
        scale_out_proj(block.mixer.out_proj, model.config.depth)
    return model


def with_input_norm(n_classes: int) -> nn.Module:
    """Return CP-Mobile after `aum_nano`'s norm of the input."""
    return nn.Sequential(RelaxedMeanNorm(aum.create_config("aum_nano").freq_norm), CPMobile(n_classes))


if __name__ == "__main__":
    fine = partial(without_scan, n_mels=128, target_length=129)
    FIXED.update(aum_nano_conv=without_scan, aum_nano_fine_conv=fine, cp_mobile_norm=with_input_norm)
    errors.run(train_base.main)
