"""The counter against figures found by other means: AUM.md's table, FlopCounterMode, CP-Mobile's published cost."""

import dataclasses
import json

import pytest
import torch
import torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import aum
import aum.mamba
from dcase import complexity
from dcase.complexity import MAX_MACS, MAX_PARAMS_MEMORY, Complexity, macs_by_part, measure, table, warning
from dcase.errors import UserError
from dcase.model import named as models
from dcase.model.cp_mobile import CPMobile

PRODUCTS = ("stem", "patch_embed", "local", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "head")

INPUT = (1, 1, 64, 33)  # of the tiny model


def macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    return sum(macs_by_part(model, input_size).values())


def tiny(**overrides) -> nn.Module:
    return aum.create_model("aum_tiny", **{"embed_dim": 32, "depth": 2, "n_mels": 64, "target_length": 33, **overrides})


# AuM


def test_every_part_of_aum_small_is_the_reference_count():
    small = aum.create_model("aum_small")
    parts = macs_by_part(small, (1, 1, 256, 65))
    assert list(parts.items()) == [  # in the order in which they run
        ("patch_embed", 6_291_456),
        ("norms", 1_797_120 + 74_880 + 3 * 384),  # blocks, final, head
        ("in_proj", 920_125_440),
        ("conv1d", 9_584_640),
        ("x_proj", 134_184_960),
        ("dt_proj", 57_507_840),
        ("scan", 158_146_560),
        ("gate", 2_396_160),
        ("halving", 1_198_080),
        ("out_proj", 460_062_720),
        ("head", 384 * 512 + 512 * 10),
    ]
    assert sum(parts.values()) == 1_751_572_736
    assert sum(parts.get(part, 0) for part in PRODUCTS) == 1_587_958_784
    longer = macs_by_part(small, (1, 1, 256, 1024))
    assert sum(longer.values()) == 27_619_410_176
    assert sum(longer.get(part, 0) for part in PRODUCTS) == 25_039_361_024


