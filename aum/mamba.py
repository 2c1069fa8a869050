"""The mixer and the block of Audio Mamba (arXiv:2406.03344), built on Mamba (arXiv:2312.00752).

Axes: b batch, l tokens, d d_inner = expand * d_model, n d_state, r dt_rank. Parameter names are those of the published
code (kaistmm/Audio-Mamba-AuM, hustvl/Vim), so that its checkpoints load.
"""

import math
import operator
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum.init import a_log, init_dt_proj
from aum.scan import BACKENDS, causal_conv1d, choose, loop_scan, padding_mask, selective_scan_fn
from aum.scan.fused import mixer

Direction = Literal["fo_fo", "fo_bi", "bi_bi"]


def wide(x: Tensor) -> Tensor:
    """Return x in at least float32, for values that must not be rounded to 16 bit."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_plain(module: nn.Module) -> bool:
    """Return whether its parameters can be used without calling it: no subclass, no parametrisation, no hook."""
    return type(module) in (nn.Linear, nn.Conv1d) and not (module._forward_hooks or module._forward_pre_hooks)


class BiMamba(nn.Module):
    """The Mamba mixer in AuM's three directions: (b, l, d_model) -> (b, l, d_model).

    - ``fo_fo``: one causal branch, Mamba's own (AuM's Fo-Fo, ``bimamba_type="none"``).
    - ``fo_bi``: one causal convolution and projection, scanned forward with A and backward with A_b; the sum of both,
      so that the skip D u counts twice (Fo-Bi, "v1"). The published code's gradient of z is wrong here; ours is not.
    - ``bi_bi``: a forward and a backward branch, each with its own convolution, projections, A and D, between shared
      in_proj and out_proj; half the sum of both (Bi-Bi, "v2").

    ``dt_rank`` is d_model / 16, rounded up, unless it is given. Raises ValueError for an unknown direction.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        direction: Direction = "bi_bi",
        *,
        dt_rank: int | None = None,
    ):
        super().__init__()
        if direction not in ("fo_fo", "fo_bi", "bi_bi"):
            raise ValueError(f"direction is fo_fo, fo_bi or bi_bi; got {direction!r}")
        self.d_model, self.d_state, self.d_conv, self.direction = d_model, d_state, d_conv, direction
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self._suffixes = ("", "_b") if direction == "bi_bi" else ("",)  # of the branches' parameters
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        for suffix in self._suffixes:
            self._add_branch(suffix)
        if direction != "fo_fo":
            self.A_b_log = a_log(self.d_inner, d_state)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def _add_branch(self, suffix: str) -> None:
        d, r, n = self.d_inner, self.dt_rank, self.d_state
        conv1d = nn.Conv1d(d, d, self.d_conv, groups=d)
        dt_proj = nn.Linear(r, d)
        init_dt_proj(dt_proj)
        setattr(self, f"conv1d{suffix}", conv1d)
        setattr(self, f"x_proj{suffix}", nn.Linear(d, r + 2 * n, bias=False))
        setattr(self, f"dt_proj{suffix}", dt_proj)
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(d)))
        if not suffix:
            self.A_log = a_log(d, n)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``lengths`` (b,): the steps of each clip of a batch that is padded at the end, with finite values. Each clip
        is then computed as if it were alone, and the padding's outputs are 0. Or the mask of `padding_mask`."""
        padding = padding_mask(lengths, *hidden.shape[:2], hidden.device)
        xz = self.in_proj(hidden)  # (b, l, 2d): x first, the gate z last
        if padding is not None:
            xz = xz.masked_fill(padding.unsqueeze(-1), 0)
        backend = choose(xz.device.type, xz.dtype)
        fused = BACKENDS[backend].fused and all(map(_is_plain, self._inner_modules()))
        y = self._fused(xz, padding, backend) if fused else self._composed(xz, padding, backend)
        return self.out_proj(y)

    def _inner_modules(self) -> Iterator[nn.Module]:
        names = ("conv1d", "x_proj", "dt_proj")
        return (getattr(self, name + suffix) for name in names for suffix in self._suffixes)

    def _fused(self, xz: Tensor, padding: Tensor | None, backend: str) -> Tensor:
        """Compute everything between the outer projections as one operation: (b, l, 2d) -> (b, l, d)."""

        def branches(name: str) -> Tensor:
            return torch.stack([operator.attrgetter(name.format(suffix))(self) for suffix in self._suffixes])

        d = self.d_inner
        A_logs = [self.A_log] if self.direction == "fo_fo" else [self.A_log, self.A_b_log]
        parameters = (
            branches("conv1d{}.weight").squeeze(2),
            branches("conv1d{}.bias") if self.conv1d.bias is not None else self.D.new_zeros(len(self._suffixes), d),
            branches("x_proj{}.weight"),
            branches("dt_proj{}.weight"),
            branches("dt_proj{}.bias"),
            torch.stack(A_logs),
            branches("D{}"),
        )
        if backend == "loop":
            return loop_scan.mixer(xz, *parameters, padding)
        keep = torch.is_grad_enabled() and (xz.requires_grad or any(x.requires_grad for x in parameters))
        return mixer(xz, *parameters, padding, keep, backend)[0]

    def _composed(self, xz: Tensor, padding: Tensor | None, backend: str) -> Tensor:
        """Compute the same step by step, for backends that only scan and for inner modules that are not plain."""
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (b, d, l) each
        if self.direction == "bi_bi":
            y = self._branch(x, z, "", False, padding, backend) + self._branch(x, z, "_b", True, padding, backend)
            y = y / 2
        elif self.direction == "fo_bi":
            inputs = self._scan_inputs(x, "", False, padding, backend)
            y = self._scan(inputs, self.A_log, z, "", reverse=False)
            y = y + self._scan(inputs, self.A_b_log, z, "", reverse=True)
        else:
            y = self._branch(x, z, "", False, padding, backend)
        return y.transpose(1, 2)

    def _branch(self, x, z, suffix: str, reverse: bool, padding: Tensor | None, backend: str) -> Tensor:
        A_log = self.A_b_log if suffix else self.A_log
        return self._scan(self._scan_inputs(x, suffix, reverse, padding, backend), A_log, z, suffix, reverse)

    def _scan_inputs(self, x, suffix: str, reverse: bool, padding: Tensor | None, backend: str) -> tuple[Tensor, ...]:
        """x (b, d, l) -> u (b, d, l), delta (b, d, l) before its bias, B and C (b, n, l)."""
        conv1d, x_proj, dt_proj = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        u = causal_conv1d(x, conv1d.weight.squeeze(1), conv1d.bias, reverse, backend)
        if padding is not None:  # scans from the end start with the clip
            u = u.masked_fill(padding.unsqueeze(1), 0)
        projected = x_proj(u.transpose(1, 2))  # (b, l, r + 2n)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, dt_proj.weight)  # its bias is added in the scan, in float32
        return u, delta.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    def _scan(self, inputs: tuple[Tensor, ...], A_log: Tensor, z: Tensor, suffix: str, reverse: bool) -> Tensor:
        u, delta, B, C = inputs
        return selective_scan_fn(
            u,
            delta,
            -torch.exp(wide(A_log)),
            B,
            C,
            D=wide(getattr(self, f"D{suffix}")),
            z=z,
            delta_bias=wide(getattr(self, f"dt_proj{suffix}").bias),
            delta_softplus=True,
            reverse=reverse,
        )


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drop a clip's whole branch with probability ``p``."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d_model) -> (b, l, d_model)"""
        if not self.training or self.p == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * keep / (1.0 - self.p)


class Block(nn.Module):
    """A layer's addition to the residual stream: drop_path(mixer(norm(x))), (b, l, d_model) -> (b, l, d_model).

    The stream stays float32; the addition promotes the mixer's output.
    """

    def __init__(self, mixer: BiMamba, norm_eps: float, drop_path: float):
        super().__init__()
        self.norm = nn.RMSNorm(mixer.d_model, eps=norm_eps)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        return self.drop_path(self.mixer(x) if lengths is None else self.mixer(x, lengths=lengths))
