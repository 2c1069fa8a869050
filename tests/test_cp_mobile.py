"""CP-Mobile against its description, and as one of the models that --model takes."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal
from torch import Tensor, nn

import aum
from dcase.model import named as models
from dcase.model.cp_mobile import CPMobile
from dcase.model.named import ModelConfig, build, fill
from dcase.runs.config import TrainConfig, from_plain, to_plain

BLOCKS = {
    "stages.s1.b1": (32, 64, 32, (1, 1)),
    "stages.s1.b2": (32, 64, 32, (1, 1)),
    "stages.s1.b3": (32, 64, 32, (1, 2)),
    "stages.s2.b4": (32, 64, 56, (2, 1)),
    "stages.s2.b5": (56, 120, 56, (1, 1)),
    "stages.s3.b6": (56, 120, 104, (1, 1)),
}


def random_model(seed: int = 0) -> CPMobile:
    """With statistics and norms that are not 0 and 1, as after training."""
    torch.manual_seed(seed)
    model = CPMobile().eval()
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        for tensor, middle in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
            nn.init.uniform_(tensor, middle - 0.5, middle + 0.5)
    return model


# The network


def test_size_and_names_are_the_published_ones():
    state = CPMobile().state_dict()
    assert sum(p.numel() for p in CPMobile().parameters()) == 61_148
    convs = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.ndim == 4}
    expected = {"in_c.0.0.weight": (8, 1, 3, 3), "in_c.1.0.weight": (32, 8, 3, 3)}
    for name, (c_in, width, c_out, _) in BLOCKS.items():
        expected[f"{name}.block.0.0.weight"] = (width, c_in, 1, 1)
        expected[f"{name}.block.1.0.weight"] = (width, 1, 3, 3)
        expected[f"{name}.block.2.0.weight"] = (c_out, width, 1, 1)
    expected["feed_forward.0.weight"] = (10, 104, 1, 1)
    assert convs == expected
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = {f"{name.removesuffix('0.weight')}1.{tensor}" for name in convs for tensor in of_norm}
    assert set(state) == set(convs) | norms


def test_it_computes_what_is_described():
    model, x = random_model(), torch.randn(3, 1, 63, 38)
    state = model.state_dict()

    def conv(x: Tensor, name: str, relu: bool = True, **how) -> Tensor:
        weight, norm = state[f"{name}0.weight"], (state[f"{name}1.{part}"] for part in ("running_mean", "running_var"))
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, **how)
        x = F.batch_norm(x, *norm, state[f"{name}1.weight"], state[f"{name}1.bias"], eps=1e-5)
        return x.relu() if relu else x

    y = conv(conv(x, "in_c.0.", stride=2), "in_c.1.", stride=2)
    for name, (c_in, width, c_out, stride) in BLOCKS.items():
        before = y
        y = conv(conv(y, f"{name}.block.0."), f"{name}.block.1.", stride=stride, groups=width)
        y = conv(y, f"{name}.block.2.", relu=False)
        if c_in == c_out:
            ones = torch.ones(c_in, 1, 3, 3) / 9
            same = stride == (1, 1)
            y = y + (before if same else F.conv2d(before, ones, stride=stride, padding=1, groups=c_in))
        y = y.relu()
    expected = conv(y, "feed_forward.", relu=False).mean((2, 3))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((256, 65), [(64, 17), (64, 9), (32, 9), (32, 9)]),
        ((128, 64), [(32, 16), (32, 8), (16, 8), (16, 8)]),
        ((1, 1), [(1, 1)] * 4),
    ],
)
def test_every_size_goes_in_and_the_strides_are_along_the_right_axes(size, sizes):
    model, seen = CPMobile().eval(), []
    for part in (model.in_c, *model.stages):
        part.register_forward_hook(lambda _, inputs, y: seen.append(tuple(y.shape[1:])))
    assert model(torch.randn(2, 1, *size)).shape == (2, 10)
    assert seen == [(channels, *size) for channels, size in zip((32, 32, 56, 104), sizes, strict=True)]
    assert CPMobile(n_classes=4)(torch.randn(2, 1, 32, 32)).shape == (2, 4)


def test_initialisation():
    torch.manual_seed(0)
    for name, layer in CPMobile().named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
            deviation = (layer.weight * (fan_out / 2) ** 0.5).std()
            assert abs(deviation - 1) < 4 / (2 * layer.weight.numel()) ** 0.5, name  # 4 standard errors
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.all(layer.weight == 1) and torch.all(layer.bias == 0), name


def tones(scene: Tensor) -> Tensor:
    """(n,) -> (n, 1, 64, 17): noise, and four mel bins that stand out, elsewhere for each of four scenes."""
    x = 0.3 * torch.randn(len(scene), 1, 64, 17)
    for clip, s in zip(x, scene.tolist(), strict=True):
        clip[0, 16 * s + 6 : 16 * s + 10] += 1
    return x


def test_it_learns_to_tell_tones_apart():
    torch.manual_seed(0)
    steps, scene = 60, torch.arange(32) % 4
    model = CPMobile(n_classes=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(tones(scene)), scene).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimiser.step()
        schedule.step()
    assert torch.equal(model.eval()(tones(scene)).argmax(1), scene)  # BatchNorm's running statistics have caught up


def test_weight_decay_is_for_convolutions_only():
    model = CPMobile()
    decayed, spared = (group["params"] for group in aum.parameter_groups(model, 0.01))
    assert {p.ndim for p in decayed} == {4} and {p.ndim for p in spared} == {1}
    assert len(decayed) + len(spared) == len(list(model.parameters()))


# As --model cp_mobile


def test_names_and_help_list_every_model():
    assert models.names() == [*aum.list_models(), "cp_mobile"]
    help_of_model = ModelConfig.__doc__.partition("model: ")[2].partition("freq_norm")[0]
    assert [name for name in models.names() if name not in help_of_model] == []


def test_build_makes_cp_mobile_for_any_log_mel():
    for n_mels, frames in ((256, 65), (40, 10**9)):
        assert isinstance(build(ModelConfig("cp_mobile"), n_mels, frames), CPMobile)
    assert isinstance(build(ModelConfig("aum_nano"), 256, 65), aum.AudioMamba)


def test_a_filled_configuration_keeps_none_and_comes_back_from_a_checkpoint():
    filled = fill(ModelConfig("cp_mobile"), 256, 65)
    given = {name: value for name, value in vars(filled).items() if value is not None}
    assert given == {"model": "cp_mobile", "n_classes": 10}
    assert fill(filled, 256, 65) == filled
    back = from_plain(TrainConfig, json.loads(json.dumps(to_plain(TrainConfig(model=filled)))))
    assert back.model == filled
    state = CPMobile().state_dict()
    build(back.model, 256, 65).load_state_dict(state)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("depth", 24, "does not apply to cp_mobile: leave it out"),
        ("embed_dim", 384, "does not apply to cp_mobile: leave it out"),
        ("patch_size", (16, 16), "does not apply to cp_mobile: leave it out"),
        ("pos_embed", False, "does not apply to cp_mobile: leave it out"),
        ("dropout", 0.0, "does not apply to cp_mobile: leave it out"),
        ("n_classes", 0, "0: it is the number of the data's scenes; leave the flag out"),
        ("model", "cp_mobil", f"is one of {', '.join(models.names())}; got 'cp_mobil'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flag, value, message):
    config = ModelConfig(**{"model": "cp_mobile", flag: value})
    assert refusal(fill, config, 256, 65) == refusal(build, config, 256, 65) == f"--{flag} {message}"


def test_another_number_of_classes_than_the_datas_is_refused():
    config = ModelConfig("cp_mobile", n_classes=12)
    assert refusal(fill, config, 256, 65, 5) == "--n_classes 12: the data folder has 5 scenes; leave the flag out"
    assert fill(ModelConfig("cp_mobile"), 256, 65, 5).n_classes == 5


def test_its_head_takes_its_features():
    model, x = random_model(), torch.randn(2, 1, 64, 40)
    features = model.forward_features(x)
    assert features.shape == (2, 104)
    torch.testing.assert_close(model.forward_head(features), model(x))