@pytest.mark.parametrize(
    ("name", "overrides", "frames", "expected"),
    [
        ("aum_small", {"direction": "fo_fo", "head": "linear"}, 65, 1_569_265_536),
        ("aum_small", {"direction": "fo_bi", "head": "linear"}, 65, 1_649_536_896),
        ("aum_small", {"direction": "bi_bi", "head": "linear"}, 65, 1_751_373_696),
        ("aum_tiny", {}, 65, 501_987_968),
        ("aum_base", {}, 65, 6_493_548_032),
        ("aum_base", {}, 1024, 102_395_244_032),
    ],
)
def test_macs_of_the_other_models_are_the_reference_counts(name, overrides, frames, expected):
    # Every block costs the same, so models of one and two blocks give the cost of 24, in a fraction of the time.
    one, two = (macs(aum.create_model(name, depth=depth, **overrides), (1, 1, 256, frames)) for depth in (1, 2))
    assert one + 23 * (two - one) == expected


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"embed_dim": 48, "depth": 3, "head": "linear", "cls_position": "none"},
        {"patch_size": (8, 4), "strides": (4, 3), "d_state": 5, "d_conv": 3, "expand": 3, "paired_layers": True},
        {"stem": (4, 12), "patch_size": (4, 4), "pos_embed": True, "factorised_pos_embed": True},
        {"stem": (4, 12), "stem_blocks": 1, "patch_size": (4, 1), "local_conv": True, "cls_position": "none"},
    ],
)
def test_products_and_convolutions_agree_with_flop_counter(direction, overrides):
    model = tiny(direction=direction, **overrides).eval()
    parts = macs_by_part(model, INPUT)
    with aum.use_backend("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(INPUT))
    assert counter.get_total_flops() == 2 * sum(parts.get(part, 0) for part in PRODUCTS)


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
def test_the_fused_mixer_tells_flop_counter_all_it_does(direction):
    model = tiny(direction=direction, embed_dim=48, d_state=5, d_conv=3)
    parts = macs_by_part(model, INPUT)
    with aum.use_backend("cpu"), FlopCounterMode(display=False) as counter:
        loss = model(torch.zeros(INPUT)).sum()
        assert counter.get_total_flops() == 2 * (sum(parts.values()) - parts["norms"])
        loss.backward()
    # Backward: twice the forward, but for the patches, whose input has no gradient.
    assert counter.get_total_flops() == 2 * (3 * (sum(parts.values()) - parts["norms"]) - parts["patch_embed"])


def test_the_scan_runs_once_per_direction_and_branches_are_shared_in_fo_bi():
    parts = {d: macs_by_part(tiny(direction=d), INPUT) for d in ("fo_fo", "fo_bi", "bi_bi")}
    for part in ("scan", "gate"):
        assert parts["bi_bi"][part] == parts["fo_bi"][part] == 2 * parts["fo_fo"][part]
    for part in ("conv1d", "x_proj", "dt_proj"):
        assert parts["bi_bi"][part] == 2 * parts["fo_bi"][part] == 2 * parts["fo_fo"][part]
    assert "halving" in parts["bi_bi"] and "halving" not in parts["fo_bi"]


def test_a_mixer_alone_is_counted_for_its_tokens():
    mixer = aum.BiMamba(32)
    once, twice = macs(mixer, (1, 7, 32)), macs(mixer, (1, 14, 32))
    assert twice == 2 * once > 0


# Other networks


def test_cp_mobile_costs_what_the_challenge_published():
    baseline = measure(CPMobile().half(), (1, 1, 256, 65))
    assert baseline.params == 61_148
    assert baseline.param_bytes == {"float16": 122_296}
    assert baseline.macs == baseline.torchinfo_macs == 29_419_156
    assert baseline.macs - baseline.macs_by_part["norms"] == 29_416_448  # FlopCounterMode / 2
    assert baseline.within_limits


def test_cp_mobiles_parts_add_up_by_hand():
    assert list(macs_by_part(CPMobile(), (1, 1, 256, 65)).items()) == [  # outputs x weights of one output
        ("stem", 128 * 33 * 8 * 9 + 64 * 17 * 32 * 8 * 9),
        ("norms", 2 * 1_354),
        ("stage_1", 64 * 17 * 2 * (32 * 64 + 64 * 9 + 64 * 32) + 64 * 17 * 32 * 64 + 64 * 9 * (64 * 9 + 64 * 32)),
        ("stage_2", 64 * 9 * 32 * 64 + 32 * 9 * (64 * 9 + 64 * 56) + 32 * 9 * (56 * 120 + 120 * 9 + 120 * 56)),
        ("stage_3", 32 * 9 * (56 * 120 + 120 * 9 + 120 * 104)),
        ("head", 32 * 9 * 104 * 10),
    ]


def test_what_stands_before_and_between_the_blocks_of_a_small_audio_mamba():
    plain = macs_by_part(tiny(stem=(4, 12), patch_size=(4, 4), cls_position="none"), INPUT)
    assert list(plain)[:3] == ["stem", "norms", "patch_embed"]
    assert plain["stem"] == 32 * 17 * 4 * 9 + 16 * 9 * 12 * 4 * 9
    added = {"stem_blocks": 1, "local_conv": True, "freq_norm": 0.5}
    parts = macs_by_part(tiny(stem=(4, 12), patch_size=(4, 4), cls_position="none", **added), INPUT)
    assert parts["stem"] - plain["stem"] == 16 * 9 * 24 * (12 + 9 + 12)
    assert parts["local"] == 2 * 4 * 2 * 32 * 9  # blocks x grid x channels x taps
    # A share of each mel bin's mean, and BatchNorm of the block's 24 + 24 + 12 channels.
    assert parts["norms"] - plain["norms"] == 64 + 2 * 60


def test_a_linear_layer_counts_at_every_token_and_not_once():
    linear = measure(nn.Linear(64, 128), (1, 65, 64))
    assert linear.macs == 532_480
    assert linear.torchinfo_macs == 64 * 128 + 128  # torchinfo: once, and the bias


@pytest.mark.parametrize(
    ("layer", "input_size", "expected"),
    [
        (nn.Conv1d(6, 8, 3, groups=2, padding=1), (1, 6, 10), 8 * 10 * 3 * 3),
        (nn.Conv2d(3, 8, (3, 5), stride=2), (1, 3, 9, 11), 8 * 4 * 4 * 3 * 3 * 5),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (1, 4, 5), 5 * 4 * 6 * 3),
        (nn.LayerNorm(8), (1, 5, 8), 3 * 40),
        (nn.RMSNorm(8), (1, 5, 8), 3 * 40),
        (nn.GroupNorm(2, 8, affine=False), (1, 8, 5), 2 * 40),
        (nn.BatchNorm2d(8), (1, 8, 5, 5), 16),
        (nn.ReLU(), (1, 5), 0),
        (nn.Sequential(*[nn.Linear(8, 8)] * 2), (1, 8), 2 * 64),  # a layer that is called twice
    ],
)
def test_each_rule(layer, input_size, expected):
    assert macs(layer, input_size) == expected


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.GRU(8, 8)), "GRU"),
        (SelfAttention(8, 2), "SelfAttention"),
        (Functional(), "proj"),
        (torch.ao.nn.quantized.dynamic.Linear(8, 8), "Linear"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_not_free(model, named):
    with pytest.raises(UserError, match=named):
        macs_by_part(model, (1, 4, 8))


# Bytes and limits


def test_bytes_follow_the_stored_dtype():
    model = nn.Sequential(nn.Linear(10, 10).half(), nn.Linear(10, 10, bias=False).bfloat16(), nn.Linear(10, 1))
    assert complexity.param_bytes(model) == {"float16": 220, "bfloat16": 200, "float32": 44}


def test_a_dtype_that_the_challenge_does_not_count_and_a_batch_are_refused():
    with pytest.raises(UserError, match="weight is float64.*float16"):
        measure(nn.Linear(2, 2).double(), (1, 2))
    with pytest.raises(ValueError, match="one clip"):
        measure(nn.Linear(2, 2), (2, 2))


def test_limits_are_the_challenges_and_inclusive():
    assert (MAX_PARAMS_MEMORY, MAX_MACS) == (128_000, 30_000_000)
    at = Complexity((1, 1, 256, 65), 64_000, {"float16": 128_000}, {"a": 29_999_999, "b": 1}, 5)
    assert at.within_limits
    assert not Complexity(at.input_size, 1, {"float16": 128_000, "int8": 1}, at.macs_by_part, 5).memory_within_limit
    over = Complexity(at.input_size, 1, at.param_bytes, {"a": 30_000_001}, 5)
    assert over.memory_within_limit and not over.within_limits  # though the checker would pass it


@pytest.mark.parametrize("bits", [16, 8])
def test_fewer_bits_count_all_that_is_stored(bits):
    model = CPMobile()
    cost, plain = measure(model, INPUT, bits), measure(model, INPUT)
    assert cost.weight_bits == bits and cost.param_bytes == complexity.stored_bytes(model, bits)
    assert cost.total_param_bytes == cost.bytes_in_bits[bits] == plain.bytes_in_bits[bits]
    assert plain.weight_bits == 32 and plain.param_bytes == {"float32": 4 * 61_148}
    assert not plain.memory_within_limit and cost.memory_within_limit
    weights = bits // 8 * sum(p.numel() for p in model.parameters() if p.ndim == 4)
    assert weights < cost.total_param_bytes < weights + 4 * 4 * 1_354  # the rest: norms, or scales and shifts


def test_measure_joins_our_count_bytes_and_the_challenges_checker():
    model = tiny()
    cost = measure(model, INPUT)
    assert cost.macs_by_part == macs_by_part(model, INPUT) and cost.macs == sum(cost.macs_by_part.values())
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.param_bytes == {"float32": 4 * cost.params} and cost.total_param_bytes == 4 * cost.params
    checker = torchinfo.summary(model, input_size=INPUT, verbose=0).total_mult_adds
    assert 0 < cost.torchinfo_macs == checker < cost.macs  # the checker misses the scan
    plain = cost.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["macs"] == sum(plain["macs_by_part"].values())
    assert plain["total_param_bytes"] == 4 * plain["params"]
    in_16_bit = measure(model, INPUT, weight_bits=16).as_dict()
    assert (plain["weight_bits"], in_16_bit["weight_bits"]) == (32, 16)
    assert in_16_bit["total_param_bytes"] == in_16_bit["bytes_in_16_bit"] == plain["bytes_in_16_bit"]


def test_measuring_changes_nothing():
    model = tiny()
    model.layers[0].eval()  # modes may be mixed
    modes = [module.training for module in model.modules()]
    state, torch_rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    measure(model, INPUT)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch_rng, torch.random.get_rng_state())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# What the user sees


