"""What is compared: the ways to compute one bidirectional mixer, and the floor, its matrix products alone.

Every contender computes the same function of the same `aum.BiMamba` (direction bi_bi), whose parameters it shares:
hidden (b, l, d_model) -> (b, l, d_model). `check` asserts that before anything is measured. A peer that is only a scan
is put into the published construction: two causal branches, the second between two flips of the sequence.

Axes: b clips, l tokens, d d_inner, n d_state, r dt_rank.
"""

import argparse
import ast
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aum
from aum.scan import BACKENDS

D_MODEL = 384  # AuM-Small
FLOOR = "floor"
FORWARD, BOTH = "fwd", "fwd+bwd"

Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    name: str
    how: str
    """How it is used, for the legend of the tables."""
    block: Block


def backends(device: str, dtype: torch.dtype) -> list[str]:
    """Names of aum's backends for tensors on a type of device, the fastest first; no interpreted kernels."""
    names = [name for name in aum.available_backends() if BACKENDS[name].why_not(device, dtype) is None]
    return [name for name in names if not (name == "triton" and device == "cpu")]


def contenders(
    mixer: aum.BiMamba, device: str, dtype: torch.dtype, mamba_ref: Path | None
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can be had here, and for each peer that cannot: how to get it."""
    found = [
        Contender(f"aum, backend {name}", "`aum.BiMamba` as it is", functools.partial(with_backend, name, mixer))
        for name in backends(device, dtype)
    ]
    absent = {}
    for name, how, make, to_install in PEERS:
        try:
            found.append(Contender(name, how, make(mixer, device, dtype, mamba_ref)))
        except ImportError as error:
            absent[name] = f"{to_install} ({error})"
    return found, absent


def make_mixer(args: argparse.Namespace) -> aum.BiMamba:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    return aum.BiMamba(D_MODEL).to(args.device)


def with_backend(name: str, module: Callable, *args):
    with aum.use_backend(name):
        return module(*args)


def check(found: Sequence[Contender], mixer: aum.BiMamba, device: str, tolerance: float = 1e-3) -> None:
    """Raises AssertionError where output or gradients differ by more than ``tolerance`` (relative L2), in float32."""
    hidden = torch.randn(2, 17, mixer.d_model, device=device, requires_grad=True)
    dy = torch.randn_like(hidden)
    inputs = {"hidden": hidden, **dict(mixer.named_parameters())}

    def run(block: Block) -> dict[str, Tensor]:
        y = block(hidden)
        return {"output": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))

    expected = run(functools.partial(with_backend, "torch", mixer))
    for contender in found:
        for key, value in run(contender.block).items():
            error = ((value - expected[key]).norm() / expected[key].norm()).item()
            assert error < tolerance, f"{contender.name}: {key} differs by {error:.1e} from backend torch's"


# ---- the published construction, around a scan -----------------------------------------------------------------------


def bidirectional(mixer: aum.BiMamba, branch: Callable[[Tensor, str], Tensor], hidden: Tensor) -> Tensor:
    """``branch(xz, suffix)``, (b, l, 2d) -> (b, l, d), is causal: the second direction is flipped before and after."""
    xz = F.linear(hidden, mixer.in_proj.weight)
    y = branch(xz, "") + branch(xz.flip(1), "_b").flip(1)
    return F.linear(y / 2, mixer.out_proj.weight)


def published(mixer: aum.BiMamba, scan: Callable[..., Tensor]) -> Block:
    """The block around ``scan``, a function with the signature of mamba_ssm's selective_scan_fn."""
    try:
        fused_conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    except Exception:  # not installed, or built for another torch
        fused_conv = None

    def branch(xz: Tensor, suffix: str) -> Tensor:
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

    return functools.partial(bidirectional, mixer, branch)


def published_kernels(mixer: aum.BiMamba, device: str, dtype: torch.dtype, _) -> Block:
    reason = BACKENDS["mamba_ssm"].why_not(device, dtype)
    if reason:
        raise ImportError(reason)
    return published(mixer, functools.partial(aum.selective_scan_fn, backend="mamba_ssm"))


def selective_scan_ref(mixer: aum.BiMamba, device: str, dtype: torch.dtype, path: Path | None) -> Block:
    """The one function, taken out of the file: its module imports CUDA extensions."""
    if path is None:
        raise ImportError("--mamba_ref is not given")
    tree = ast.parse(path.read_text())
    functions = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "selective_scan_ref"]
    if not functions:
        raise ImportError(f"{path} has no selective_scan_ref")
    einops = importlib.import_module("einops")
    names = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(ast.Module(functions, []), str(path), "exec"), names)
    return published(mixer, names["selective_scan_ref"])


