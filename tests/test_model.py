"""The backbone: computation, parameter counts, names, initialisation, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from reference_model import logits as reference_logits
from torch import nn

import aum
from aum.model import LocalConv
from aum.stem import InvertedResidual, RelaxedMeanNorm, Stem
from dcase.complexity import macs_by_part
from dcase.model.quantisation import stored_bytes

TINY = {"n_mels": 24, "target_length": 20, "patch_size": (8, 5), "embed_dim": 12, "depth": 2, "d_state": 3}


def tiny(**overrides) -> aum.AudioMamba:
    """A small model in float64 with every parameter moved off its initial value, in evaluation."""
    torch.manual_seed(0)
    model = aum.AudioMamba(aum.AuMConfig(**{**TINY, **overrides})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"pool": "cls"},
        {"pool": "cls", "cls_position": "start", "pos_embed": True, "head": "linear"},
        {"pool": "cls", "cls_position": "end", "pos_embed": True},
        {"cls_position": "none", "pos_embed": True},
        {"cls_position": "none", "head": "linear"},
        {"patch_size": (8, 4), "strides": (5, 3)},
        {"paired_layers": True, "depth": 4},
        {"expand": 1, "d_conv": 2, "embed_dim": 20, "norm_eps": 1e-3},
    ],
)
def test_computation_equals_the_formulas(direction, overrides):
    model = tiny(direction=direction, **overrides)
    x = torch.randn(3, 1, 24, 20, dtype=torch.float64)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = np.stack([reference_logits(state, clip[0].numpy(), model.config) for clip in x])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
def test_all_gradients_equal_finite_differences(direction):
    model = tiny(direction=direction, depth=1, embed_dim=4, d_state=2, head="linear", dropout=0.0)
    x = torch.randn(1, 1, 24, 20, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_forward_branch_is_causal_and_backward_branch_anticausal():
    x = torch.randn(1, 9, 12, dtype=torch.float64, requires_grad=True)
    for direction, sees_past, sees_future in (("fo_fo", True, False), ("fo_bi", True, True), ("bi_bi", True, True)):
        mixer = aum.BiMamba(12, d_state=3, direction=direction).double()
        (grad,) = torch.autograd.grad(mixer(x)[0, 4].sum(), x)
        reach = grad[0].abs().sum(-1) > 0
        assert reach[:4].all().item() is sees_past, direction
        assert reach[5:].all().item() is sees_future, direction
    with torch.no_grad():  # without the forward branch's outputs only the future is seen
        mixer.conv1d.weight.zero_(), mixer.conv1d.bias.zero_()  # u = silu(0) = 0, so the branch gives 0
    (grad,) = torch.autograd.grad(mixer(x)[0, 4].sum(), x)
    reach = grad[0].abs().sum(-1) > 0
    assert not reach[:4].any() and reach[4:].all()


def test_tokens_run_along_time_first_with_the_class_token_at_its_position():
    model = tiny(embed_dim=6)
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    x = torch.zeros(1, 1, 24, 20, dtype=torch.float64)
    x[0, 0, 8:16, 5:10] = 1.0  # patch (1, 1) of the 3 x 4 grid
    model(torch.zeros_like(x))
    base = seen["x"]
    model(x)
    changed = (seen["x"] - base).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert base.shape[1] == 13
    assert changed == [1 * 4 + 1]  # before the class token at 6
    for position, index in (("start", 0), ("middle", 6), ("end", 12)):
        model = tiny(embed_dim=6, cls_position=position)
        model.layers[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
        model(x)
        torch.testing.assert_close(seen["x"][0, index], model.cls_token[0, 0].detach())


AUDIOSET = {"n_mels": 128, "target_length": 1024, "n_classes": 527, "pos_embed": True, "head": "linear"}


@pytest.mark.parametrize(
    "name, overrides, count, n_keys",
    [
        ("aum_tiny", {}, 6_923_210, None),
        ("aum_small", {}, 25_342_346, None),
        ("aum_base", {}, 96_685_322, None),
        # The published models on AudioSet.
        ("aum_small", {"direction": "fo_fo", **AUDIOSET}, 23_640_719, 247),
        ("aum_base", {"direction": "fo_fo", **AUDIOSET}, 91_517_711, 247),
        ("aum_small", {"direction": "fo_bi", **AUDIOSET}, 23_935_631, 271),
        ("aum_base", {"direction": "fo_bi", **AUDIOSET}, 92_107_535, 271),
        ("aum_small", {"direction": "bi_bi", **AUDIOSET}, 25_539_215, 415),
        ("aum_base", {"direction": "bi_bi", **AUDIOSET}, 97_084_175, 415),
    ],
)
def test_counts_of_parameters_and_of_tensors(name, overrides, count, n_keys):
    """test_pretrained.py checks the names and shapes of the published models."""
    with torch.device("meta"):
        model = aum.create_model(name, **overrides)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.layers) == 24 and n_keys in (None, len(model.state_dict()))


def small(**overrides) -> aum.AudioMamba:
    """An Audio Mamba with AuM's parts only: class token, position embedding, no stem."""
    return aum.create_model("aum_tiny", **{"embed_dim": 48, "depth": 2, "d_state": 8, "pos_embed": True, **overrides})


