"""Convolutions over a grid, and mixers of short sequences, by the C kernels: against plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F

import aum
from aum.scan import cpu_kernels, grid
from aum.scan.build import NotAvailable, library
from aum.scan.grid import convolution, relu_sum

try:
    library()
except NotAvailable as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

SHAPES = {  # b, h, w, c, o, kernel, stride, padding, depthwise
    "stem 1": (3, 24, 65, 1, 8, (3, 3), (2, 2), (1, 1), False),
    "stem 2": (2, 13, 33, 8, 32, (3, 3), (2, 2), (1, 1), False),
    "1 x 1, rows joined": (5, 8, 17, 32, 64, (1, 1), (1, 1), (0, 0), False),
    "1 x 1": (5, 7, 17, 32, 64, (1, 1), (1, 1), (0, 0), False),
    "depthwise": (3, 9, 17, 64, 64, (3, 3), (1, 1), (1, 1), True),
    "patches": (2, 9, 17, 32, 48, (4, 1), (4, 1), (0, 0), False),
    "odd sizes": (40, 6, 5, 10, 13, (3, 2), (1, 2), (0, 1), False),
    "odd depthwise": (3, 9, 4, 11, 11, (5, 3), (1, 1), (2, 1), True),
    "stride beyond the kernel": (2, 9, 7, 5, 7, (2, 2), (3, 3), (0, 0), False),
    "one pixel": (1, 1, 1, 3, 3, (1, 1), (1, 1), (0, 0), True),
}


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)).item()


def assert_close(ours, theirs, limit=3e-6):
    for name, theirs_ in theirs.items():
        assert distance(ours[name], theirs_) < limit, name


def plain(x, affine, relu, weight, bias, stride, padding, depthwise):
    """The same in plain PyTorch: y, and its sums."""
    if affine is not None:
        x = x * affine[0] + affine[1]
        x = F.relu(x) if relu else x
    groups = x.shape[3] if depthwise else 1
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, groups=groups).permute(0, 2, 3, 1)
    return y, torch.stack([y.sum((0, 1, 2)), y.square().sum((0, 1, 2))])


@pytest.mark.parametrize("normed, relu, biased, sums", [(1, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_and_its_gradients_are_pytorchs(shape, normed, relu, biased, sums):
    b, h, w, c, o, kernel, stride, padding, depthwise = shape
    torch.manual_seed(0)
    exact = {"x": torch.randn(b, h, w, c), "weight": torch.randn(o, 1 if depthwise else c, *kernel)}
    exact |= {"affine": torch.randn(2, c)} if normed else {}
    exact |= {"bias": torch.randn(o)} if biased else {}
    single = {name: x.requires_grad_() for name, x in exact.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in exact.items()}

    def run(tensors, function, *more):
        x, affine, weight, bias = (tensors.get(name) for name in ("x", "affine", "weight", "bias"))
        y, total = function(x, affine, bool(relu), weight, bias, list(stride), list(padding), *more)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape).to(y)).sum()
        loss = loss + (total * torch.randn(2, o) * 0.1).sum() if sums else loss
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        return {"y": y} | ({"sums": total} if sums else {}) | dict(zip(tensors, gradients, strict=True))

    assert_close(run(single, convolution, bool(sums)), run(exact, plain, depthwise))


@pytest.mark.parametrize("normed", [False, True])
def test_the_sum_of_a_residual_and_its_gradients_are_pytorchs(normed):
    torch.manual_seed(0)
    single = {"x": torch.randn(3, 5, 7, 10), "y": torch.randn(3, 5, 7, 10), "affine": torch.randn(2, 10)}
    single |= {"x_affine": torch.randn(2, 10)} if normed else {}
    exact = {name: x.double().requires_grad_() for name, x in single.items()}
    single = {name: x.requires_grad_() for name, x in single.items()}
    dout = torch.randn(3, 5, 7, 10)

    def run(t, out):
        return {"out": out} | dict(zip(t, torch.autograd.grad(out, list(t.values()), dout.to(out)), strict=True))

    x = F.relu(exact["x"] * exact["x_affine"][0] + exact["x_affine"][1]) if normed else exact["x"]
    theirs = run(exact, F.relu(x + exact["y"] * exact["affine"][0] + exact["affine"][1]))
    ours = run(single, relu_sum(single["x"], single.get("x_affine"), normed, single["y"], single["affine"]))
    assert_close(ours, theirs)


def trained(model, x, scene, backend, dtype):
    """Return logits, gradients and buffers after one step's forward and backward pass."""
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    with aum.use_backend(backend):
        logits = model(x)
        F.cross_entropy(logits, scene).backward()
    return {"logits": logits} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"stem_blocks": 0, "embed_dim": 40, "patch_size": (16, 2)}, {"stem_blocks": 2, "direction": "fo_fo"}],
)
def test_a_small_models_step_is_that_of_plain_pytorch(changes, training):
    torch.manual_seed(0)
    model = aum.create_model("aum_nano", n_mels=64, target_length=33, **changes).train(training)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x, scene = torch.randn(8, 1, 64, 33), torch.arange(8)
    exact = trained(model, x, scene, "torch", torch.float64)
    plain_ = trained(model, x, scene, "torch", torch.float32)
    ours = trained(model, x, scene, "cpu", torch.float32)
    for name, value in exact.items():  # rounding in a model of many layers depends on the order of sums
        assert distance(ours[name], value) < 3 * distance(plain_[name], value) + 1e-5, name


