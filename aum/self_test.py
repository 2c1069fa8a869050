"""Check before hours of training that the chosen scan agrees with the reference on this machine."""

import copy

import torch

from aum.mamba import BiMamba
from aum.scan import choose, use_backend

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}  # far above rounding, far below a mistake


class SelfTestFailed(Exception):
    """The chosen backend fails or calculates wrongly; the message names it."""


def self_test(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Compare a small mixer, forward and every gradient, with the plain PyTorch scan in float64 on the CPU.

    Use the backend that a model on ``device`` would use, with autocast to ``dtype`` where that is a 16-bit type, and
    return its name. This takes about 20 ms, plus compilation at first use, and draws no random number from the global
    generators.

    Raises:
        ValueError: as `aum.scan.choose`.
        SelfTestFailed: the results differ (it names the backend, the tensor and the relative error), or it fails.
    """
    device = torch.device(device)
    backend = choose(device.type, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # These sizes run every part of the kernels: several chunks of steps, and all kinds of remainders.
        mixer = BiMamba(24, d_state=9)
        hidden, dy = torch.randn(2, 2, 43, 24)
    try:
        got = _run(copy.deepcopy(mixer).to(device), hidden.to(device), dy.to(device), dtype)
    except Exception as error:  # what a compiler or a driver raises
        message = " ".join(str(error).split())
        raise SelfTestFailed(
            f"the scan backend {backend!r} fails on this machine: {type(error).__name__}: {message}"
        ) from error
    with use_backend("torch"):
        expected = _run(mixer.double(), hidden.double(), dy.double(), torch.float64)
    for name, reference in expected.items():
        error = ((got[name].cpu().double() - reference).norm() / reference.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise SelfTestFailed(
                f"the scan backend {backend!r} calculates wrongly on this machine: {name} differs from the reference "
                f"by {error:.2g} of its size"
            )
    return backend


def _run(mixer: BiMamba, hidden: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the output and all gradients by name."""
    hidden = hidden.requires_grad_()
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad(), torch.autocast(hidden.device.type, dtype if low else torch.bfloat16, enabled=low):
        y = mixer(hidden)
    inputs = {"the input": hidden, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(y.to(dy.dtype), list(inputs.values()), dy)
    named = {f"the gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {"the output": y.detach()} | named