TOY = Complexity(
    (1, 1, 256, 65),
    params=40_000,
    param_bytes={"float32": 120_000, "float16": 20_000},
    macs_by_part={"conv": 15_000_000},
    torchinfo_macs=1_500_000,
    bytes_in_bits={16: 81_000, 8: 41_000},
)


def test_table_in_full():
    assert table(TOY, "toy") == (
        "Complexity of toy, one clip of 256 x 65 (mel bins x frames)\n"
        "\n"
        "|                           |             Value |        Limit |     Of the limit |\n"
        "| ------------------------- | ----------------: | -----------: | ---------------: |\n"
        "| Parameters                |            40,000 |            - |                - |\n"
        "| Memory, as stored         |         140,000 B |    128,000 B |     1.09 x, over |\n"
        "| Memory, in 16 bit         |          81,000 B |    128,000 B |  0.633 x, within |\n"
        "| Memory, in 8 bit          |          41,000 B |    128,000 B |   0.32 x, within |\n"
        "| MACs                      |        15,000,000 |   30,000,000 |    0.5 x, within |\n"
        "| MACs, challenge's checker |         1,500,000 |   30,000,000 |   0.05 x, within |\n"
        "\n"
        "| MACs by part              |              MACs |   Share |\n"
        "| ------------------------- | ----------------: | ------: |\n"
        "| conv                      |        15,000,000 | 100.00% |\n"
        "\n"
        "As stored: float32 120,000 B + float16 20,000 B.\n"
        "The challenge's checker (torchinfo) prints 1,500,000 MACs, 10.0% of the true cost: it counts a Linear layer "
        "once instead of once per token, and 0 for the scan and for other operations outside modules.\n"
        "Memory: fail, 140,000 of 128,000 B\n"
        "MACs: pass, 15,000,000 of 30,000,000"
    )


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        ({"param_bytes": {"float16": 128_000}}, None),
        ({}, "memory 1.09 x (within with --weight_bits 16)"),
        ({"bytes_in_bits": {16: 128_001, 8: 128_000}}, "memory 1.09 x (within with --weight_bits 8)"),
        ({"bytes_in_bits": {16: 128_001, 8: 128_001}}, "memory 1.09 x"),
        ({"param_bytes": {"int8": 1}, "macs_by_part": {"scan": 60_000_000}}, "MACs 2 x"),
        (
            {"param_bytes": {"int8": 101_369_384}, "bytes_in_bits": {}, "macs_by_part": {"scan": 1_751_572_736}},
            "memory 792 x, MACs 58.4 x",
        ),
    ],
)
def test_warning_says_in_one_line_what_is_over(changes, over):
    line = warning(dataclasses.replace(TOY, **changes), "toy")
    shown = "(python -m dcase.complexity with the model's flags shows where)"
    assert line == (over and f"WARNING: toy is over the challenge's limits: {over} {shown}")