def test_a_value_that_is_not_a_number_is_not_lost_in_a_relu():
    model = aum.create_model("aum_nano", n_mels=64, target_length=33)
    x = torch.randn(2, 1, 64, 33)
    x[0, 0, 10, 10] = torch.nan
    for training in (True, False):
        assert model.train(training)(x)[0].isnan().all()


def test_a_patch_that_is_taller_than_a_kernel_may_be_is_left_to_pytorch():
    model = aum.create_model("aum_nano", n_mels=96, target_length=33, patch_size=(20, 1))
    x = torch.randn(2, 1, 96, 33)
    with aum.use_backend("torch"):
        expected = model.eval()(x)
    assert distance(model(x), expected) < 1e-5


def test_a_norm_is_trained_behind_a_convolution_that_is_not():
    """Where x needs no gradient, its norm may."""
    x, weight, affine = torch.randn(2, 5, 9, 8), torch.randn(16, 8, 1, 1), torch.randn(2, 8)
    found = []
    for of_x in (True, False):
        scaled = affine.clone().requires_grad_()
        y, _ = convolution(x.clone().requires_grad_(of_x), scaled, True, weight, None, [1, 1], [0, 0], False)
        found.append(torch.autograd.grad(y.square().sum(), scaled)[0])
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("weight", [(4, 1, 3, 3), (8, 4, 3, 3), (8, 8, 17, 1)], ids=["groups", "channels", "tall"])
def test_a_convolution_without_a_kernel_is_refused(weight):
    with pytest.raises(ValueError, match="no kernel for a weight"):
        convolution(torch.randn(1, 20, 9, 8), None, False, torch.randn(weight), None, [1, 1], [1, 1], False)


@pytest.mark.parametrize("change", ["backward hook", "another function", "another convolution"])
def test_a_changed_stem_is_left_to_pytorch(change):
    torch.manual_seed(0)
    stem, called = aum.create_model("aum_nano").stem.eval(), []
    if change == "backward hook":
        stem[0][0].register_full_backward_hook(lambda *_: called.append(1))
    elif change == "another function":
        stem[0][2] = torch.nn.GELU()
    else:
        twice = {"forward": lambda self, x: 2 * F.conv2d(x, self.weight, None, 2, 1)}
        stem[0][0].__class__ = type("Twice", (torch.nn.Conv2d,), twice)
    x = torch.randn(1, 1, 32, 33, requires_grad=True)
    y = stem(x)
    with aum.use_backend("torch"):
        assert torch.equal(stem(x), y)
    y.sum().backward()
    assert bool(called) == (change == "backward hook")


def test_a_hook_is_called():
    model, seen = aum.create_model("aum_nano", n_mels=64, target_length=33), []
    model.stem[0][1].register_forward_hook(lambda *_: seen.append("norm"))
    model.local[0].register_forward_hook(lambda *_: seen.append("local"))
    model(torch.randn(2, 1, 64, 33))
    assert seen == ["norm", "local"]


