"""Pruning a model into a smaller one: what is dead goes first, and where only that goes, nothing changes."""

import dataclasses

import pytest
import torch
from conftest import refusal
from torch import Tensor

import aum
from dcase.model.pruning import shrink

LARGE = aum.AuMConfig(
    n_mels=24, target_length=20, patch_size=(8, 5), embed_dim=32, depth=4, d_state=5, expand=3, n_classes=4,
    head="linear", norm_eps=1e-12,
)  # fmt: skip
STEM = {"stem": (6, 8), "patch_size": (3, 2)}
SMALLER = {"embed_dim": 16, "depth": 2, "d_state": 3, "expand": 2}  # dt_rank 1 in place of 2
KINDS = [
    {"direction": "fo_fo"},
    {"direction": "fo_bi", "pos_embed": True, "pool": "cls"},
    {"direction": "bi_bi", "head": "mlp"},
    {"direction": "bi_bi", "pos_embed": True, "factorised_pos_embed": True, "cls_position": "none", "local_conv": True},
    {"direction": "fo_bi", "pos_embed": True, "factorised_pos_embed": True, "paired_layers": True, **STEM},
    {"direction": "bi_bi", "head": "mlp", "pos_embed": True, **STEM},
    {"head": "patch", "cls_position": "none", "row_scan": True, "local_conv": True, **STEM},
]
State = dict[str, Tensor]


def config(base: aum.AuMConfig = LARGE, **overrides) -> aum.AuMConfig:
    return dataclasses.replace(base, **overrides)


def state_of(shape: aum.AuMConfig) -> State:
    """A state dict in float64 with nothing at its initial value."""
    torch.manual_seed(0)
    state = aum.AudioMamba(shape).double().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value += 0.3 * (torch.rand_like(value) if name.endswith("running_var") else torch.randn_like(value))
    return state


