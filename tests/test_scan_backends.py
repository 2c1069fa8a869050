"""Every fast scan against the reference in float64: values, every gradient, odd sizes, hard numbers, the same bits."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import aum
from aum.scan import backends, fused

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative L2
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def make(b=2, d=6, l=7, n=3, g=1, without=(), dtype=torch.float32):
    """Arguments of selective_scan_fn, with B and C as slices of one tensor and u and z as halves of another."""
    xz, p = normal(b, l, 2 * d), normal(b, l, g * 2 * n, seed=1)
    B, C = (x.unflatten(2, (g, n)).permute(0, 2, 3, 1) for x in p.chunk(2, 2))
    made = {
        "u": xz[..., :d].transpose(1, 2),
        "delta": normal(b, d, l, seed=2),
        "A": -normal(d, n, seed=3).exp(),
        "B": B,
        "C": C,
        "D": normal(d, seed=4),
        "z": xz[..., d:].transpose(1, 2),
        "delta_bias": normal(d, seed=5),
    }
    kept = {"A", "D", "delta_bias"}
    return {k: v if k in kept else v.to(dtype) for k, v in made.items() if k not in without}


def relative(got, expected):
    assert torch.isfinite(got).all()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run(arguments, seed=8, **options):
    """y, last state and the gradients of both with random weights."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    y, last = aum.selective_scan_fn(**leaves, return_last_state=True, **options)
    dy, dlast = normal(*y.shape, seed=seed).to(y.dtype), normal(*last.shape, seed=seed + 1).to(last.dtype)
    return [y, last, *torch.autograd.grad((y, last), list(leaves.values()), (dy, dlast))]