def mambapy_pscan(mixer: aum.BiMamba, *_) -> Block:
    their_scan = importlib.import_module("mambapy.mamba").MambaBlock.selective_scan  # uses nothing of self

    def scan(u, delta, A, B, C, D, z, bias, delta_softplus):
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y = their_scan(None, u, F.softplus(delta + bias), A, B, C, D) * F.silu(z)
        return y.transpose(1, 2)

    return published(mixer, scan)


def transformers_slow_path(mixer: aum.BiMamba, device: str, *_) -> Block:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    if not hasattr(module.MambaMixer, "slow_forward"):  # gone in 5
        raise ImportError("the installed version's MambaMixer has no slow_forward")
    config = module.MambaConfig(
        hidden_size=mixer.d_model, state_size=mixer.d_state, conv_kernel=mixer.d_conv, num_hidden_layers=1,
        expand=mixer.d_inner // mixer.d_model, time_step_rank=mixer.dt_rank, use_mambapy=False,
    )  # fmt: skip
    branches = {}
    for suffix in ("", "_b"):
        theirs = module.MambaMixer(config, layer_idx=0).to(device)
        theirs.in_proj = theirs.out_proj = nn.Identity()  # shared by both directions, so they are outside
        for name in ("weight", "bias"):
            setattr(theirs.conv1d, name, getattr(getattr(mixer, f"conv1d{suffix}"), name))
        for name in ("x_proj", "dt_proj", "D"):
            setattr(theirs, name, getattr(mixer, f"{name}{suffix}"))
        theirs.A_log = mixer.A_b_log if suffix else mixer.A_log
        branches[suffix] = theirs
    return functools.partial(bidirectional, mixer, lambda xz, suffix: branches[suffix].slow_forward(xz))


_FLIPS = "in the published construction: once per direction, with flips"
PEERS = (
    ("mamba_ssm's CUDA kernels", f"`selective_scan_cuda` (and `causal_conv1d` where installed) {_FLIPS}",
     published_kernels, "`pip install -r requirements-cuda.txt`, with an NVIDIA GPU"),
    ("mamba_ssm's selective_scan_ref", f"the function {_FLIPS}, between F.conv1d, F.silu and F.linear",
     selective_scan_ref, "`pip install einops`, and `--mamba_ref` to state-spaces/mamba's selective_scan_interface.py"),
    ("mambapy's pscan", f"`MambaBlock.selective_scan` {_FLIPS}, between F.conv1d, F.silu and F.linear",
     mambapy_pscan, "`pip install mambapy`"),
    ("transformers' slow_forward", f"`MambaMixer.slow_forward` {_FLIPS}, without its in_proj and out_proj: F.linear",
     transformers_slow_path, "`pip install 'transformers<5'`"),
)  # fmt: skip


# ---- the floor -------------------------------------------------------------------------------------------------------


class Floor:
    """The block's six matrix products alone, each on an input of its own: what no implementation can leave out.

    Calling it gives the outputs, a list; ``inputs`` and ``weights`` are what has gradients.
    """

    def __init__(self, mixer: aum.BiMamba, b: int, l: int, dtype: torch.dtype):
        linears = (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b, mixer.out_proj)
        self.weights = [linear.weight for linear in linears]
        new = functools.partial(torch.randn, device=self.weights[0].device, dtype=dtype)
        self.inputs = [new(b, l, weight.shape[1], requires_grad=True) for weight in self.weights]
        self.gradients = [new(b, l, weight.shape[0]) for weight in self.weights]

    def __call__(self) -> list[Tensor]:
        return [F.linear(x, weight) for x, weight in zip(self.inputs, self.weights, strict=True)]


# ---- what is timed ---------------------------------------------------------------------------------------------------


def autocast(args: argparse.Namespace, dtype: torch.dtype):
    """Below float32, autocast over float32 parameters, as in training."""
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def block_calls(block: Block, parameters: list, b: int, l: int, dtype: torch.dtype, args: argparse.Namespace):
    """{FORWARD: without gradients, BOTH: with those of the input and of all parameters}."""
    hidden = torch.randn(b, l, D_MODEL, device=args.device, requires_grad=True)
    dy = torch.randn(b, l, D_MODEL, device=args.device, dtype=dtype)

    def forward():
        with torch.no_grad(), autocast(args, dtype):
            block(hidden)

    def both():
        with autocast(args, dtype):
            y = block(hidden)
        torch.autograd.grad(y, [hidden, *parameters], dy)

    return {FORWARD: forward, BOTH: both}


def floor_calls(mixer: aum.BiMamba, b: int, l: int, dtype: torch.dtype, args: argparse.Namespace):
    floor = Floor(mixer, b, l, dtype)

    def forward():
        with torch.no_grad(), autocast(args, dtype):
            floor()

    def both():
        with autocast(args, dtype):
            outputs = floor()
        torch.autograd.grad(outputs, [*floor.inputs, *floor.weights], floor.gradients)

    return {FORWARD: forward, BOTH: both}
