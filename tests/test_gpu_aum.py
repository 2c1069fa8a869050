"""The backbone on an NVIDIA GPU, through its public functions, beside the plain PyTorch scan; skipped without a GPU.

It imports torch, pytest and aum alone (`pytest --noconftest`): a machine with a GPU may have no more. With
TRITON_INTERPRET=1, a CPU and Triton's interpreter stand in for the GPU, with tiny sizes: `benchmarks/gpu.py --dry_run`.

The reference is plain PyTorch in float64. What Triton calculates in a dtype may differ from it by three times as much
as what plain PyTorch calculates in that dtype: no tolerance has to be guessed for a whole model in 16 bits.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

import aum

STAND_IN = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if STAND_IN else "cuda"
pytestmark = pytest.mark.skipif(not (STAND_IN or torch.cuda.is_available()), reason="no GPU here")
only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has it")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLIPS = 2 if STAND_IN else 64
LENGTHS = (3, 7) if STAND_IN else (65, 1025)
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative L2 error that is never too much
_TINY = {"embed_dim": 8, "depth": 1, "d_state": 2, "n_mels": 16, "target_length": 9, "patch_size": (8, 4)}
MODELS = {  # AuM-Nano has a stem and scans 17 tokens of each row; the others have 65 and 1,025 tokens
    "aum_nano": _TINY | {"stem": (2, 4), "patch_size": (2, 1)} if STAND_IN else {},
    "aum_small": _TINY if STAND_IN else {},
    "aum_tiny": _TINY if STAND_IN else {"depth": 2, "target_length": 1024},
}


@pytest.fixture(autouse=True)
def full_float32():
    """cuDNN's convolutions take TF32 unless they are told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32 = before


def named(dtypes=DTYPES):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def errors(got: dict, expected: dict) -> dict[str, float]:
    """Return relative L2 errors. A gradient far below the largest is what is left of sums that cancel."""
    for name in expected:
        assert torch.isfinite(got[name]).all(), name
    sizes = {name: x.norm().item() for name, x in expected.items()}
    least = 0.1 * max(size for name, size in sizes.items() if name not in ("output", "last"))
    return {
        name: (got[name].double() - x).norm().item()
        / (sizes[name] if name in ("output", "last") else max(sizes[name], least))
        for name, x in expected.items()
    }


def compare(run, dtype) -> None:
    """Compare ``run(backend, dtype)``, tensors by name, as the file's first lines say."""
    expected = run("torch", torch.float64)
    ours, plain = (errors(run(backend, dtype), expected) for backend in ("triton", "torch"))
    worse = {name: (ours[name], plain[name]) for name in ours if ours[name] > 3 * plain[name] + ALLOWED[dtype]}
    assert not worse, f"relative errors of triton and torch: {worse}"


