"""Low-rank adapters: what they adapt, that they train and nothing else does, and that merging changes nothing."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import refusal
from torch import Tensor, nn
from torch.func import functional_call

import aum
from dcase.model.adapters import LowRank, trainable
from dcase.model.cp_mobile import CPMobile

DIRECTIONS = ["fo_fo", "fo_bi", "bi_bi"]
TINY = {"n_mels": 24, "target_length": 20, "patch_size": (8, 5), "embed_dim": 32, "depth": 2, "d_state": 3}


def tiny(**overrides) -> aum.AudioMamba:
    torch.manual_seed(0)
    return aum.AudioMamba(aum.AuMConfig(**{**TINY, **overrides})).eval()


def conv_net() -> nn.Module:
    """What a small convolutional network has: strided, pointwise and depthwise convolutions and BatchNorm."""
    torch.manual_seed(0)
    parts = {
        "stem": nn.Conv2d(1, 16, 3, stride=2),
        "expand": nn.Conv2d(16, 32, 1, bias=False),
        "depthwise": nn.Conv2d(32, 32, 3, groups=32),
        "norm": nn.BatchNorm2d(32),
        "head": nn.Sequential(nn.Conv2d(32, 10, 1), nn.BatchNorm2d(10), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    }
    return nn.Sequential(OrderedDict(parts)).eval()


def moved(adapters: LowRank) -> LowRank:
    """Both factors off their initial values, as after training."""
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return adapters


def clips(b: int = 3) -> Tensor:
    return torch.randn(b, 1, 24, 20, generator=torch.Generator().manual_seed(1))


def names(adapters: LowRank) -> set[str]:
    return {key.replace("/", ".").removesuffix(".weight") for key in adapters.up}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_projections_and_heads_are_adapted(direction):
    x_proj = ("x_proj", "x_proj_b") if direction == "bi_bi" else ("x_proj",)
    mixers = {f"layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "out_proj", *x_proj)}
    mlp = LowRank(tiny(direction=direction), 2)
    assert names(mlp) == mixers | {"patch_embed.proj", "classifier.2", "classifier.5"}
    assert mlp.skipped == []
    linear = LowRank(tiny(direction=direction, head="linear"), 2)
    assert names(linear) == mixers | {"patch_embed.proj", "head"}
    assert linear.line().endswith(f"parameters of rank 2 in {len(mixers) + 2} layers")


def test_matrices_too_small_for_the_rank_are_skipped_and_named():
    """x_proj is 8 x 64 (dt_rank 2, two times 3 states): rank 7 has 7 * 72 = 504 < 512 parameters, rank 8 has 576."""
    assert "layers.0.mixer.x_proj.weight" not in LowRank(tiny(), 7).skipped
    adapters = LowRank(tiny(), 8)
    assert adapters.skipped == [f"layers.{i}.mixer.x_proj{b}.weight" for i in (0, 1) for b in ("", "_b")]
    assert "layers.1.mixer.x_proj_b" in adapters.line()
    assert not names(adapters) & {"layers.0.mixer.x_proj"}


def test_convolutions_but_depthwise_ones_are_adapted():
    adapters = LowRank(conv_net(), 2)
    assert names(adapters) == {"stem", "expand", "head.0"}
    assert adapters.down["stem/weight"].shape == (2, 9) and adapters.up["stem/weight"].shape == (16, 2)
    assert adapters.skipped == []


@pytest.mark.parametrize("model", [tiny(), tiny(direction="fo_bi", head="linear"), conv_net()])
def test_adapters_start_without_effect(model):
    adapters = LowRank(model, 2)
    torch.testing.assert_close(functional_call(model, adapters.weights(model), (clips(),)), model(clips()))
    for key, down in adapters.down.items():
        bound = down.shape[1] ** -0.5
        assert 0.3 * bound < down.abs().mean() < 0.7 * bound, key  # uniform: half of it
        assert down.abs().max() <= bound


def test_the_weights_are_what_the_paper_says():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = moved(LowRank(model, 2))
    weights = adapters.weights(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it does not round the sums
        under_autocast = adapters.weights(model)
    for name, weight in weights.items():
        assert under_autocast[name].dtype == torch.float32 and torch.equal(under_autocast[name], weight), name
        up, down = adapters.up[name.replace(".", "/")], adapters.down[name.replace(".", "/")]
        delta = torch.einsum("or,ri->oi", up, down)
        torch.testing.assert_close(weight, before[name] + delta.reshape(before[name].shape))
        assert torch.linalg.matrix_rank((weight - before[name]).flatten(1), atol=1e-4) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("direction", [*DIRECTIONS, None])
def test_a_merged_model_gives_the_same_logits(direction):
    model = tiny(direction=direction) if direction else conv_net()
    adapters = moved(LowRank(model, 3))
    expected = functional_call(model, adapters.weights(model), (clips(),))
    assert (expected - model(clips())).abs().max() > 0.01
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    merged = adapters.merged(model)
    other.load_state_dict(merged)
    torch.testing.assert_close(other(clips()), expected, rtol=0, atol=1e-6)
    assert merged.keys() == model.state_dict().keys()
    assert not any(value.requires_grad for value in merged.values())
    for value in merged.values():  # a copy: what happens to it does not happen to the model
        value.zero_()
    torch.testing.assert_close(functional_call(model, adapters.weights(model), (clips(),)), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("round_to", [0, 1 / 16])
def test_every_adapter_has_a_gradient_and_the_model_none(direction, round_to):
    model = tiny(direction=direction)
    adapters = moved(LowRank(model, 2))
    weights = adapters.weights(model)
    if round_to:  # gradients pass through weights that are rounded afterwards
        weights = {name: x + (torch.round(x / round_to) * round_to - x).detach() for name, x in weights.items()}
    functional_call(model, weights, (clips(),)).square().sum().backward()
    assert all(model.get_parameter(name).grad is None for name in weights)
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_training_moves_the_adapters_only_and_learns():
    model = tiny(dropout=0.0).train()
    trainable(model, "lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = LowRank(model, 2)
    optimizer = torch.optim.AdamW(aum.parameter_groups(adapters, 1e-4), lr=0.02)
    x, y = clips(8), torch.arange(8)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(functional_call(model, adapters.weights(model), (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_adapters_survive_a_safe_checkpoint(tmp_path):
    model = tiny()
    adapters, other = moved(LowRank(model, 2)), LowRank(model, 2)
    torch.save(adapters.state_dict(), tmp_path / "adapters.pt")
    other.load_state_dict(torch.load(tmp_path / "adapters.pt", weights_only=True))
    for one in (other, copy.deepcopy(adapters)):
        for name, weight in one.weights(model).items():
            assert torch.equal(weight, adapters.weights(model)[name])
    assert not any("." in key for key in adapters.up)


def test_what_fine_tuning_trains():
    for model, head in ((tiny(), "classifier."), (tiny(head="linear"), "head."), (CPMobile(), "feed_forward.")):
        everything = {name for name, _ in model.named_parameters()}

        def trained(model=model) -> set[str]:
            return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

        trainable(model, "head")
        assert trained() == {name for name in everything if name.startswith(head)} != set()
        trainable(model, "lora")
        assert trained() == set()
        trainable(model, "full")  # from whatever it was before
        assert trained() == everything


def test_refusals():
    assert "--lora_rank is at least 1" in refusal(LowRank, tiny(), 0)
    message = refusal(LowRank, tiny(head="linear"), 40)
    assert "--lora_rank 40" in message
    most = int(message.rpartition("at most ")[2])
    LowRank(tiny(head="linear"), most)  # and this is true
    refusal(LowRank, tiny(head="linear"), most + 1)
    LowRank(nn.Linear(8, 8), 3)
    assert "at most 3" in refusal(LowRank, nn.Linear(8, 8), 4)  # 4 * (8 + 8) is as many parameters as 8 * 8
    assert "--finetune full or head" in refusal(LowRank, nn.ReLU(), 1)
    assert "--finetune is one of full, lora, head" in refusal(trainable, tiny(), "adapters")
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    assert "none of the layers head, classifier" in refusal(trainable, body, "head")
    assert all(parameter.requires_grad for parameter in body.parameters())  # refused before anything is frozen