def logits(state: State, shape: aum.AuMConfig) -> Tensor:
    model = aum.AudioMamba(shape).double().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.randn(3, 1, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def some(n: int, of: int) -> Tensor:
    """``n`` different numbers below ``of``."""
    return torch.randperm(of)[:n]


def spoil(state: State, part: str, axis: int, channels: Tensor, noise: float = 0.0) -> None:
    """Zeros, or next to nothing, in these channels of a weight."""
    for name in [name for name in state if name.endswith(part)]:
        shape = state[name].index_select(axis, channels).shape
        state[name].index_copy_(axis, channels, noise * torch.randn(shape, dtype=torch.float64))


def kill_inner(state: State, shape: aum.AuMConfig, n: int, noise: float = 0.0) -> None:
    """In every layer, ``n`` inner channels that carry nothing; others in each layer."""
    inner = shape.expand * shape.embed_dim
    for i in range(shape.depth):
        dead, mixer = some(n, inner), f"layers.{i}.mixer."
        spoil(state, f"{mixer}in_proj.weight", 0, torch.cat([dead, inner + dead]), noise)
        spoil(state, f"{mixer}out_proj.weight", 1, dead, noise)
        for branch in ("", "_b"):
            spoil(state, f"{mixer}conv1d{branch}.weight", 0, dead, noise)
            spoil(state, f"{mixer}conv1d{branch}.bias", 0, dead, noise)
            spoil(state, f"{mixer}x_proj{branch}.weight", 1, dead, noise)


def kill_states(state: State, shape: aum.AuMConfig, n: int, noise: float = 0.0) -> None:
    """In every branch of every layer, ``n`` states that nothing drives and nothing reads."""
    rank = -(-shape.embed_dim // 16)
    for i in range(shape.depth):
        for branch in ("", "_b"):
            dead = rank + some(n, shape.d_state)
            rows = torch.cat([dead, shape.d_state + dead])
            spoil(state, f"layers.{i}.mixer.x_proj{branch}.weight", 0, rows, noise)


def kill_stream(state: State, shape: aum.AuMConfig, n: int, noise: float = 0.0) -> None:
    """``n`` channels of the residual stream that nothing writes or reads."""
    dead = some(n, shape.embed_dim)
    local_biases = [name for name in state if name.startswith("local.") and name.endswith(".bias")]
    for part in ("patch_embed.proj.weight", "patch_embed.proj.bias", "out_proj.weight", *local_biases):
        spoil(state, part, 0, dead, noise)
    for part in ("cls_token", "pos_embed.pos_embed"):
        spoil(state, part, 2, dead, noise)
    for part, axis in (("pos_embed_cls", 2), ("pos_embed_mel", 3), ("pos_embed_time", 3)):
        spoil(state, part, axis, dead, noise)
    spoil(state, "in_proj.weight", 1, dead, noise)
    spoil(state, "head.weight", 1, dead, noise)


def lower_rank_of_delta(state: State, shape: aum.AuMConfig) -> None:
    """Delta of rank 1, though no row of x_proj and no column of dt_proj is zero."""
    for i in range(shape.depth):
        for branch in ("", "_b"):
            name = f"layers.{i}.mixer.dt_proj{branch}.weight"
            if name in state:
                state[name][:, 1] = -0.7 * state[name][:, 0]


def kill_stem(state: State, shape: aum.AuMConfig, n: int) -> None:
    """``n`` channels of each convolution of the stem that give 0 after BatchNorm; the convolution itself is busy."""
    for i, channels in enumerate(shape.stem):
        dead = some(n, channels)
        spoil(state, f"stem.{i}.1.weight", 0, dead)
        spoil(state, f"stem.{i}.1.bias", 0, dead)


def halve_stream(state: State, shape: aum.AuMConfig, noise: float = 0.0) -> None:
    """Kill half of the stream's channels; inner channels and the rank of delta follow embed_dim."""
    kill_stream(state, shape, 16, noise)
    kill_inner(state, shape, 48, noise)
    lower_rank_of_delta(state, shape)


def loses_nothing(state: State, large: aum.AuMConfig, small: aum.AuMConfig, atol: float) -> State:
    """Assert that the pruned model gives the same logits, and return its state."""
    result = shrink(state, large, small)
    torch.testing.assert_close(logits(result, small), logits(state, large), rtol=0, atol=atol)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_sizes_give_the_same_state(kind):
    shape = config(**kind)
    state = state_of(shape)
    result = shrink(state, shape, shape)
    assert list(result) == list(state)
    for name, value in result.items():
        assert torch.equal(value, state[name]), name
        assert value.data_ptr() != state[name].data_ptr() or not value.numel(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [SMALLER, *({name: size} for name, size in SMALLER.items())])
def test_any_smaller_model_loads_it_and_runs(kind, sizes):
    large = config(**kind)
    small = config(large, **sizes, **({"stem": (5, 3)} if large.stem else {}))
    state = {name: value.float() if value.is_floating_point() else value for name, value in state_of(large).items()}
    before = {name: value.clone() for name, value in state.items()}
    result = shrink(state, large, small)
    assert all(result[name].dtype == value.dtype for name, value in aum.AudioMamba(small).state_dict().items())
    assert logits({name: value.double() for name, value in result.items()}, small).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_dead_inner_channels_and_states_go_without_a_trace(kind):
    large = config(**kind)
    state = state_of(large)
    kill_inner(state, large, 32)
    kill_states(state, large, 2)
    loses_nothing(state, large, config(large, expand=2, d_state=3), 1e-9)


# The MLP head's LayerNorm has a mean over channels, the patch head's BatchNorm a bias that dead channels hand on.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("head") not in ("mlp", "patch")])
def test_dead_channels_of_the_stream_go_without_a_trace(kind):
    large = config(**kind)
    state = state_of(large)
    halve_stream(state, large)
    result = loses_nothing(state, large, config(large, embed_dim=16), 1e-7)
    assert result["layers.0.mixer.dt_proj.weight"].shape == (48, 1)


def test_a_channel_that_only_a_local_convolution_writes_stays():
    large = config(cls_position="none", local_conv=True)
    small = config(large, embed_dim=16)
    state = state_of(large)
    kill_stream(state, large, 17)
    lone = (state["patch_embed.proj.bias"] == 0).nonzero()[-1]
    state["local.0.bias"][lone] = 2.0
    state["layers.1.mixer.in_proj.weight"][:, lone] = 0.5
    assert 2.0 in shrink(state, large, small)["local.0.bias"]


def test_the_mlp_heads_layer_norm_is_made_up_for_but_for_its_mean():
    """With features of mean 0 over the channels, as the head's LayerNorm makes them, nothing is lost either."""
    large = config(head="mlp")
    small = config(large, embed_dim=16)
    state = state_of(large)
    halve_stream(state, large)
    dead = state["patch_embed.proj.bias"] == 0
    state["classifier.0.bias"][dead] = 0
    state["classifier.2.weight"][:, dead] = 0
    result = shrink(state, large, small)
    factor = result["classifier.0.weight"] / state["classifier.0.weight"][~dead]
    torch.testing.assert_close(factor, torch.full_like(factor, 2**0.5))
    error = (logits(result, small) - logits(state, large)).abs().max()
    result["classifier.0.weight"] /= factor
    assert error < (logits(result, small) - logits(state, large)).abs().max()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "stem" in kind])
