"""The selective scan against a loop written apart from it, in float64, with every option and every gradient."""

import pytest
import torch
import torch.nn.functional as F

import aum
from aum.scan.torch_scan import CHUNK


def loop_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reverse=False):
    """The definition, one step and one state at a time: B and C are (b, g, n, l) or (d, n)."""
    (b, d, l), n = u.shape, A.shape[1]
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (x.expand(b, l, d, n).permute(0, 2, 3, 1) if x.dim() == 2 else x for x in (B, C))
    B, C = (x[:, torch.arange(d) // (d // x.shape[1])] for x in (B, C))  # (b, d, n, l)
    h, columns = torch.zeros(b, d, n, dtype=u.dtype), [None] * l
    for t in reversed(range(l)) if reverse else range(l):
        h = torch.exp(delta[:, :, t, None] * A) * h + delta[:, :, t, None] * u[:, :, t, None] * B[..., t]
        columns[t] = (C[..., t] * h).sum(-1)
    y = torch.stack(columns, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * z * torch.sigmoid(z)), h


def make(b=2, d=6, l=7, n=3, groups=1, constant=False, options=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (d, n) if constant else (b, groups, n, l)
    arguments = {
        "u": normal(b, d, l),
        "delta": normal(b, d, l) if options else normal(b, d, l).abs() * 0.5,
        "A": -normal(d, n).exp(),
        "B": normal(*shape),
        "C": normal(*shape),
    }
    if options:
        arguments |= {"D": normal(d), "z": normal(b, d, l), "delta_bias": normal(d)}
    return {name: value.requires_grad_() for name, value in arguments.items()}


def compare(arguments, tolerance=1e-12, **options):
    y, last = aum.selective_scan_fn(**arguments, **options, return_last_state=True)
    options.pop("backend", None)
    expected_y, expected_last = loop_scan(**arguments, **options)
    torch.testing.assert_close(y, expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last, expected_last, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y), torch.ones_like(last)
    inputs = list(arguments.values())
    got = torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), inputs)
    expected = torch.autograd.grad((expected_y * weights[0]).sum() + (expected_last * weights[1]).sum(), inputs)
    for name, a, e in zip(arguments, got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("l", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 65])
def test_every_length_around_the_chunks(l, reverse):
    compare(make(l=l), delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize("groups, constant", [(1, False), (2, False), (3, False), (6, False), (1, True)])
@pytest.mark.parametrize("options, delta_softplus", [(True, True), (False, False)])
def test_groups_and_options(groups, constant, options, delta_softplus):
    compare(make(groups=groups, constant=constant, options=options), delta_softplus=delta_softplus)


def test_each_single_option():
    full = make()
    for kept in (None, "D", "z", "delta_bias"):
        arguments = {k: v for k, v in full.items() if k not in ("D", "z", "delta_bias") or k == kept}
        compare(arguments, delta_softplus=True)


def test_shapes_of_B_and_C():
    """They may have different groups, and with three dimensions they are one group."""
    compare(make(groups=2) | {"C": make(groups=3, seed=1)["C"]}, delta_softplus=True)
    arguments = make()
    flat = dict(arguments, B=arguments["B"][:, 0], C=arguments["C"][:, 0])
    assert torch.equal(aum.selective_scan_fn(**flat), aum.selective_scan_fn(**arguments))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    arguments = make(b=1, d=2, l=CHUNK + 2, n=2)

    def scan(*values):
        return aum.selective_scan_fn(
            *values, delta_softplus=True, return_last_state=True, reverse=reverse, backend="torch"
        )

    assert torch.autograd.gradcheck(scan, tuple(arguments.values()))


def test_long_sequence_and_strong_decay():
    arguments = make(b=1, d=3, l=600, n=2)
    with torch.no_grad():
        arguments["A"].mul_(40)  # decays of e^-100 and less a step: cumulative products would underflow
    compare(arguments, delta_softplus=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision_input_keeps_a_float32_state(dtype, tolerance):
    arguments = make(l=65)
    low = {k: v.detach().to(torch.float32 if k in ("A", "D", "delta_bias") else dtype) for k, v in arguments.items()}
    y, last = aum.selective_scan_fn(**low, delta_softplus=True, return_last_state=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    expected_y, expected_last = loop_scan(**{k: v.double() for k, v in low.items()}, delta_softplus=True)
    torch.testing.assert_close(y.double(), expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_state():
    arguments = {k: v.detach().float().requires_grad_() for k, v in make(l=40).items()}
    plain = aum.selective_scan_fn(**arguments, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = aum.selective_scan_fn(**arguments, delta_softplus=True)
    assert torch.equal(plain, inside)


def test_memory_kept_for_backward_does_not_hold_the_states():
    kept = []
    b, d, l, n = 2, 8, 16 * CHUNK, 16
    arguments = {k: v.detach().float().requires_grad_() for k, v in make(b=b, d=d, l=l, n=n).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage()) or x, lambda x: x):
        aum.selective_scan_fn(**arguments, delta_softplus=True)
    bytes_kept = sum(size for _, size in {(s.data_ptr(), s.nbytes()) for s in kept})
    assert bytes_kept < b * l * d * n * 4  # less than one copy of the states; a naive loop keeps several
    assert bytes_kept < 12 * b * l * d * 4


def test_complex_A_is_refused():
    arguments = make()
    arguments["A"] = arguments["A"].to(torch.complex128)
    with pytest.raises(ValueError, match="complex"):
        aum.selective_scan_fn(**arguments)


@pytest.mark.parametrize("name", ["delta", "A", "B", "D", "z", "delta_bias"])
def test_a_wrong_shape_is_named(name):
    arguments = make()
    arguments[name] = arguments[name][..., :-1]
    with pytest.raises(ValueError, match=name if name != "A" else "shape"):
        aum.selective_scan_fn(**arguments)