def test_initialisation():
    torch.manual_seed(1)
    model = aum.create_model("aum_tiny", depth=4)
    for layer in model.layers:
        mixer = layer.mixer
        for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):  # the backward branch too
            delta = nn.functional.softplus(dt_proj.bias)
            assert 0.9e-3 <= delta.min() and delta.max() <= 0.101
            assert 0.005 < delta.log().mean().exp() < 0.02  # log-uniform: the geometric mean is 0.01
            assert dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
        for A_log in (mixer.A_log, mixer.A_b_log):
            torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 17).expand_as(A_log))
        assert (mixer.D == 1).all() and (mixer.D_b == 1).all() and (layer.norm.weight == 1).all()
        bound = mixer.d_inner**-0.5 / math.sqrt(4)
        assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert abs(model.cls_token.std().item() - 0.02) < 0.005
    assert abs(model.patch_embed.proj.weight.std().item() - 1 / 16) < 0.002
    assert (model.patch_embed.proj.bias == 0).all() and (model.classifier[-1].bias == 0).all()


def test_parameter_groups_spare_what_decay_would_harm():
    model = small(head="mlp")
    decayed, spared = aum.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    for ending in ("A_log", "A_b_log", ".D", ".D_b", "bias", "norm.weight", "norm_f.weight", "cls_token", "pos_embed"):
        matching = {name for name in names.values() if name.endswith(ending)}
        assert matching and matching <= spared_names, ending
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {n.split(".")[-2] for n in decayed_names} == {
        "in_proj", "out_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "conv1d", "conv1d_b", "proj", "2", "5"
    }  # fmt: skip


def test_dropout_and_drop_path_work_in_training_only():
    torch.manual_seed(0)
    model = small(depth=4, dropout=0.5, drop_path=0.5, head="mlp")
    x = torch.randn(4, 1, 256, 65)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert [layer.drop_path.p for layer in model.layers] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    branch = model.layers[-1].drop_path(torch.ones(1000, 2, 3))
    assert set(branch.flatten().tolist()) == {0.0, 2.0} and abs(branch.mean() - 1) < 0.15


def test_residual_stream_stays_float32_under_autocast():
    model = small().eval()
    x, streams = torch.randn(2, 1, 256, 65), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert streams == [torch.float32] * 2
    torch.testing.assert_close(low.float(), model(x), rtol=0.05, atol=0.05)


def test_other_lengths_without_a_position_embedding_only():
    x = torch.randn(1, 1, 256, 100)
    assert small(pos_embed=False)(x).shape == (1, 10)
    with pytest.raises(ValueError, match="16 x 6 patches.*16 x 4.*target_length is 65"):
        small()(x)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"patch_size": (0, 16)}, "patch_size"),
        ({"strides": (16, 0)}, "strides"),
        ({"patch_size": (16, 128)}, "does not fit"),
        ({"depth": 0}, "depth"),
        ({"embed_dim": -1}, "embed_dim"),
        ({"depth": 3, "paired_layers": True}, "even depth"),
        ({"pool": "cls", "cls_position": "none"}, "cls_position"),
        ({"pool": "cls", "head": "patch"}, "pool mean"),
        ({"direction": "v2"}, "fo_fo"),
        ({"dropout": 1.0}, "dropout"),
        ({"widht": 3}, "widht"),
        ({"stem": (8, 0)}, "stem"),
        ({"stem": (8, 8, 8, 8, 8)}, "after the stem"),
        ({"stem_blocks": 1}, "stem_blocks"),
        ({"freq_norm": 1.5}, "freq_norm"),
        ({"local_conv": True}, "local_conv needs cls_position none"),
        ({"row_scan": True}, "row_scan needs cls_position none"),
    ],
)
def test_impossible_configurations_name_the_field(overrides, message):
    with pytest.raises(ValueError, match=message):
        aum.create_config("aum_tiny", **overrides)


