"""The implementations that scan.py compares: ways to compute one bidirectional mixer, and the floor.

Every contender computes the same function of the same `aum.BiMamba` (direction bi_bi) with the same parameters:
hidden (b, l, d_model) -> (b, l, d_model). `Case.check` asserts that before anything is measured. A peer that offers
only a scan is put into the published construction: two causal branches, the second between two flips of the sequence.
The floor is the mixer's matrix products and nothing else: no implementation can do without them.

Axes: b clips, l tokens, d d_inner, n d_state, r dt_rank.
"""

import ast
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import aum
from aum.scan import BACKENDS

D_MODEL = 384  # AuM-Small
FLOOR = "floor"
FORWARD, BOTH = "fwd", "fwd+bwd"

Block = Callable[[Tensor], Tensor]


class Case:
    """A mixer on a device, the contenders that can run there at ``dtype``, and calls of them to time.

    Attributes:
        blocks: each contender's block by its name; all share the parameters of ``mixer``.
        legend: lines that say how each contender is used, or how to get one that is not installed.
    """

    def __init__(self, device: str, dtype: torch.dtype, mamba_ref: Path | None = None):
        torch.manual_seed(0)
        self.device, self.dtype, self.mamba_ref = device, dtype, mamba_ref
        self.mixer = aum.BiMamba(D_MODEL).to(device)
        self.blocks: dict[str, Block] = {}
        for name in backends(device, dtype):
            self.blocks[f"aum, backend {name}"] = partial(with_backend, name, self.mixer)
        self.legend = [f"- {name}: `aum.BiMamba` as it is." for name in self.blocks]
        absent = []
        for name, how, make, to_install in PEERS:
            try:
                self.blocks[name] = make(self)
                self.legend.append(f"- {name}: {how}.")
            except ImportError as error:
                absent.append(f"- {name}: not installed; {to_install} ({error}).")
        products = "in_proj, two x_proj, two dt_proj and out_proj"
        self.legend += [f"- {FLOOR}: only the block's matrix products ({products}), each on an input of its own."]
        self.legend += absent

    @property
    def precision(self) -> str:
        return "float32" if self.dtype == torch.float32 else f"{str(self.dtype).removeprefix('torch.')} autocast"

    @property
    def where(self) -> str:
        n = torch.get_num_threads()
        return self.precision + (f", {n} thread{'s' * (n > 1)}" if self.device == "cpu" else "")

    @property
    def by_cpu(self) -> bool:
        """Whether CPU time says more than wall time: with several threads it includes their waiting for each other."""
        return self.device == "cpu" and torch.get_num_threads() == 1

    def check(self, tolerance: float = 1e-3) -> None:
        """Raise AssertionError where output or gradients differ by more than ``tolerance`` (relative L2)."""
        hidden = torch.randn(2, 17, D_MODEL, device=self.device, requires_grad=True)
        dy = torch.randn_like(hidden)
        inputs = {"hidden": hidden, **dict(self.mixer.named_parameters())}

        def run(block: Block) -> dict[str, Tensor]:
            y = block(hidden)
            return {"output": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))

        expected = run(partial(with_backend, "torch", self.mixer))
        for name, block in self.blocks.items():
            for key, value in run(block).items():
                error = ((value - expected[key]).norm() / expected[key].norm()).item()
                assert error < tolerance, f"{name}: {key} differs by {error:.1e} from backend torch's"

    def autocast(self) -> torch.autocast:
        """Return the context of training: below float32, autocast over float32 parameters."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def calls(self, name: str, b: int, l: int) -> dict[str, Callable[[], None]]:
        """Return calls of a contender or the floor: FORWARD without gradients, BOTH with those of inputs and weights.

        The floor's six products have six inputs.
        """
        if name == FLOOR:
            mixer = self.mixer
            linears = (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b, mixer.out_proj)
            weights = [linear.weight for linear in linears]
            new = partial(torch.randn, device=self.device, dtype=self.dtype)
            inputs = [new(b, l, weight.shape[1], requires_grad=True) for weight in weights]
            dy = [new(b, l, weight.shape[0]) for weight in weights]
        else:
            weights = list(self.mixer.parameters())
            inputs = [torch.randn(b, l, D_MODEL, device=self.device, requires_grad=True)]
            dy = [torch.randn(b, l, D_MODEL, device=self.device, dtype=self.dtype)]

        def outputs() -> list[Tensor]:
            with self.autocast():
                if name == FLOOR:
                    return [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
                return [self.blocks[name](*inputs)]

        def both() -> None:
            torch.autograd.grad(outputs(), [*inputs, *weights], dy)

        return {FORWARD: torch.no_grad()(outputs), BOTH: both}


def backends(device: str, dtype: torch.dtype) -> list[str]:
    """Return the names of aum's backends for tensors on a device, the fastest first; no interpreted kernels."""
    names = [name for name in aum.available_backends() if BACKENDS[name].why_not(device, dtype) is None]
    return [name for name in names if not (name == "triton" and device == "cpu")]


