"""Before hours of training: does the scan that was chosen calculate what the reference does, on this machine?"""

import copy

import torch

from aum.mamba import BiMamba
from aum.scan import choose, use_backend

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}  # far above rounding, far below a mistake


def self_test(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Compare a small mixer, forward and every gradient, with the plain PyTorch scan in float64; a few milliseconds.

    Takes the backend that a model on ``device`` would take, with autocast to ``dtype`` where that is a 16-bit type;
    returns its name. No random number is drawn from the global generators.

    Raises:
        ValueError: as `aum.scan.choose`.
        RuntimeError: the results differ; it names the backend, the tensor and the relative error.
    """
    device = torch.device(device)
    backend = choose(device.type, dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        mixer = BiMamba(24, d_state=5).to(device)
        hidden, dy = torch.randn(2, 3, 11, 24, device=device)  # odd sizes: their remainders are where mistakes hide
    got = _run(mixer, hidden, dy, dtype)
    with use_backend("torch"):
        expected = _run(copy.deepcopy(mixer).double(), hidden.double(), dy.double(), torch.float64)
    for name, reference in expected.items():
        error = ((got[name].double() - reference).norm() / reference.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"the scan backend {backend!r} calculates wrongly on this machine: {name} differs from the "
                f"reference by {error:.2g} of its size"
            )
    return backend


def _run(mixer: BiMamba, hidden: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.enable_grad(), torch.autocast(hidden.device.type, dtype if low else torch.bfloat16, enabled=low):
        y = mixer(hidden)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y.to(dy.dtype), (hidden, *parameters), dy)
    return {
        "the output": y.detach(),
        **{f"the gradient of {n}": g for n, g in zip(("the input", *names), gradients, strict=True)},
    }