def test_unknown_model_and_wrong_input():
    with pytest.raises(ValueError, match="aum_small"):
        aum.create_model("aum_smal")
    model = small()
    for shape in ((1, 1, 128, 65), (1, 256, 65), (1, 3, 256, 65)):
        with pytest.raises(ValueError, match="256"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="fewer than the 16"):
        model(torch.zeros(1, 1, 256, 15))


# AuM-Nano


@pytest.mark.parametrize("name, bits", [("aum_nano", 16), ("aum_nano_8bit", 8)])
def test_aum_nano_is_within_the_challenges_limits(name, bits):
    model = aum.create_model(name)
    assert sum(stored_bytes(model, bits).values()) <= 128_000
    assert sum(macs_by_part(model, (1, 1, 256, 65)).values()) <= 30_000_000


def test_relaxed_mean_norm_takes_a_share_of_each_mel_bins_mean():
    x = 3 + 2 * torch.randn(4, 1, 6, 50)
    y = RelaxedMeanNorm(0.3)(x)
    torch.testing.assert_close(y.mean(3), 0.7 * x.mean(3))
    torch.testing.assert_close(y.diff(dim=3), x.diff(dim=3))


def test_freq_norm_1_ignores_what_a_device_adds_to_a_mel_bin():
    x = torch.randn(2, 1, 256, 65)
    model = aum.create_model("aum_nano", freq_norm=1.0).eval()
    torch.testing.assert_close(model(x + torch.randn(1, 1, 256, 1)), model(x), rtol=1e-3, atol=1e-4)


def test_each_convolution_of_the_stem_halves_both_axes():
    for frames in (64, 65, 66, 67):
        config = aum.create_config("aum_nano", target_length=frames)
        stem = aum.AudioMamba(config).stem.eval()
        assert stem(torch.zeros(1, 1, 256, frames)).shape == (1, 32, *config.after_stem(256, frames))
    assert aum.create_config("aum_nano").grid == (16, 17)


def test_factorised_positions_are_sums_of_a_mel_and_a_time_part():
    model = small(factorised_pos_embed=True)
    rows = model.pos_embed.rows()
    assert rows.shape == (1, 1 + 16 * 4, 48)
    mel, time = model.pos_embed.pos_embed_mel[0, 5, 0], model.pos_embed.pos_embed_time[0, 0, 3]
    assert torch.equal(rows[0, 1 + 5 * 4 + 3], mel + time)  # time runs fastest
    assert torch.equal(rows[:, :1], model.pos_embed.pos_embed_cls)


def test_a_row_scan_depends_on_its_own_mel_row_only():
    torch.manual_seed(0)
    model = aum.create_model("aum_tiny", embed_dim=16, depth=2, cls_position="none", row_scan=True).eval()
    seen = []
    model.norm_f.register_forward_hook(lambda module, inputs, output: seen.append(output.view(2, 16, 4, 16)))
    x = torch.randn(2, 1, 256, 65)
    model(x)
    x[:, :, 5 * 16 : 6 * 16] += 1
    model(x)
    moved = (seen[0] != seen[1]).any(3).any(2).all(0)
    assert moved.tolist() == [row == 5 for row in range(16)]
    whole = aum.AudioMamba(dataclasses.replace(model.config, row_scan=False)).eval()
    whole.load_state_dict(model.state_dict())  # the same parameters
    assert not torch.allclose(whole(x), model(x))


def test_local_convolution_looks_at_the_neighbours_in_mel_and_time():
    conv, grid = LocalConv(3).double(), (4, 5)
    x = torch.zeros(1, 20, 3, dtype=torch.float64)
    x[0, 2 * 5 + 3, 1] = 1  # mel 2, time 3, channel 1
    y = (conv(x, grid) - conv.bias).view(4, 5, 3)
    expected = torch.zeros(4, 5, 3, dtype=torch.float64)
    expected[1:4, 2:5, 1] = conv.weight[1, 0].flip(0, 1)
    torch.testing.assert_close(y, expected)