def test_dead_channels_of_the_stem_go_without_a_trace(kind):
    large = config(**kind)
    state = state_of(large)
    kill_stem(state, large, 2)
    loses_nothing(state, large, config(large, stem=(4, 6)), 1e-9)


@pytest.mark.parametrize("kind", [{"direction": "fo_fo"}, {"direction": "fo_bi", "pos_embed": True}, {}])
def test_what_is_nearly_dead_goes_first(kind):
    large = config(**kind)
    state = state_of(large)
    halve_stream(state, large, noise=1e-5)
    kill_states(state, large, 2, noise=1e-5)
    loses_nothing(state, large, config(large, embed_dim=16, d_state=3), 0.01)


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
def test_scaling_that_changes_no_output_changes_no_choice(direction):
    """B times a and C over a give the same model; so do in_proj's columns times a and the norm's weight over a."""
    large = config(direction=direction)
    small = config(large, embed_dim=16, d_state=3)
    state = state_of(large)
    scaled = {name: value.clone() for name, value in state.items()}
    for i in range(4):
        for name in {f"layers.{i}.mixer.x_proj.weight", f"layers.{i}.mixer.x_proj_b.weight"} & state.keys():
            by = torch.randn(5, 1, dtype=torch.float64).exp()
            scaled[name][2:7] *= by
            scaled[name][7:] /= by
        by = torch.randn(32, dtype=torch.float64).exp()
        scaled[f"layers.{i}.norm.weight"] *= by
        scaled[f"layers.{i}.mixer.in_proj.weight"] /= by
    torch.testing.assert_close(logits(scaled, large), logits(state, large))
    torch.testing.assert_close(logits(shrink(scaled, large, small), small), logits(shrink(state, large, small), small))


def test_delta_becomes_the_nearest_of_lower_rank():
    large = config(depth=1, d_state=5)
    small = config(large, embed_dim=16, expand=3)
    state = state_of(large)
    kill_inner(state, large, 48)
    alive = (state["layers.0.mixer.out_proj.weight"] != 0).any(0)
    result = shrink(state, large, small)

    def delta(state: State, rank: int) -> Tensor:
        return state["layers.0.mixer.dt_proj.weight"] @ state["layers.0.mixer.x_proj.weight"][:rank]

    before = delta(state, 2)[alive][:, alive]
    values = torch.linalg.svdvals(before)
    error = torch.linalg.matrix_norm(before - delta(result, 1))
    torch.testing.assert_close(error, values[1])  # the least that rank 1 can do (Eckart and Young)
    assert values[1] > 0.1


def test_norms_make_up_for_the_channels_that_are_left_out():
    """Dead channels bring down the mean square; channels like all the others do not."""
    large = config()
    small = config(large, embed_dim=16)
    state = state_of(large)
    names = ["norm_f.weight", *(f"layers.{i}.norm.weight" for i in range(4))]

    def factors(state: State) -> Tensor:
        kept, before = shrink(state, large, small), [state[name] for name in names]
        ratios = [kept[name][:, None] / weight for name, weight in zip(names, before, strict=True)]
        return torch.stack([ratio.flatten()[(ratio.flatten() - 1.2).abs().argmin()] for ratio in ratios])

    for name in names:
        state[name] = torch.ones_like(state[name])
    alike = factors(state)
    kill_stream(state, large, 16)
    torch.testing.assert_close(factors(state), torch.full_like(alike, 2**0.5))
    assert ((alike >= 1) & (alike < 1.2)).all()


