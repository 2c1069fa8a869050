"""All initialisation of Audio Mamba, in one place.

| parameter | initial value | source |
|---|---|---|
| ``stem`` convolutions' weight | normal, variance 2 / fan-out (for the ReLU after it) | He et al., arXiv:1502.01852 |
| ``patch_embed.proj.weight``, ``.bias`` | normal, variance 1 / fan-in (LeCun); 0 | Vim, arXiv:2401.09417 |
| ``cls_token``, ``pos_embed.*`` | normal of deviation 0.02, cut at 2 | the same |
| ``norm.weight``, ``norm_f.weight`` | 1 | |
| ``in_proj``, ``x_proj``, ``conv1d`` | uniform within 1 / sqrt(fan-in) (PyTorch's own) | Mamba, arXiv:2312.00752 |
| ``dt_proj.weight`` | uniform within dt_rank^-1/2, so that delta keeps its variance | the same |
| ``dt_proj.bias`` | softplus^-1 of a step size drawn log-uniformly from 0.001 ... 0.1 | the same |
| ``A_log`` | log(1 ... d_state): A is the real part of S4D, A_n = -n | S4D-Real, arXiv:2206.11893 |
| ``D`` | 1 | Mamba |
| ``out_proj.weight`` | PyTorch's own over sqrt(depth): the residual stream does not grow | GPT-2, via Mamba |
| classifier's hidden layer, ``local``, the patch head's linear layer | PyTorch's own | |
| last linear layer of the other heads: weight, bias | normal of deviation 0.02, cut at 2; 0 | Vim |

The parameters of the backward branch (``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``, ``D_b``) start as those
of the forward one do. This differs from the published AuM and Vim in one point: there ``dt_proj_b.bias`` lacks the mark
that protects ``dt_proj.bias``, and a later sweep sets it to zero. The backward branch then starts with steps of
softplus(0) = 0.69, 7 to 690 times longer than the forward branch's 0.001 ... 0.1, and forgets within a few tokens.
The papers do not mention this difference, so here both directions start alike.
"""

import math

import torch
from torch import Tensor, nn

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # step size delta, in tokens
TOKEN_STD = 0.02


def init_stem(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def init_patch_embed(proj: nn.Conv2d) -> None:
    nn.init.normal_(proj.weight, std=proj.weight[0].numel() ** -0.5)
    nn.init.zeros_(proj.bias)


def init_token(token: Tensor) -> None:
    """A class token or position embedding, (1, tokens, d)."""
    nn.init.trunc_normal_(token, std=TOKEN_STD, a=-2.0, b=2.0)


def init_dt_proj(
    dt_proj: nn.Linear,
    dt_min: float = DT_MIN,
    dt_max: float = DT_MAX,
    floor: float = DT_FLOOR,
    scale: float = 1.0,
    constant: bool = False,
) -> None:
    """Weight (d_inner, dt_rank) and bias (d_inner,) of the projection to delta."""
    bound = scale * dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, bound if constant else -bound, bound)
    log_min, log_max = math.log(dt_min), math.log(dt_max)
    delta = torch.exp(torch.rand(dt_proj.out_features) * (log_max - log_min) + log_min).clamp(min=floor)
    with torch.no_grad():
        dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus


def a_log(d_inner: int, d_state: int) -> nn.Parameter:
    """(d_inner, d_state): log of 1 ... d_state in every row."""
    return nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))


def scale_out_proj(out_proj: nn.Linear, depth: int) -> None:
    with torch.no_grad():
        out_proj.weight /= math.sqrt(depth)


def init_last_linear(linear: nn.Linear) -> None:
    init_token(linear.weight)
    nn.init.zeros_(linear.bias)