def compare(arguments, backend="cpu", **options):
    options = {"delta_softplus": True} | options
    dtype = arguments["u"].dtype
    got = run(arguments, backend=backend, **options)
    wide = {k: v.detach().double() for k, v in arguments.items()}
    expected = run(wide, backend="torch", **options)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for name, a, e in zip(("y", "last", *arguments), got, expected, strict=True):
        assert a.shape == e.shape
        assert relative(a, e) <= TOLERANCE[dtype], name


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_and_options(data):
    g = data.draw(st.sampled_from([1, 1, 2, 3]), "g")
    sizes = {
        "b": data.draw(st.integers(1, 3), "b"),
        "d": g * data.draw(st.integers(1, 40), "d / g"),
        "l": data.draw(st.sampled_from([1, 2, 3, 39, 40, 41, 63, 65, 127]), "l"),
        "n": data.draw(st.integers(1, 64), "n"),
    }
    without = data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias"])), "without")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), "dtype")
    arguments = make(**sizes, g=g, without=without, dtype=dtype)
    softplus = data.draw(st.booleans(), "softplus")
    if not softplus:  # a negative step size would let the state grow
        arguments["delta"] = (0.3 * arguments["delta"]).abs()
        if "delta_bias" in arguments:
            arguments["delta_bias"] = (0.3 * arguments["delta_bias"]).abs()
    compare(arguments, delta_softplus=softplus, reverse=data.draw(st.booleans(), "reverse"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences(dtype, reverse):
    compare(make(b=1, d=20, l=1025, n=16, dtype=dtype), reverse=reverse)


def test_constant_B_and_C_and_groups_that_differ():
    compare(make(d=21, l=9) | {"B": normal(21, 3), "C": normal(21, 3, seed=1)})
    compare(make(d=12, g=2) | {"C": make(d=12, g=3)["C"]})


@pytest.mark.parametrize("softplus", [True, False])
def test_extreme_step_sizes(softplus):
    arguments = make(b=1, d=16, l=50, n=5, without=("delta_bias",))
    sizes = torch.logspace(-6, 3, 16, dtype=torch.float64)
    raw = sizes.where(sizes > 20, torch.log(torch.expm1(sizes))) if softplus else sizes
    arguments["delta"] = raw.float()[None, :, None].expand(1, 16, 50)
    compare(arguments, delta_softplus=softplus)


def test_strong_decay_and_a_state_that_hardly_decays():
    arguments = make(b=1, d=16, l=600, n=4, without=("delta_bias",))
    compare(arguments | {"A": arguments["A"] * 100})
    compare(arguments | {"A": arguments["A"] * 1e-6})


def test_gates_far_from_zero():
    arguments = make(b=1, d=8, l=3)
    arguments["z"] = torch.tensor([-1e4, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, 1e4])[None, :, None].expand(1, 8, 3)
    compare(arguments)


def test_an_empty_batch():
    arguments = {k: v[:0] if k in ("u", "delta", "B", "C", "z") else v for k, v in make().items()}
    y, last, *gradients = run(arguments, backend="cpu", delta_softplus=True)
    assert y.shape == (0, 6, 7) and last.shape == (0, 6, 3)
    assert all(g.shape == v.shape and not g.any() for g, v in zip(gradients, arguments.values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_swallowed(name):
    arguments = make(l=50)
    arguments[name] = torch.full_like(arguments[name], torch.nan)
    assert aum.selective_scan_fn(**arguments, delta_softplus=True, backend="cpu").isnan().any()


def test_two_backward_passes_and_any_number_of_threads_give_the_same_bits():
    arguments, before = make(b=3, d=70, l=90, n=16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(arguments, backend="cpu", delta_softplus=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_without_gradients_the_output_is_the_same():
    arguments = make(l=90)
    expected = run(arguments, backend="cpu", delta_softplus=True)[0]
    assert torch.equal(aum.selective_scan_fn(**arguments, delta_softplus=True, backend="cpu"), expected)


# ---- the fused mixer -------------------------------------------------------------------------------------------------


def mixer_and_input(direction, dtype=torch.float32, d_conv=4):
    torch.manual_seed(0)
    mixer = aum.BiMamba(40, d_state=5, d_conv=d_conv, direction=direction)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer, torch.randn(3, 70, 40)


def mixed(mixer, hidden, backend, autocast=False):
    hidden = hidden.clone().requires_grad_()
    with aum.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = mixer(hidden)
    weights = normal(*y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [hidden, *mixer.parameters()], weights)]


@pytest.mark.parametrize("d_conv", [2, 4, 5])
@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
def test_the_mixer(direction, d_conv):
    mixer, hidden = mixer_and_input(direction, d_conv=d_conv)
    got, low = mixed(mixer, hidden, "cpu"), mixed(mixer, hidden, "cpu", autocast=True)
    expected = mixed(copy.deepcopy(mixer).double(), hidden.double(), "torch")
    assert low[0].dtype == torch.bfloat16
    for name, a, b, e in zip(("y", "hidden", *dict(mixer.named_parameters())), got, low, expected, strict=True):
        assert relative(a, e) < 1e-5 and relative(b, e) < 3e-2, name
    with torch.no_grad(), aum.use_backend("cpu"):
        assert torch.equal(mixer(hidden), got[0])


def test_a_model_in_bfloat16_all_through():
    mixer, hidden = mixer_and_input("bi_bi")
    got = mixed(copy.deepcopy(mixer).bfloat16(), hidden.bfloat16(), "cpu")
    expected = mixed(mixer, hidden, "cpu")
    assert all(a.dtype == torch.bfloat16 for a in got)
    assert relative(got[0], expected[0].double()) < 3e-2


def test_frozen_parameters_get_no_gradient():
    mixer, hidden = mixer_and_input("bi_bi")
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(name == "A_b_log")
    mixer(hidden).square().sum().backward()
    assert {name for name, p in mixer.named_parameters() if p.grad is not None} == {"A_b_log"}


def test_an_empty_batch_through_the_mixer():
    mixer, hidden = mixer_and_input("bi_bi")
    got = mixed(mixer, hidden[:0], "cpu")
    assert got[0].shape == (0, 70, 40) and not any(g.any() for g in got[1:])


def test_what_is_kept_for_the_backward_pass():
    mixer, hidden = mixer_and_input("bi_bi")
    (b, l), d, kept = hidden.shape[:2], mixer.d_inner, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    parameters = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), aum.use_backend("cpu"):
        mixer(hidden.requires_grad_())
    token = mixer.d_model + 2 * d + 2 * d + 2 * (mixer.dt_rank + 2 * mixer.d_state) + 2 * d + d  # hidden xz u p delta y
    needed = 4 * b * l * token
    stacked = (
        4 * 2 * sum(p.numel() for n, p in mixer.named_parameters() if n.startswith(("x_p", "dt", "conv", "A", "D")))
    )
    assert sum(size for at, size in kept.items() if at not in parameters) < 1.1 * needed + stacked


# ---- torch.library, torch.compile ------------------------------------------------------------------------------------


def leaves(*shapes):
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("branches, scans", [(1, 1), (1, 2), (2, 2)])
def test_opcheck_of_the_mixer(branches, scans):
    b, l, d, n, r = 2, 5, 20, 4, 3
    k = branches
    tensors = leaves((b, l, 2 * d), (k, d, 4), (k, d), (k, r + 2 * n, d), (k, d, r), (k, d), (scans, d, n), (k, d))
    for padding in (None, torch.arange(l) >= torch.tensor([[5], [2]])):
        torch.library.opcheck(torch.ops.aum.mixer, (*tensors, padding, True, "cpu"))


@pytest.mark.parametrize("options", [True, False])
def test_opcheck_of_the_scans(options):
    b, l, d, n, g = 2, 5, 20, 4, 2
    u, delta, z, B, C, D, bias = leaves(*[(b, l, d)] * 3, *[(b, l, g, n)] * 2, (d,), (d,))
    A = (-normal(d, n).exp()).requires_grad_()
    optional = (D, z, bias) if options else (None, None, None)
    torch.library.opcheck(torch.ops.aum.scan, (u, delta, A, B, C, *optional, options, not options, True, "cpu"))
    u, delta, B, C = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in (u, delta, B, C))
    torch.library.opcheck(torch.ops.aum.torch_scan, (u, delta, A, B, C, options))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_model_compiles_without_a_graph_break(backend):
    model = aum.create_model("aum_nano", n_mels=32, target_length=32, embed_dim=16, direction="bi_bi").eval()
    x = torch.randn(3, 1, 32, 32)
    with aum.use_backend(backend):
        expected = model(x)
        gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
        names = list(model.state_dict())
        model.compile(fullgraph=True, backend="aot_eager")
        for batch in (3, 2, 1):  # a last batch that is smaller
            torch.testing.assert_close(model(x[:batch]), expected[:batch])
        got = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, e in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    torch._dynamo.reset()


def test_triton_in_its_interpreter_through_the_public_functions():
    program = (
        "import torch, aum\n"
        "torch.manual_seed(0)\n"
        "mixer, x = aum.BiMamba(8, d_state=3), torch.randn(1, 3, 8)\n"
        "def run(backend):\n"
        "    with aum.use_backend(backend):\n"
        "        y = mixer(x)\n"
        "    return [y, *torch.autograd.grad(y.sin().sum(), list(mixer.parameters()))]\n"
        "for a, b in zip(run('triton'), run('torch')):\n"
        "    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)\n"
        "u, A = torch.randn(1, 4, 5, requires_grad=True), -torch.rand(4, 2)\n"
        "B = torch.randn(1, 2, 5)\n"
        "a, b = (torch.autograd.grad(aum.selective_scan_fn(u, u.exp(), A, B, B, backend=k, reverse=True).sum(), u)[0]\n"
        "        for k in ('triton', 'torch'))\n"
        "torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)\n"
        "assert aum.self_test('cpu') == 'cpu'\n"
        "with aum.use_backend('triton'): assert aum.self_test('cpu') == 'triton'\n"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, check=True)


def test_the_self_test_finds_a_mistake(monkeypatch):
    from aum.scan import cpu_kernels

    right = cpu_kernels.scan_backward
    state = torch.get_rng_state()
    assert aum.self_test("cpu") == "cpu"
    assert torch.equal(torch.get_rng_state(), state), "it drew from the global generator"

    def wrong(*args):
        dA, *others = right(*args)
        return 1.1 * dA, *others

    monkeypatch.setattr(cpu_kernels, "scan_backward", wrong)
    with pytest.raises(aum.SelfTestFailed, match="'cpu' calculates wrongly.*A_log differs"):
        aum.self_test("cpu")
    monkeypatch.setattr(cpu_kernels, "scan_backward", lambda *args: 1 / 0)
    with pytest.raises(aum.SelfTestFailed, match="'cpu' fails on this machine: ZeroDivisionError"):
        aum.self_test("cpu")


@pytest.fixture
def trust_again():
    """What `choose` passes over is forgotten after the test."""
    yield
    backends._passed_over.clear()
    backends._choose.cache_clear()


def test_the_self_test_runs_the_models_own_sizes(monkeypatch):
    from aum.scan import cpu_kernels

    seen, long, short = [], cpu_kernels.scan_forward, cpu_kernels.mixer_forward
    monkeypatch.setattr(cpu_kernels, "scan_forward", lambda u, *args: seen.append(u.shape[2:]) or long(u, *args))
    monkeypatch.setattr(cpu_kernels, "mixer_forward", lambda xz, *args: seen.append(xz.shape[1:]) or short(xz, *args))
    for name, sizes in {"aum_small": (65, 768), "aum_nano": (17, 2 * 96)}.items():  # the short one has x and z
        assert aum.self_test("cpu", config=aum.create_config(name)) == "cpu"
        assert seen.pop() == sizes
    monkeypatch.setattr(
        cpu_kernels, "mixer_forward", lambda xz, *args: short(xz, *args) if xz.shape[2] < 256 else 1 / 0
    )
    assert aum.self_test("cpu") == "cpu"
    with pytest.raises(aum.SelfTestFailed, match="'cpu' fails on this machine"):
        aum.self_test("cpu", config=aum.create_config("aum_nano_8bit"))


def test_where_a_backend_fails_the_next_one_is_taken_unless_it_was_named(monkeypatch, caplog, trust_again):
    from aum.scan import cpu_kernels

    config = aum.create_config("aum_nano")
    monkeypatch.delenv("AUM_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(cpu_kernels, "mixer_backward", lambda *args: 1 / 0)
    with aum.use_backend("cpu"), pytest.raises(aum.SelfTestFailed):
        aum.tested_backend("cpu", torch.float32, config)
    monkeypatch.setenv("AUM_SCAN_BACKEND", "cpu")
    with pytest.raises(aum.SelfTestFailed):
        aum.tested_backend("cpu", torch.float32, config)
    monkeypatch.delenv("AUM_SCAN_BACKEND")
    caplog.set_level("INFO")
    assert aum.tested_backend("cpu", torch.float32, config) == "torch" == backends.choose("cpu", torch.float32)
    assert backends.choose("cpu", torch.bfloat16) == "cpu"  # which nobody has tested
    (line,) = [x.getMessage() for x in caplog.records if "'torch'" in x.getMessage()]
    assert "not 'cpu': the scan backend 'cpu' fails on this machine: ZeroDivisionError" in line
    aum.AudioMamba(config)(torch.randn(1, 1, 256, 65)).sum().backward()


def test_fused_is_what_the_mixer_runs(monkeypatch):
    called = []
    monkeypatch.setattr("aum.mamba.mixer", lambda *args: called.append(args[-1]) or fused.mixer(*args))
    mixer, hidden = aum.BiMamba(8), torch.randn(1, 2, 8)
    mixer(hidden)
    assert called == ["cpu"]


def test_a_pruned_or_hooked_inner_projection_is_called_as_a_module():
    mixer, hidden = mixer_and_input("bi_bi")
    torch.nn.utils.prune.l1_unstructured(mixer.x_proj, "weight", amount=0.5)
    seen = []
    mixer.dt_proj_b.register_forward_hook(lambda *args: seen.append(1))
    for _ in range(2):  # a stale weight would be a graph that is gone
        got = mixed(mixer, hidden, "cpu")
        for a, e in zip(got, mixed(mixer, hidden, "torch"), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    gradient = got[2 + [name for name, _ in mixer.named_parameters()].index("x_proj.weight_orig")]
    assert (gradient[mixer.x_proj.weight_mask == 0] == 0).all()


def test_bfloat16_is_rounded_to_the_nearest():
    from aum.scan import cpu_kernels

    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 70).bfloat16(), torch.randn(1, 70, 4)  # whole vectors and a remainder
    exact = cpu_kernels.conv_forward(x.float(), weight, None, (False,)).bfloat16()
    got = cpu_kernels.conv_forward(x, weight, None, (False,))
    assert (got == exact).float().mean() > 0.99  # cut off instead of rounded, it is a half
