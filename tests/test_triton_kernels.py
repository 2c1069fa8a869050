"""The Triton kernels against a float64 composition in plain PyTorch: on the GPU, else in Triton's interpreter.

The interpreter is chosen when a kernel is decorated, by TRITON_INTERPRET. Setting that for the process would reach
other test modules, so it is set only while a copy of the module, private to these tests, is executed. The last test
takes another copy, without it: that one compiles the kernels for a GPU that need not be there.
"""

import functools
import importlib.util
import math
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_scan import loop_scan

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_kernels(interpreted: bool):
    path = Path(__file__).resolve().parent.parent / "aum" / "scan" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location(f"triton_kernels_{interpreted}", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1" if interpreted else "0"):
        spec.loader.exec_module(module)
    return module


kernels = load_kernels(interpreted=DEVICE == "cpu")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(name, got, expected, dtype=torch.float32):
    """Relative L2 error below 1e-4 in float32, 2e-2 in 16 bit, and nothing that is not finite."""
    assert (got is None) == (expected is None), name
    if got is None:
        return
    assert got.shape == expected.shape, name
    got, expected = got.double().cpu(), expected.double().cpu()
    assert torch.isfinite(got).all(), name
    error, norm = (got - expected).norm().item(), expected.norm().item()
    assert error <= (1e-4 if dtype == torch.float32 else 2e-2) * norm + 1e-30, f"{name}: {error} of {norm}"


# ------------------------------------------------------------------------------------------------- convolution


def plain_conv(x, weight, bias, reverse):
    """F.conv1d in float64, against time by flipping: (b, l, d) -> (k, b, l, d)."""
    outputs = []
    for k, back in enumerate(reverse):
        source = (x.flip(1) if back else x).transpose(1, 2)
        padded = F.pad(source, (weight.shape[2] - 1, 0))
        out = F.conv1d(padded, weight[k][:, None], None if bias is None else bias[k], groups=x.shape[2])
        out = F.silu(out.transpose(1, 2))
        outputs.append(out.flip(1) if back else out)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "b, l, d, w, reverse, biased, dtype",
    [
        (2, 1, 1, 4, (False, True), True, torch.float32),
        (2, 2, 5, 4, (False, True), False, torch.float32),
        (1, 3, 33, 2, (True,), True, torch.float32),
        (1, 17, 65, 3, (False,), True, torch.float32),
        (2, 65, 33, 4, (False, True), True, torch.bfloat16),
        (1, 20, 16, 4, (True, False), True, torch.float16),
    ],
)
def test_convolution(b, l, d, w, reverse, biased, dtype):
    k = len(reverse)
    wide = normal(b, l, 2 * d).to(dtype).to(DEVICE)
    x = wide[..., :d]
    weight, bias = normal(k, d, w).float().to(DEVICE), normal(k, d, seed=1).float().to(DEVICE) if biased else None
    du = normal(k, b, l, d, seed=2).to(dtype).to(DEVICE)
    leaves = [None if t is None else t.detach().double().cpu().requires_grad_() for t in (x, weight, bias)]
    expected = plain_conv(*leaves, reverse)
    u = kernels.conv_forward(x, weight, bias, reverse)
    assert u.dtype == dtype and u.is_contiguous()
    close("u", u, expected, dtype)

    dwide = torch.full_like(wide, 7.0)
    dweight, dbias = kernels.conv_backward(du.clone(), x, weight, bias, reverse, dwide[..., d:])
    again = kernels.conv_backward(du.clone(), x, weight, bias, reverse, torch.empty_like(x))
    grads = torch.autograd.grad(expected, [t for t in leaves if t is not None], du.double().cpu())
    close("dx", dwide[..., d:], grads[0], dtype)
    assert (dwide[..., :d] == 7.0).all()
    close("dweight", dweight, grads[1], dtype)
    close("dbias", dbias, grads[2] if biased else None, dtype)
    assert torch.equal(dweight, again[0])


# -------------------------------------------------------------------------------------------------------- scan


def plain_scan(u, delta, A, B, C, D, z, bias, softplus, reverse, scale):
    """The definition: y (b, l, d) and the last states (s, b, n, d)."""
    total, states = 0.0, []
    for i in range(len(u)):
        shared = (None if x is None else x[i] for x in (D, None, bias))
        B_i, C_i = (x[i].permute(0, 2, 3, 1) for x in (B, C))
        y, h = loop_scan(u[i].mT, delta[i].mT, A[i], B_i, C_i, *shared, softplus, reverse[i])
        total = total + y.mT
        states.append(h.mT)
    return scale * total * (1 if z is None else F.silu(z)), torch.stack(states)


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")