def test_command_line_prints_the_table_of_the_overridden_model(call_main):
    flags = "--model aum_tiny --n_mels 64 --target_length 33 --embed_dim 32 --depth 2 --patch_size 8,4"
    more = "--direction fo_bi --d_state 8 --pos_embed True"
    out = call_main(complexity.main, *flags.split(), *more.split()).succeeded().out
    model = tiny(patch_size=(8, 4), direction="fo_bi", d_state=8, pos_embed=True)
    assert f"{macs(model, INPUT):,}" in out and f"{sum(p.numel() for p in model.parameters()):,}" in out


@pytest.mark.parametrize(
    ("bits", "frames", "said"),
    [
        (16, 65, "Memory: pass, {bytes} of 128,000 B\nMACs: pass, 29,419,156 of 30,000,000\n"),
        (8, 65, "Memory: pass, {bytes} of 128,000 B\nMACs: pass, 29,419,156 of 30,000,000\n"),
        (32, 65, "Memory: fail, 244,592 of 128,000 B\nMACs: pass, 29,419,156 of 30,000,000\n"),
        (16, 129, "Memory: pass, {bytes} of 128,000 B\nMACs: fail, "),  # twice the frames
    ],
)
def test_enforce_ends_with_exit_code_1_after_the_table(call_main, bits, frames, said):
    flags = ["--model", "cp_mobile", "--weight_bits", bits, "--target_length", frames]
    table_alone = call_main(complexity.main, *flags).succeeded().out
    stored = f"{sum(complexity.stored_bytes(CPMobile(), bits).values()):,}"
    assert said.format(bytes=stored) in table_alone and "counts the same MACs" in table_alone
    enforced = call_main(complexity.main, *flags, "--enforce")
    assert enforced.out == table_alone and enforced.code == ("fail, " in said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "aum_huge"], f"--model is one of {', '.join(models.names())}; got 'aum_huge'"),
        (["--model", "cp_mobile", "--depth", "2"], "--depth does not apply to cp_mobile: leave it out"),
        (["--patch_size", "0,16"], "--patch_size"),
        (["--patch_size", "16,66"], "--patch_size"),
    ],
)
def test_bad_flags_end_with_one_line(call_main, flags, message):
    done = call_main(complexity.main, *flags)
    done.refused()
    assert done.error.startswith(f"error: {message}") and "\n" not in done.err.strip()