def with_backend(name: str, module: Callable, *args):
    with aum.use_backend(name):
        return module(*args)


# ---- the published construction, around a scan -----------------------------------------------------------------------


def published(mixer: aum.BiMamba, scan: Callable[..., Tensor]) -> Block:
    """Return the block around ``scan``, a function with the signature of mamba_ssm's selective_scan_fn."""
    try:
        fused_conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except Exception:  # not installed, or built for another torch
        fused_conv = None

    def branch(xz: Tensor, suffix: str) -> Tensor:  # (b, l, 2d) -> (b, l, d), causal
        conv, x_proj, dt_proj = (getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (b, d, l)
        if fused_conv is not None and x.is_cuda:
            u = fused_conv(x, conv.weight.squeeze(1).to(x.dtype), conv.bias.to(x.dtype), activation="silu")
        else:
            u = F.conv1d(x, conv.weight, conv.bias, padding=mixer.d_conv - 1, groups=mixer.d_inner)
            u = F.silu(u[..., : x.shape[2]])
        projected = F.linear(u.transpose(1, 2), x_proj.weight)
        dt, B, C = projected.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        delta = F.linear(dt, dt_proj.weight).transpose(1, 2)
        A = -torch.exp(mixer.A_b_log if suffix else mixer.A_log)
        D = getattr(mixer, f"D{suffix}")
        y = scan(u, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, z, dt_proj.bias, delta_softplus=True)
        return y.transpose(1, 2)

    def block(hidden: Tensor) -> Tensor:
        xz = F.linear(hidden, mixer.in_proj.weight)
        y = branch(xz, "") + branch(xz.flip(1), "_b").flip(1)
        return F.linear(y / 2, mixer.out_proj.weight)

    return block


def published_kernels(case: Case, mixer: aum.BiMamba | None = None) -> Block:
    if reason := BACKENDS["mamba_ssm"].why_not(case.device, case.dtype):
        raise ImportError(reason)
    return published(mixer or case.mixer, partial(aum.selective_scan_fn, backend="mamba_ssm"))


def selective_scan_ref(case: Case) -> Block:
    """Take that one function out of its file, because its module imports CUDA extensions."""
    if case.mamba_ref is None:
        raise ImportError("--mamba_ref is not given")
    tree = ast.parse(case.mamba_ref.read_text())
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "selective_scan_ref"]
    if not functions:
        raise ImportError(f"{case.mamba_ref} has no selective_scan_ref")
    einops = importlib.import_module("einops")
    names = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(ast.Module(functions, []), str(case.mamba_ref), "exec"), names)
    return published(case.mixer, names["selective_scan_ref"])


def mambapy_pscan(case: Case) -> Block:
    their_scan = importlib.import_module("mambapy.mamba").MambaBlock.selective_scan  # uses nothing of self

    def scan(u, delta, A, B, C, D, z, bias, delta_softplus):
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y = their_scan(None, u, F.softplus(delta + bias), A, B, C, D) * F.silu(z)
        return y.transpose(1, 2)

    return published(case.mixer, scan)


_FLIPS = "in the published construction: once per direction, with flips"
PEERS: Sequence[tuple[str, str, Callable[[Case], Block], str]] = (  # name, how it is used, block, how to get it
    ("mamba_ssm's CUDA kernels", f"`selective_scan_cuda` (and `causal_conv1d` where installed) {_FLIPS}",
     published_kernels, "`pip install -r requirements-cuda.txt`, with an NVIDIA GPU"),
    ("mamba_ssm's selective_scan_ref", f"the function {_FLIPS}, between F.conv1d, F.silu and F.linear",
     selective_scan_ref, "`pip install einops`, and `--mamba_ref` to state-spaces/mamba's selective_scan_interface.py"),
    ("mambapy's pscan", f"`MambaBlock.selective_scan` {_FLIPS}, between F.conv1d, F.silu and F.linear",
     mambapy_pscan, "`pip install mambapy`"),
)  # fmt: skip