def test_aum_nano_is_its_parts_in_their_order():
    torch.manual_seed(0)
    model, x = aum.create_model("aum_nano").eval(), torch.randn(2, 1, 256, 65)
    for norm in (model.head.norm, model.head.scores):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    tokens = model.patch_embed.proj(model.stem(model.freq_norm(x))).flatten(2).transpose(1, 2) + model.pos_embed.rows()
    for local, layer in zip(model.local, model.layers, strict=True):
        tokens = tokens + local(tokens, (16, 17))
        rows = tokens.reshape(2 * 16, 17, -1)
        tokens = tokens + layer.mixer(layer.norm(rows)).view(tokens.shape)
    features = torch.relu(batch_norm(tokens, model.head.norm))
    torch.testing.assert_close(model.forward_features(x), features.mean(1))
    torch.testing.assert_close(model(x), batch_norm(model.head.linear(features), model.head.scores).mean(1))


def batch_norm(x: torch.Tensor, norm: nn.BatchNorm1d) -> torch.Tensor:
    """In evaluation, channels last."""
    return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def test_an_inverted_residual_ends_with_a_relu():
    block = InvertedResidual(4).eval()
    x = torch.randn(2, 4, 6, 5)
    whole = x + block.project(block.depthwise(block.expand(x)))
    assert (whole < 0).any() and torch.equal(block(x), whole.clamp(min=0))


def test_the_stem_starts_with_the_variance_for_its_fan_out():
    weight = Stem((256,), 0)[0][0].weight  # (256, 1, 3, 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.1)


# Features, tokens and layers

SHAPES = [
    {"head": "linear"},
    {"head": "mlp", "pool": "cls", "cls_position": "start", "pos_embed": True},
    {"cls_position": "none", "head": "patch", "row_scan": True, "local_conv": True},
    {"depth": 4, "paired_layers": True},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_layers_are_what_features_and_logits_are_made_of(shape):
    model, x = tiny(**shape), torch.randn(2, 1, 24, 20, dtype=torch.float64)
    if shape.get("head") == "patch":
        nn.init.normal_(model.head.norm.running_mean), nn.init.normal_(model.head.scores.running_mean)
    tokens, features = model.forward_tokens(x), model.forward_features(x)
    pooled = tokens[:, model.config.cls_index_of((3, 4))] if model.config.pool == "cls" else tokens.mean(1)
    assert torch.equal(pooled, features)
    layers, normed = model.forward_layers(x), model.forward_layers(x, norm=True)
    assert len(layers) == (2 if "paired_layers" in shape else model.config.depth) and torch.equal(normed[-1], tokens)
    assert all(torch.equal(model._normed(one), other) for one, other in zip(layers, normed, strict=True))
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_each_layer_of_the_list_is_the_one_before_with_what_a_block_adds():
    model, x = tiny(depth=3), torch.randn(2, 1, 24, 20, dtype=torch.float64)
    layers = model.forward_layers(x)
    for i in (1, 2):
        torch.testing.assert_close(layers[i], layers[i - 1] + model.layers[i](layers[i - 1]), rtol=0, atol=0)


@pytest.mark.parametrize("position, index", [("start", 0), ("middle", 6), ("end", 12), ("none", None)])
def test_a_tokens_place_on_the_grid_is_known(position, index):
    """With blocks that add nothing, a token after the norm is the norm of its own patch, or of the class token."""
    model, x = tiny(cls_position=position), torch.randn(2, 1, 24, 20, dtype=torch.float64)
    for layer in model.layers:
        nn.init.zeros_(layer.mixer.out_proj.weight)
    tokens, grid = model.forward_tokens(x), model.config.grid_of(20)
    assert grid == (3, 4) and model.config.cls_index_of(grid) == index
    if index is not None:
        torch.testing.assert_close(tokens[:, index], model.norm_f(model.cls_token[0]).expand(2, -1))
        tokens = torch.cat([tokens[:, :index], tokens[:, index + 1 :]], 1)
    patches = model.patch_embed.proj(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(tokens.unflatten(1, grid), model.norm_f(patches))
