"""`Mamba` in place of mamba_ssm's class of that name and of Vim's and AuM's versions of it: code that uses them changes
its import, ``from mamba_ssm.modules.mamba_simple import Mamba``, to ``from aum.compat import Mamba``.

Sources: Mamba (arXiv:2312.00752, state-spaces/mamba), Vim (arXiv:2401.09417, hustvl/Vim), AuM (arXiv:2406.03344,
kaistmm/Audio-Mamba-AuM).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from aum.init import DT_FLOOR, DT_MAX, DT_MIN, init_dt_proj
from aum.mamba import BiMamba

DIRECTIONS = {"none": "fo_fo", "v1": "fo_bi", "v2": "bi_bi"}  # bimamba_type -> direction


class Mamba(BiMamba):
    """`aum.BiMamba` with the published arguments, state dict, initial values and outputs: (b, l, d_model) -> the same.

    - The first 16 arguments are mamba_ssm's. Vim adds ``bimamba_type``, ``if_divide_out`` (AuM: ``if_devide_out``) and
      ``init_layer_scale``, with these defaults. Vim and AuM themselves ask for "v2", divided.
    - ``if_divide_out``: with "v2", half the sum of both directions; otherwise the sum.
    - ``use_fast_path`` makes no difference: the backend is chosen as everywhere in `aum.scan`.
    - The gradient of z with "v1" is the true one; that of the published kernels is not.
    - The step sizes of the backward branch start as published, not as `aum.BiMamba`'s: ``dt_proj_b`` is a plain linear
      layer, whose bias the published models then set to 0.

    Raises:
        ValueError: an argument has no meaning here, or (``use_fast_path=False`` with "v1" or "v2") makes the published
            class leave out the backward direction.
        NotImplementedError: ``inference_params`` or `allocate_inference_cache`: no state is kept between calls.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = DT_MIN,
        dt_max: float = DT_MAX,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = DT_FLOOR,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: Literal["none", "v1", "v2"] = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        *,
        if_devide_out: bool = False,
    ):
        if bimamba_type not in DIRECTIONS:
            raise ValueError(f"bimamba_type is none, v1 or v2; got {bimamba_type!r}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is random or constant; got {dt_init!r}")
        if not use_fast_path and bimamba_type != "none":
            why = f"makes the published class leave out the backward direction of bimamba_type {bimamba_type!r}"
            raise ValueError(f"use_fast_path=False {why}: leave it True, or give bimamba_type 'none'")
        rank = None if dt_rank == "auto" else dt_rank
        super().__init__(d_model, d_state, d_conv, expand, DIRECTIONS[bimamba_type], dt_rank=rank)
        self.expand, self.layer_idx, self.bimamba_type = expand, layer_idx, bimamba_type
        self._is_sum = bimamba_type == "v2" and not (if_divide_out or if_devide_out)
        init_dt_proj(self.dt_proj, dt_min, dt_max, dt_init_floor, dt_scale, constant=dt_init == "constant")
        convolutions = [self.conv1d]
        if bimamba_type == "v2":
            self.dt_proj_b.reset_parameters()
            convolutions.append(self.conv1d_b)
        if bias:
            self.in_proj, self.out_proj = nn.Linear(d_model, 2 * self.d_inner), nn.Linear(self.d_inner, d_model)
        if not conv_bias:
            for conv1d in convolutions:
                conv1d.bias = None
        self.gamma = None if init_layer_scale is None else nn.Parameter(torch.full((d_model,), float(init_layer_scale)))
        self.to(device)
        for module in self.children():  # A, D and gamma stay in float32
            module.to(dtype)
        # The marks that published training code looks for.
        self.dt_proj.bias._no_reinit = True
        for name in ("A_log", "D", "A_b_log", "D_b"):
            if hasattr(self, name):
                getattr(self, name)._no_weight_decay = True

    def forward(self, hidden_states: Tensor, inference_params: None = None, *, lengths: Tensor | None = None) -> Tensor:
        """``lengths`` as in `BiMamba.forward`; with ``bias``, the padding's outputs are that of out_proj."""
        if inference_params is not None:
            raise NotImplementedError(_NO_STATE.format("inference_params"))
        y = super().forward(hidden_states, lengths)
        if self._is_sum:  # BiMamba's half of it, doubled without its bias
            y = 2 * y if self.out_proj.bias is None else 2 * y - self.out_proj.bias.to(y.dtype)
        return y if self.gamma is None else y * self.gamma

    def allocate_inference_cache(self, *args, **kwargs):
        raise NotImplementedError(_NO_STATE.format("allocate_inference_cache"))


_NO_STATE = (
    "{}: aum.compat.Mamba keeps no state between calls. Give it whole sequences, with inference_params=None; to "
    "generate token by token, use mamba_ssm's own class"
)