def run_module(module, inputs, loss_of, backend, dtype) -> dict:
    """Return output, gradients and loss of a copy of a module, in training's precision for ``dtype``."""
    wide = dtype if dtype == torch.float64 else torch.float32
    module = copy.deepcopy(module).to(wide)
    inputs = inputs.to(wide).requires_grad_()
    with aum.use_backend(backend), torch.autocast(DEVICE, dtype, enabled=dtype in DTYPES[1:]):
        y = module(inputs)
    loss = loss_of(y.to(wide))
    tensors = {"input": inputs, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(1024 * loss, list(tensors.values()))  # 1024: small ones vanish in float16
    return {"output": y.detach()} | {f"d{name}": g for name, g in zip(tensors, gradients, strict=True)}


# ---- every kernel ----------------------------------------------------------------------------------------------------


class Seen:
    """Stands in for a Triton kernel and notes that it was launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.add(self)
        return self.kernel[grid]


def test_every_kernel_runs_forward_and_backward(monkeypatch):
    """Small: benchmarks/gpu.py runs it under compute-sanitizer's memcheck."""
    from aum.scan import triton_kernels

    names = ("_conv_forward", "_conv_backward_weight", "_conv_backward_input")
    names += ("_scan_forward", "_scan_backward", "_sum_tiles")
    launched = set()
    kernels = {name: Seen(getattr(triton_kernels, name), launched) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    for d_model, d_state, l in ((5, 3, 7),) if STAND_IN else ((24, 9, 43), (384, 16, 65)):
        mixer, hidden = aum.BiMamba(d_model, d_state).to(DEVICE), torch.randn(2, l, d_model, device=DEVICE)
        compare(lambda *how, m=mixer, h=hidden: run_module(m, h, lambda y: y.sin().sum(), *how), torch.float32)
    assert launched == set(kernels.values())


# ---- the scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", LENGTHS)
@named()
def test_scan(dtype, l):
    b, d, n = (CLIPS, 6, 3) if STAND_IN else (CLIPS, 192, 16)
    of = {"device": DEVICE, "dtype": torch.float64}
    data = [torch.randn(b, *shape, l, **of).to(dtype) for shape in ((d,), (d,), (n,), (n,), (d,))]
    parameters = [-torch.rand(d, n, **of).float(), torch.randn(d, **of).float(), torch.rand(d, **of).float()]
    dy, dlast = torch.randn(b, d, l, **of), torch.randn(b, d, n, **of)
    names = ("u", "delta", "B", "C", "z", "A", "D", "bias")

    def run(backend, kind, reverse=False):
        wide = kind if kind == torch.float64 else torch.float32
        leaves = [*(x.to(kind) for x in data), *(x.to(wide) for x in parameters)]
        u, delta, B, C, z, A, D, bias = (x.detach().requires_grad_() for x in leaves)
        leaves = (u, delta, B, C, z, A, D, bias)
        more = {"delta_softplus": True, "return_last_state": True, "reverse": reverse, "backend": backend}
        y, last = aum.selective_scan_fn(u, delta, A, B, C, D, z, bias, **more)
        gradients = torch.autograd.grad([y, last], leaves, [dy.to(y.dtype), dlast.to(last.dtype)])
        return {"output": y.detach(), "last": last.detach()} | dict(zip(names, gradients, strict=True))

    compare(run, dtype)
    compare(lambda *how: run(*how, reverse=True), dtype)


# ---- mixers and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", LENGTHS)
@named()
def test_mixer(dtype, l):
    mixer = aum.BiMamba(6 if STAND_IN else 384, d_state=3 if STAND_IN else 16).to(DEVICE)
    hidden = torch.randn(CLIPS, l, mixer.d_model, device=DEVICE)
    compare(lambda *how: run_module(mixer, hidden, lambda y: y.sin().sum(), *how), dtype)


def model_and_clips(name):
    model = aum.create_model(name, dropout=0.0, **MODELS[name]).to(DEVICE)
    config = model.config
    x = torch.randn(CLIPS, 1, config.n_mels, config.target_length, device=DEVICE)
    return model, x, torch.randint(10, (CLIPS,), device=DEVICE)


@pytest.mark.parametrize("name", MODELS)
@named()
def test_model(dtype, name):
    model, x, scenes = model_and_clips(name)
    compare(lambda *how: run_module(model, x, lambda y: F.cross_entropy(y, scenes), *how), dtype)


def losses(model, x, scenes, dtype, steps: int) -> list[float]:
    """Train for some steps as the scripts do, and return the losses."""
    optimizer = torch.optim.AdamW(aum.parameter_groups(model, 1e-4), lr=1e-3)
    seen = []
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x).float(), scenes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    return torch.stack(seen).tolist()


@pytest.mark.parametrize("name", ["aum_nano", "aum_small"])
@named(DTYPES[:2])
def test_compiled_it_trains_alike(dtype, name):
    """Compile as fit.py does, and check that no part of the model falls out of the CUDA graphs."""
    from torch._dynamo.utils import counters

    if STAND_IN and (name, dtype) != ("aum_small", torch.float32):
        pytest.skip("torch.compile takes minutes on a CPU: once is enough for the plan")
    torch._dynamo.reset()
    counters.clear()
    model, x, scenes = model_and_clips(name)
    compiled = copy.deepcopy(model)
    compiled.compile(mode="default" if STAND_IN else "reduce-overhead")
    with aum.use_backend("triton"):
        expected, got = (losses(m, x, scenes, dtype, 3 if STAND_IN else 8) for m in (model, compiled))
    assert expected[-1] < expected[0]
    assert got == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 5e-2)
    assert not counters["inductor"]["cudagraph_skips"]
    compiled.eval()  # validation: another graph, and a last batch that is smaller
    model.load_state_dict(compiled.state_dict())
    with aum.use_backend("triton"), torch.no_grad():
        for clips in (x, x[: CLIPS // 2]):
            torch.testing.assert_close(compiled(clips), model.eval()(clips), rtol=1e-2, atol=1e-2)


@only_cuda
@named(DTYPES[:2])
def test_graph_capture(dtype):
    """A CUDA graph of forward and backward replays on new input."""
    mixer = aum.BiMamba(384).to(DEVICE)
    hidden = torch.randn(CLIPS, 65, 384, device=DEVICE, requires_grad=True)
    inputs = [hidden, *mixer.parameters()]

    def step():
        # Weights in 16 bits are made anew in every step: a cached one would belong to no graph.
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            y = mixer(hidden)
        return [y, *torch.autograd.grad(y.float().sin().sum(), inputs)]

    with aum.use_backend("triton"):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            hidden.normal_()
        graph.replay()
        got = [x.clone() for x in captured]
        for a, b in zip(got, step(), strict=True):
            assert torch.equal(a, b)


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_second_device():
    """The tensors' device counts, not the current one."""
    mixer, hidden = aum.BiMamba(96), torch.randn(CLIPS, 65, 96)
    with aum.use_backend("triton"):
        first, second = (mixer.to(device)(hidden.to(device)).cpu() for device in ("cuda:0", "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert torch.equal(first, second)


@only_cuda  # tests/test_scan_backends.py has it in the interpreter
@named()
def test_self_test(dtype):
    with aum.use_backend("triton"):
        assert aum.self_test(DEVICE, dtype) == "triton"