def make(b=2, l=7, d=5, n=3, s=2, g=1, without=(), dtype=torch.float32):
    """Arguments as the mixer has them: B, C, delta and z are slices of wider tensors."""
    made = {
        "u": normal(s, b, l, d),
        "delta": normal(s, b, l, d + 3, seed=1)[..., 3:],
        "A": -normal(s, d, n).exp(),
        "B": normal(s, b, l, 2 * g * n, seed=2)[..., : g * n].unflatten(-1, (g, n)),
        "C": normal(s, b, g, n, l, seed=3).permute(0, 1, 4, 2, 3),
        "D": normal(s, d, seed=4),
        "z": normal(b, l, 2 * d, seed=5)[..., d:],
        "bias": normal(s, d, seed=6),
    }
    kinds = {name: torch.float32 if name in ("A", "D", "bias") else dtype for name in NAMES}
    # .to() keeps the strides of a slice only where it copies nothing, so the slices are taken again by as_strided.
    return {k: None if k in without else strided(v, kinds[k]) for k, v in made.items()}


def strided(x, dtype):
    """x in a dtype and on the device, with the strides it had."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(extent, dtype=dtype, device=DEVICE).as_strided(x.shape, x.stride()).copy_(x.to(dtype))


def spaced(x, gap=3):
    """An output like x whose rows lie apart (stride 1 on the last axis)."""
    return torch.full((*x.shape[:-1], x.shape[-1] + gap), 7.0, dtype=x.dtype, device=x.device)[..., : x.shape[-1]]


def run(arguments, softplus, reverse, scale, dy, dlast):
    values = [arguments[name] for name in NAMES]
    y, last, states = kernels.scan_forward(*values, softplus, reverse, scale, True)
    u, delta, _, B, C, _, z, _ = values
    outs = {"u": spaced(u), "delta": spaced(delta), "B": spaced(B), "C": spaced(C.transpose(2, 4)).transpose(2, 4)}
    outs["z"] = None if z is None else spaced(z)
    grads = kernels.scan_backward(dy, dlast, *values, softplus, reverse, scale, states, *outs.values())
    return y, last, outs | dict(zip(("A", "D", "bias"), grads, strict=True))


def compare(arguments, softplus=True, reverse=(False, True), scale=0.5, with_dlast=True):
    dtype, (s, b, l, d), n = arguments["u"].dtype, arguments["u"].shape, arguments["A"].shape[2]
    dy, dlast = normal(b, l, d, seed=8).to(dtype).to(DEVICE), normal(s, b, n, d, seed=9).float().to(DEVICE)
    dlast = dlast if with_dlast else None
    reverse = reverse[:s]
    y, last, got = run(arguments, softplus, reverse, scale, dy, dlast)
    leaves = {k: None if v is None else v.detach().double().cpu().requires_grad_() for k, v in arguments.items()}
    expected_y, expected_last = plain_scan(**leaves, softplus=softplus, reverse=reverse, scale=scale)
    assert y.dtype == dtype and y.is_contiguous() and last.dtype == torch.float32
    close("y", y, expected_y, dtype)
    close("last", last, expected_last)
    loss = (expected_y * dy.double().cpu()).sum()
    loss = loss if dlast is None else loss + (expected_last * dlast.double().cpu()).sum()
    present = [k for k in NAMES if leaves[k] is not None]
    grads = dict(zip(present, torch.autograd.grad(loss, [leaves[k] for k in present], allow_unused=True), strict=True))
    for name in NAMES:
        kind = torch.float32 if name in ("A", "D", "bias") else dtype
        close(f"d{name}", got[name], grads.get(name), kind)


@pytest.mark.parametrize("b, l, d, n", [(2, 1, 1, 1), (2, 2, 5, 2), (1, 3, 33, 5), (1, 65, 6, 16), (1, 6, 20, 64)])
def test_sizes(b, l, d, n):
    compare(make(b, l, d, n))


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("bias",), ("D", "z", "bias")])
@pytest.mark.parametrize("s", [1, 2])
def test_options(s, without, softplus):
    arguments = make(s=s, without=without)
    if not softplus:  # step sizes are positive; without softplus a negative one would let the state grow
        arguments["delta"].abs_().mul_(0.3)
        if arguments["bias"] is not None:
            arguments["bias"].abs_().mul_(0.3)
    compare(arguments, softplus, reverse=(True, False) if softplus else (False, True), with_dlast=softplus)


@pytest.mark.parametrize("g, d, dtype", [(2, 6, torch.float32), (3, 9, torch.bfloat16)])
def test_groups(g, d, dtype):
    compare(make(b=1, l=5, d=d, g=g, dtype=dtype))


def test_several_tiles_of_channels_in_each_group():
    compare(make(b=1, l=3, d=80, n=32, g=2))


@pytest.mark.parametrize("l, d, dtype", [(17, 33, torch.bfloat16), (9, 12, torch.float16)])
def test_low_precision(l, d, dtype):
    compare(make(b=1, l=l, d=d, n=16, dtype=dtype))


def test_directions_that_share_their_input():
    arguments = make()
    for name in ("u", "delta"):
        arguments[name] = arguments[name][:1].expand(2, -1, -1, -1)
    dy, dlast = normal(2, 7, 5, seed=8).float().to(DEVICE), None
    y, last, got = run(arguments, True, (False, True), 1.0, dy, dlast)
    copies = {k: v.contiguous() if k in ("u", "delta") else v for k, v in arguments.items()}
    y2, last2, got2 = run(copies, True, (False, True), 1.0, dy, dlast)
    assert torch.equal(y, y2) and torch.equal(last, last2)
    assert all(torch.equal(got[k], got2[k]) for k in NAMES)
    compare(arguments)


def test_without_keep_nothing_is_stored():
    values = list(make().values())
    y, last, states = kernels.scan_forward(*values, True, (False, True), 1.0, False)
    kept = kernels.scan_forward(*values, True, (False, True), 1.0, True)
    assert states.numel() == 0 and kept[2].numel() > 0
    assert torch.equal(y, kept[0]) and torch.equal(last, kept[1])


def test_an_empty_batch():
    arguments = make()
    for name in ("u", "delta", "B", "C"):
        arguments[name] = arguments[name][:, :0]
    arguments["z"] = arguments["z"][:0]
    dy, dlast = torch.empty(0, 7, 5, device=DEVICE), torch.empty(2, 0, 3, 5, device=DEVICE)
    y, last, got = run(arguments, True, (False, True), 1.0, dy, dlast)
    assert y.shape == (0, 7, 5) and last.shape == (2, 0, 3, 5)
    assert all((got[k] == 0).all() for k in ("A", "D", "bias"))
    x, weight, bias = y, torch.ones(2, 5, 4, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    u = kernels.conv_forward(x, weight, bias, (False, True))
    assert u.shape == (2, 0, 7, 5)
    assert all((g == 0).all() for g in kernels.conv_backward(u, x, weight, bias, (False, True), torch.empty_like(x)))


def test_extreme_step_sizes():
    arguments = make(b=1, l=11, d=16, without=("bias",))
    sizes = torch.logspace(-6, 3, 16, dtype=torch.float64)
    arguments["delta"].copy_(sizes.where(sizes > 20, torch.log(torch.expm1(sizes))))  # softplus of it is `sizes`
    compare(arguments)
    arguments["delta"].copy_(sizes)
    compare(arguments, softplus=False)


def test_strong_decay():
    arguments = make(b=1, l=25, d=3, n=2)
    arguments["A"].mul_(40)  # decays of e^-100 and less a step
    compare(arguments)


def test_softplus_of_very_negative_input_keeps_its_digits():
    arguments = make(b=1, l=1, d=31, n=1, s=1, without=("D", "z", "bias"))
    arguments["delta"].copy_(torch.linspace(-20, 30, 31))
    arguments["u"].fill_(1), arguments["B"].fill_(1), arguments["C"].fill_(1)
    y = kernels.scan_forward(*arguments.values(), True, (False,), 1.0, False)[0]  # after one step: the step size
    expected = -F.logsigmoid(-arguments["delta"][0].double())
    torch.testing.assert_close(y.double(), expected, rtol=5e-6, atol=0)


def test_gates_far_from_zero():
    arguments = make(b=1, l=2, d=8)
    arguments["z"].copy_(torch.tensor([-1e4, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, 1e4]))
    compare(arguments)


def test_two_passes_give_the_same_bits():
    arguments = make(b=1, l=6, d=36, n=16)
    dy, dlast = normal(1, 6, 36, seed=8).float().to(DEVICE), normal(2, 1, 16, 36).float().to(DEVICE)
    first, second = (run(arguments, True, (False, True), 0.5, dy, dlast) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][k], second[2][k]) for k in NAMES)


# ------------------------------------------------------------------------------------------------- compilation


class Compiled:
    """Stands in for a kernel of the module: compiles what a launch would, for a GPU that need not be there."""

    def __init__(self, kernel, target):
        self.kernel, self.target, self.result = kernel, target, None

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, **kwargs):
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        for i, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, tuple):  # an integer of 1 is compiled in
                signature[name] = tuple("constexpr" if x == 1 else "i32" for x in value)
                constants |= {(i, q): 1 for q, x in enumerate(value) if x == 1}
            elif isinstance(value, torch.Tensor):
                signature[name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.result = triton.compile(source, target=self.target, options={"num_warps": num_warps})


not_interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="triton is interpreted")


@not_interpreted
def test_the_kernels_compile_for_a_gpu_that_is_not_here(monkeypatch):
    compiler = pytest.importorskip("triton.backends.compiler")
    compiled = load_kernels(interpreted=False)
    names = ("_conv_forward", "_conv_backward_weight", "_conv_backward_input")
    names += ("_scan_forward", "_scan_backward", "_sum_tiles")
    kernel = {name: Compiled(getattr(compiled, name), compiler.GPUTarget("cuda", 90, 32)) for name in names}
    for name in names:
        monkeypatch.setattr(compiled, name, kernel[name])
    b, l, d, n, k, low = 2, 3, 32, 16, 2, torch.bfloat16
    x, weight, bias = torch.empty(b, l, 2 * d, dtype=low)[..., :d], torch.empty(k, d, 4), torch.empty(k, d)
    u = compiled.conv_forward(x, weight, bias, (False, True))
    compiled.conv_backward(u, x, weight, bias, (False, True), x)
    B, A = torch.empty(k, b, l, 1, n, dtype=low), torch.empty(k, d, n)
    shared = (u, u, A, B, B, bias, x, bias, True, (False, True), 0.5)
    y, last, states = compiled.scan_forward(*shared, True)
    compiled.scan_backward(y, last, *shared, states, u, u, B, B, x)
    assert all(".target sm_90" in kernel[name].result.asm["ptx"] for name in names)


@not_interpreted
def test_aum_smalls_state_stays_in_registers(monkeypatch, tmp_path):
    """What NVIDIA's assembler reports of the backward pass in training, for sm_90."""
    compiler = pytest.importorskip("triton.backends.compiler")
    compiled = load_kernels(interpreted=False)
    kernel = Compiled(compiled._scan_backward, compiler.GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(compiled, "_scan_backward", kernel)
    monkeypatch.setattr(compiled, "_sum_tiles", mock.MagicMock())
    b, l, d, n, k = 64, 65, 768, 16, 2
    new = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    u, z, p = new(k, b, l, d), new(b, l, 2 * d)[..., d:], new(k, b, l, 1, 24 + 2 * n)
    B, C = p[..., 24 : 24 + n], p[..., 24 + n :]
    A, D = torch.empty(k, d, n, device="meta"), torch.empty(k, d, device="meta")
    states = torch.empty(compiled.states_shape(k, b, l, d, 1, n), device="meta")
    compiled.scan_backward(new(b, l, d), None, u, u, A, B, C, D, z, D, True, (False, True), 0.5, states, u, u, B, C, z)
    (tmp_path / "kernel.ptx").write_text(kernel.result.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert (
        "0 bytes spill stores, 0 bytes spill loads" in report and int(re.search(r"Used (\d+) regis", report)[1]) < 255
    )


@pytest.mark.parametrize("itemsize, at_most", [(2, 1.5), (4, 1.25)])
def test_few_states_are_kept(itemsize, at_most):
    """AuM-Small keeps little more than the 5,872 values a token that any implementation must keep."""
    for l in (33, 65, 129, 641, 1025, 4097):
        states = math.prod(kernels.states_shape(2, 1, l, 768, 1, 16))
        assert 1 + 4 * states / (5872 * l * itemsize) <= at_most