@pytest.mark.parametrize(
    "d_model, d_state, d_conv, expand, direction, b, l",
    [
        (48, 4, 4, 2, "bi_bi", 40, 17),
        (64, 4, 4, 2, "fo_fo", 3, 17),
        (48, 5, 3, 2, "bi_bi", 3, 40),
        (96, 16, 2, 1, "bi_bi", 2, 9),
        (16, 3, 4, 1, "bi_bi", 2, 1),
    ],
)
def test_a_mixer_of_short_sequences_is_the_long_ones(d_model, d_state, d_conv, expand, direction, b, l, monkeypatch):
    torch.manual_seed(0)
    mixer = aum.BiMamba(d_model, d_state, d_conv, expand, direction)
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    hidden, dy = torch.randn(b, l, d_model), torch.randn(b, l, d_model)

    def run():
        x = hidden.clone().requires_grad_()
        y = mixer(x)
        inputs = {"hidden": x, **dict(mixer.named_parameters())}
        return {"y": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))

    calls, short = [], cpu_kernels.mixer_backward
    monkeypatch.setattr(cpu_kernels, "mixer_backward", lambda *x: calls.append(1) or short(*x))
    ours = run()
    assert calls, "the sizes are not those of a short sequence"
    monkeypatch.setattr(cpu_kernels, "is_short", lambda *_: False)
    assert_close(ours, run(), 5e-6)


def test_the_self_test_finds_a_wrong_convolution(monkeypatch):
    config, right = (
        aum.AuMConfig(stem=(8, 32), stem_blocks=1, patch_size=(4, 1), d_state=4, embed_dim=48),
        grid.convolution,
    )
    assert aum.self_test("cpu", config=config) == "cpu"
    monkeypatch.setattr(grid, "convolution", lambda *x: [y * 1.1 for y in right(*x)])
    for sizes in (config, None):
        with pytest.raises(aum.SelfTestFailed, match="calculates wrongly"):
            aum.self_test("cpu", config=sizes)
    monkeypatch.setattr(grid, "convolution", right)
    short = cpu_kernels.mixer_forward
    monkeypatch.setattr(cpu_kernels, "mixer_forward", lambda *x: 1.1 * short(*x))
    with pytest.raises(aum.SelfTestFailed, match="calculates wrongly"):
        aum.self_test("cpu")


def test_any_number_of_threads_gives_the_same_bits():
    torch.manual_seed(0)
    weight, mixer = torch.randn(32, 8, 3, 3, requires_grad=True), aum.BiMamba(48, 4)
    x, rows = torch.randn(40, 9, 17, 8, requires_grad=True), torch.randn(40, 17, 48, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, sums = convolution(x, None, False, weight, None, [2, 2], [1, 1], True)
            with torch.no_grad():
                found.append([y, sums, mixer(rows)])
            found[-1] += torch.autograd.grad(y.square().sum() + sums.sum(), [x, weight])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        dy = torch.randn(40, 17, 96)
        xz, parameters = torch.randn(40, 17, 192), _parameters(mixer)
        gradients = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            gradients.append(cpu_kernels.mixer_backward(dy, xz, *parameters))
        for other in gradients[1:]:
            assert all(map(torch.equal, gradients[0], other))
    finally:
        torch.set_num_threads(before)


def _parameters(mixer):
    pairs = [(getattr(mixer, name), getattr(mixer, name + "_b")) for name in ("conv1d", "x_proj", "dt_proj")]
    conv, x_proj, dt_proj = ([*pair] for pair in pairs)
    return [
        x.detach()
        for x in (
            torch.stack([m.weight.squeeze(1) for m in conv]),
            torch.stack([m.bias for m in conv]),
            torch.stack([m.weight for m in x_proj]),
            torch.stack([m.weight for m in dt_proj]),
            torch.stack([m.bias for m in dt_proj]),
            torch.stack([mixer.A_log, mixer.A_b_log]),
            torch.stack([mixer.D, mixer.D_b]),
        )
    ]