@pytest.mark.parametrize(
    "paired, depth, expected",
    [(False, 4, [0, 2, 5, 7]), (False, 7, [0, 1, 2, 4, 5, 6, 7]), (False, 2, [0, 7]), (False, 1, [0]),
     (True, 4, [0, 1, 6, 7]), (True, 6, [0, 1, 4, 5, 6, 7]), (True, 2, [0, 1])],
)  # fmt: skip
def test_layers_stay_evenly_spread_and_in_pairs(paired, depth, expected):
    large = config(depth=8, paired_layers=paired)
    state = state_of(large)
    for i in range(8):
        state[f"layers.{i}.norm.weight"].fill_(i)
    result = shrink(state, large, config(large, depth=depth))
    assert [result[f"layers.{i}.norm.weight"][0].item() for i in range(depth)] == expected
    for new, old in enumerate(expected):
        name = "mixer.A_b_log"
        assert torch.equal(result[f"layers.{new}.{name}"], state[f"layers.{old}.{name}"])
    logits(result, config(large, depth=depth))


@pytest.mark.parametrize(
    "field, value",
    [("embed_dim", 33), ("depth", 5), ("d_state", 6), ("expand", 4), ("stem", (6, 9)), ("stem", (7, 8))],
)
def test_a_larger_size_is_refused(field, value):
    large = config(**STEM)
    message = refusal(shrink, state_of(large), large, config(large, **{field: value}))
    shown = [",".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in (value, getattr(large, field))]
    assert f"--{field} {shown[0]} is more than the {shown[1]}" in message and "--init_from" in message


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_mels", 32), ("target_length", 21), ("patch_size", (3, 3)), ("strides", (2, 2)), ("d_conv", 3),
        ("n_classes", 3), ("direction", "fo_fo"), ("paired_layers", True), ("pool", "cls"), ("cls_position", "end"),
        ("pos_embed", True), ("factorised_pos_embed", True), ("head", "mlp"), ("norm_eps", 1e-5), ("freq_norm", 1.0),
        ("stem", (6,)), ("stem", ()),
    ],
)  # fmt: skip
def test_anything_else_that_differs_is_refused(field, value):
    large = config(**STEM)
    message = refusal(shrink, state_of(large), large, config(large, **{field: value, "embed_dim": 16}))
    assert message.startswith(f"--{field} ") and "does not fit the model of --init_from" in message


def test_local_convolutions_must_be_in_both_or_in_none():
    with_them = config(cls_position="none", local_conv=True)
    without = config(with_them, local_conv=False)
    assert "--local_conv False" in refusal(shrink, state_of(with_them), with_them, without)
    assert "--local_conv True" in refusal(shrink, state_of(without), without, with_them)


def test_what_matters_in_training_only_may_differ_and_so_may_strides_left_out():
    large = config(**STEM)
    small = config(large, dropout=0.5, drop_path=0.2, strides=large.patch_size, d_state=3)
    shrink(state_of(large), large, small)


def test_channels_that_blocks_of_the_stem_hand_on_stay():
    large = config(**{**STEM, "stem_blocks": 1})
    before = state_of(large)
    assert all(torch.equal(value, before[name]) for name, value in shrink(before, large, large).items())
    fewer = config(large, stem=(*large.stem[:-1], large.stem[-1] - 1))
    assert "--stem" in refusal(shrink, before, large, fewer)
    first = config(large, stem=(large.stem[0] - 1, *large.stem[1:]))
    model = aum.AudioMamba(first)
    model.load_state_dict(shrink(before, large, first))


def test_every_field_of_the_configuration_is_thought_of():
    """A new field needs a decision here: pruned, refused (the default) or free; and a place among KINDS."""
    pruned, free = {*SMALLER, "stem"}, {"dropout", "drop_path"}
    refused = {
        "n_mels", "target_length", "patch_size", "strides", "d_conv", "n_classes", "direction", "paired_layers",
        "pool", "cls_position", "pos_embed", "factorised_pos_embed", "head", "norm_eps", "freq_norm", "stem_blocks",
        "row_scan", "local_conv",
    }  # fmt: skip
    assert pruned | free | refused == {field.name for field in dataclasses.fields(aum.AuMConfig)}
