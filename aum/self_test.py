"""Check before hours of training that the chosen scan agrees with the reference on this machine."""

import copy

import torch
from torch import Tensor, nn

from aum.mamba import BiMamba
from aum.model import AuMConfig
from aum.scan import choose, is_forced, pass_over, use_backend
from aum.stem import Stem

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}  # far above rounding, far below a mistake
CLIPS = 16  # Triton compiles another kernel for multiples of 16, which batches usually are
COMPARED = 2  # of them: only these reach the gradients
LONGEST = 65  # tokens, where no kernel is compiled for a length: the reference takes seconds for long ones


class SelfTestFailed(Exception):
    """The chosen backend fails or calculates wrongly; the message names it."""


def tested_backend(device: torch.device | str, dtype: torch.dtype, config: AuMConfig) -> str:
    """Return the fastest backend that passes `self_test` at a model's sizes. From then on `aum.scan.choose` passes over
    those that failed for this type of device and dtype, and says so once.

    Raises `SelfTestFailed` for a backend that was asked for by name, and where no other is left; ValueError as
    `self_test`.
    """
    while True:
        try:
            return self_test(device, dtype, config)
        except SelfTestFailed as error:
            failed = choose(torch.device(device).type, dtype)
            if is_forced() or failed == "torch":
                raise
            pass_over(failed, torch.device(device).type, dtype, str(error))


def self_test(device: torch.device | str, dtype: torch.dtype = torch.float32, config: AuMConfig | None = None) -> str:
    """Compare a mixer, and on a CPU a stem, forward and every gradient, with plain PyTorch in float64 on the CPU.

    Use the backend that a model on ``device`` would use, with autocast to ``dtype`` where that is a 16-bit type, and
    return its name. ``config``: take the sizes of this model's mixers and sequences, for which kernels may be compiled
    specially; None: small ones, which take about 50 ms. What is compiled at first use takes longer. No random number
    is drawn from the global generators.

    Raises:
        ValueError: as `aum.scan.choose`.
        SelfTestFailed: the results differ (it names the backend, the tensor and the relative error), or it fails.
    """
    device = torch.device(device)
    backend = choose(device.type, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if config is None:
            # These sizes run every part of the kernels: several chunks of steps, and all kinds of remainders.
            mixer, l, clips = BiMamba(24, d_state=9), 43, COMPARED
        else:
            mixer = BiMamba(config.embed_dim, config.d_state, config.d_conv, config.expand, config.direction)
            mel, time = config.grid
            l, clips = time if config.row_scan else mel * time + (config.cls_position != "none"), CLIPS
            if backend != "triton":
                l, clips = min(l, LONGEST), COMPARED
        parts: list[tuple[nn.Module, Tensor]] = [(mixer, torch.randn(clips, l, mixer.d_model))]
        if backend == "cpu" and dtype == torch.float32:  # other kernels, for short sequences and a stem's convolutions
            if config is None:
                parts.append((BiMamba(48, d_state=4), torch.randn(COMPARED, 17, 48)))
            stem, blocks = ((8, 32), 1) if config is None else (config.stem, config.stem_blocks)
            if stem:
                parts.append((Stem(stem, blocks), torch.randn(COMPARED, 1, 32, 33)))
    for part, x in parts:
        _compare(backend, part, x, device, dtype)
    return backend


def _compare(backend: str, part: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    try:
        got = _run(copy.deepcopy(part).to(device), x.to(device), dtype)
    except Exception as error:  # what a compiler or a driver raises
        message = " ".join(str(error).split())
        raise SelfTestFailed(
            f"the scan backend {backend!r} fails on this machine: {type(error).__name__}: {message}"
        ) from error
    with use_backend("torch"):
        expected = _run(part.double(), x[:COMPARED].double(), torch.float64)
    for name, reference in expected.items():
        error = ((got[name].cpu().double() - reference).norm() / reference.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SelfTestFailed(
                f"the scan backend {backend!r} calculates wrongly on this machine: {name} differs from the reference "
                f"by {error:.2g} of its size"
            )


def _run(part: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output and all gradients by name, of the clips that are compared."""
    x = x.requires_grad_()
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad(), torch.autocast(x.device.type, dtype if low else torch.bfloat16, enabled=low):
        y = part(x)
    dy = torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype)
    dy[COMPARED:] = 0
    inputs = {"the input": x, **dict(part.named_parameters())}
    dx, *gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    named = {f"the gradient of {name}": g for name, g in zip(inputs, (dx[:COMPARED], *gradients), strict=True)}
    return {"the output": y.detach()[:COMPARED]} | named
