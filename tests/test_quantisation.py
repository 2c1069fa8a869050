"""Rounded weights: how far off they are, what stays at 16 bits, training through them, and stored models on disk."""

import copy
import json
import pickle
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_files import file_sizes
from torch import Tensor, nn
from torch.func import functional_call

import aum
from dcase.model.quantisation import bytes_by_dtype, decode, encode, is_8_bit, rounded, stored_bytes
from dcase.runs.stored import KEY, load_model, save_model, save_stored

NANO = {"n_mels": 24, "target_length": 20, "patch_size": (8, 5), "embed_dim": 32, "depth": 2, "d_state": 3}
HEADER = {"config": {"model": "aum_nano", "lr": 0.1, "patch_size": [8, 5], "name": "Gänge"}, "frames": 20, "none": None}
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16


def tiny(**overrides) -> aum.AudioMamba:
    torch.manual_seed(0)
    return aum.AudioMamba(aum.AuMConfig(**{**NANO, "pos_embed": True, **overrides}))


def conv_net() -> nn.Sequential:
    """Convolutions, pointwise and depthwise, each with BatchNorm, whose statistics have left 0 and 1."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16)),
        nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 10),
    )
    net(torch.randn(4, 1, 24, 20))
    return net


MODELS = {"bi_bi": tiny(), "fo_bi": tiny(direction="fo_bi", head="linear"), "conv": conv_net()}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_size = pytest.mark.parametrize("bits", [32, 16, 8])


def clips(b: int = 3) -> Tensor:
    return torch.randn(b, 1, 24, 20, generator=torch.Generator().manual_seed(1))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits, but for the sign of 0."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# Rounding


def rows_of_every_size() -> Tensor:
    """(rows, 8): largest values around every multiple of float16's scales where a rounding could tip over, and from
    nothing to the largest that can be stored; the others of a row are random shares of them."""
    every_half = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    between = (every_half[1:] + every_half[:-1]) / 2
    near = torch.cat([every_half, between, *(every_half[:12000] * share for share in torch.rand(20, 1))]) * 127
    factors = torch.tensor([1, 1 - 2**-20, 1 + 2**-20, 1 - 2**-10, 1 + 2**-10])
    largest = torch.cat([(near[:, None] * factors).flatten(), torch.logspace(-45, 6.9, 50000), torch.zeros(2)])
    rows = (torch.rand(len(largest), 8) * 2 - 1) * largest[:, None]
    rows[:, 0] = largest
    rows[:, 1] = -largest / 2
    return rows[largest < 127 * 65519]


def test_8_bit_weights_are_off_by_half_a_step_at_most_and_are_rounded_only_once():
    torch.manual_seed(0)
    rows = rows_of_every_size()
    once = encode({"weight": rows}, 8)
    assert once["weight"].abs().max() == 127 and (once["weight.scale"] > 0).all()
    assert once["weight.scale"].min() == SMALLEST and once["weight.scale"].max() == LARGEST
    decoded = decode(once)
    again = encode(decoded, 8)
    changed = (again["weight"] != once["weight"]).any(1) | (again["weight.scale"] != once["weight.scale"])
    assert not changed.any(), rows[changed][0]
    rows, scale = rows.double(), once["weight.scale"].double()[:, None]
    error = (decoded["weight"].double() - rows).abs()
    assert (error <= scale * (0.5 + 1e-5)).all()  # and float32's rounding of the quotient
    # The scale is no larger than it must be, twice that where float16 has few bits, and never below its smallest.
    needed = rows.abs().amax(1, keepdim=True) / 127
    fine = needed >= 2.0**-17
    assert (scale <= torch.where(fine, needed * (1 + 2**-8), 2 * needed).clamp(min=SMALLEST)).all()


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.floats(-30, 4.5), min_size=1, max_size=6),
    st.sampled_from([(), (1,), (3, 3), (1, 4)]),
    st.sampled_from([16, 8]),
)
def test_any_tensor_survives_rounding(seed, exponents, kernel, bits):
    """Channels of very different size, some of zeros, in matrices and in kernels, strided or not."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([10.0**e if i % 3 < 2 else 0.0 for i, e in enumerate(exponents)])
    weight = torch.randn(len(size), 8, *kernel, generator=generator) * size.view(-1, *(1,) * (1 + len(kernel)))
    weight = weight.clamp(-LARGEST, LARGEST)
    state = {"a.weight": weight, "a.bias": weight[:, :1], "b.weight": weight.transpose(0, 1)}
    stored = encode(state, bits)
    decoded = decode(stored)
    assert same(encode(decoded, bits), stored)
    assert decoded.keys() == state.keys()
    assert all(value.is_contiguous() for value in stored.values())
    for name, value in state.items():
        assert decoded[name].dtype == torch.float32 and decoded[name].shape == value.shape
        error = (decoded[name] - value).abs().flatten(1)
        if stored[name].dtype == torch.int8:
            assert bits == 8 and is_8_bit(name, value)
            assert (error <= stored[f"{name}.scale"].float()[:, None] * (0.5 + 1e-5)).all(), name
        else:
            assert (error <= (value.abs().flatten(1) * 2**-11).clamp(min=SMALLEST / 2)).all(), name
    assert bytes_by_dtype(stored) == stored_bytes(state, bits)
    for name, value in rounded(state, bits).items():
        assert torch.equal(value, decoded[name]), name


def test_a_known_row():
    row = torch.tensor([[127.0, -127, 1, 0.5, 1.5, -0.4, 0, 63.6], [0.0] * 8, [-2 * 127.0, 2, 3.1, 0, 0, 0, 0, 0]])
    stored = encode({"w.weight": row}, 8)
    assert stored["w.weight"].tolist() == [[127, -127, 1, 0, 2, 0, 0, 64], [0] * 8, [-127, 1, 2, 0, 0, 0, 0, 0]]
    assert stored["w.weight.scale"].tolist() == [1, SMALLEST, 2]
    assert stored["w.weight"].dtype == torch.int8 and stored["w.weight.scale"].dtype == torch.float16


def test_32_bits_change_nothing_and_are_a_copy():
    state = tiny().state_dict()
    stored = encode(state, 32)
    assert same(stored, state) and same(decode(stored), state)
    for copied, value in ((decode(stored), stored), (stored, state)):
        for tensor in copied.values():
            tensor.zero_()
        assert value["layers.0.norm.weight"].min() == 1
    model = tiny()
    assert all(rounded(model, 32)[name] is parameter for name, parameter in model.named_parameters())


def test_what_cannot_be_stored_is_refused_by_name():
    matrix = torch.ones(2, 8)
    for bits in (32, 16, 8):
        for value in (float("nan"), float("inf"), -float("inf")):
            message = refusal(encode, {"fine.weight": matrix, "layers.3.weight": matrix * value}, bits)
            assert "layers.3.weight" in message and "not finite" in message
    message = refusal(encode, {"norm.running_var": torch.tensor([1.0, 65520])}, 8)
    assert "norm.running_var" in message and "6.552e+04" in message and "--weight_bits 8: use 32" in message
    assert "head.bias" in refusal(encode, {"head.bias": torch.tensor([-1e5])}, 16)
    assert "head.weight" in refusal(encode, {"head.weight": matrix * 127 * 65520}, 8)
    encode({"head.weight": matrix * 127 * 65519}, 8)
    encode({"head.bias": torch.tensor([65519.0])}, 16)
    for call in (encode, rounded, stored_bytes):
        assert "--weight_bits is 32, 16, 8; got 4" in refusal(call, {"head.weight": matrix}, 4)


def test_what_encode_does_not_make_is_refused_by_name():
    stored = encode({"a.weight": torch.ones(3, 8)}, 8)
    scale = stored["a.weight.scale"]
    for wrong in (None, scale[:2], scale.float(), scale.to(torch.int8), scale[:, None]):
        scales = {} if wrong is None else {"a.weight.scale": wrong}
        message = refusal(decode, {"a.weight": stored["a.weight"], **scales})
        assert "a.weight" in message and "float16 scale" in message
    assert "a.weight is not finite" in refusal(decode, {**stored, "a.weight.scale": scale * float("inf")})
    assert "b is not finite" in refusal(decode, {"b": torch.tensor([float("nan")]).half()})
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        assert f"b is {str(dtype).removeprefix('torch.')}" in refusal(decode, {"b": torch.ones(2).to(dtype)})


# What stays at 16 bits


def test_what_stays_at_16_bits_in_audio_mamba():
    stored = encode(aum.create_model("aum_small", depth=1, pos_embed=True).state_dict(), 8)
    mixer = "layers.0.mixer."
    in_8_bit = {mixer + f"{name}{b}.weight" for name in ("x_proj", "dt_proj") for b in ("", "_b")}
    in_8_bit |= {mixer + "in_proj.weight", mixer + "out_proj.weight"}
    in_8_bit |= {"patch_embed.proj.weight", "classifier.2.weight", "classifier.5.weight"}
    assert {name for name, value in stored.items() if value.dtype == torch.int8} == in_8_bit
    in_16_bit = {mixer + name for name in ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")}
    in_16_bit |= {mixer + f"conv1d{b}.{part}" for b in ("", "_b") for part in ("weight", "bias")}
    in_16_bit |= {"cls_token", "pos_embed.pos_embed", "patch_embed.proj.bias", "norm_f.weight", "layers.0.norm.weight"}
    in_16_bit |= {f"classifier.{part}" for part in ("0.weight", "0.bias", "2.bias", "5.bias")}
    assert stored.keys() == in_8_bit | {f"{name}.scale" for name in in_8_bit} | in_16_bit
    assert {value.dtype for name, value in stored.items() if name not in in_8_bit} == {torch.float16}
    assert stored[mixer + "in_proj.weight.scale"].shape == (1536,)
    assert stored["patch_embed.proj.weight"].shape == (384, 1, 16, 16)


def test_short_rows_stay_at_16_bits():
    assert is_8_bit("a.weight", torch.ones(3, 8)) and is_8_bit("weight", torch.ones(3, 1, 3, 3))
    assert not is_8_bit("a.weight", torch.ones(3, 7)) and not is_8_bit("conv1d.weight", torch.ones(96, 1, 4))
    assert not is_8_bit("norm.weight", torch.ones(64)) and not is_8_bit("empty.weight", torch.ones(0, 8))
    assert not is_8_bit("pos_embed", torch.ones(1, 65, 64)) and not is_8_bit("A_log", torch.ones(64, 16))


def test_batch_norm_counts_its_statistics_and_leaves_out_its_count_of_batches():
    net = conv_net()
    state = net.state_dict()
    assert {n for n, v in encode(state, 8).items() if v.dtype == torch.int8} == {
        "0.0.weight", "1.0.weight", "2.0.weight",
    }  # fmt: skip
    norms = [f"{i}.1." for i in (0, 1, 2)]
    floats = {name for name, value in state.items() if value.is_floating_point()}
    assert state.keys() - floats == {norm + "num_batches_tracked" for norm in norms}
    for bits in (32, 16, 8):
        assert decode(encode(state, bits)).keys() == floats
    assert encode(state, 8)["0.1.running_var"].dtype == torch.float16
    # 16 x 9, 4 x 16 and 4 x 9 codes, 24 scales; 18 biases, 40 weights; 4 values of each of 24 normalised channels.
    assert stored_bytes(net, 8) == {"int8": 244, "float16": 2 * (24 + 18 + 40 + 4 * 24)}
    assert stored_bytes(net, 16) == {"float16": 2 * (244 + 18 + 40 + 4 * 24)}
    assert stored_bytes(net, 32) == {"float32": 4 * (244 + 18 + 40 + 4 * 24)}


# Training with rounded weights


@each_model
@each_size
def test_rounded_weights_are_those_that_will_be_loaded(model, bits):
    encoded = encode(model.state_dict(), bits)
    assert stored_bytes(model, bits) == stored_bytes(model.state_dict(), bits) == bytes_by_dtype(encoded)
    stored = decode(encoded)
    weights = rounded(model, bits)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32 and value.requires_grad and torch.equal(value, stored[name]), name
    everything = rounded(model.state_dict(), bits)
    assert everything.keys() == model.state_dict().keys()
    for name, value in stored.items():
        assert torch.equal(everything[name], value), name
    loaded = copy.deepcopy(model).eval()
    loaded.load_state_dict({**model.state_dict(), **stored})
    model = copy.deepcopy(model).eval()
    assert torch.equal(functional_call(model, everything, (clips(),)), loaded(clips()))
    if bits < 32:
        assert not torch.equal(model(clips()), loaded(clips()))


@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_pass_straight_through_the_mixer(direction, backend):
    """They are those of a model that has the rounded weights, and reach the unrounded ones."""
    model = tiny(direction=direction).eval()
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(decode(encode(model.state_dict(), 8)))
    with aum.use_backend(backend):
        loaded(clips()).square().sum().backward()
        functional_call(model, rounded(model, 8), (clips(),)).square().sum().backward()
    expected = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert torch.equal(parameter.grad, expected[name].grad), name


@pytest.mark.parametrize("bits", [16, 8])
def test_the_gradient_is_the_identity_s(bits):
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(4, 9), "a.bias": torch.randn(4), "zero.weight": torch.zeros(2, 8)}
    for value in weights.values():
        value.requires_grad_()
    factors = {name: torch.randn_like(value) for name, value in weights.items()}
    sum((value * factors[name]).sum() for name, value in rounded(weights, bits).items()).backward()
    for name, value in weights.items():
        assert torch.equal(value.grad, factors[name]), name


def test_frozen_and_unused_weights_have_no_gradient():
    model = tiny(head="linear")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "norm_f")))
    weights = rounded(model, 8)
    stored = decode(encode(model.state_dict(), 8))
    for name, value in weights.items():
        assert value.requires_grad == name.startswith(("head", "norm_f")), name
        assert torch.equal(value, stored[name])
    functional_call(model, {**weights, "norm_f.weight": model.norm_f.weight.detach()}, (clips(),)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    with torch.no_grad():
        assert not any(value.requires_grad for value in rounded(model, 8).values())
    with torch.inference_mode():
        assert same(rounded(model, 8), stored)
    assert not any(value.requires_grad for value in rounded(model.requires_grad_(False), 8).values())


def test_weights_that_are_calculated_are_rounded_too():
    """As low-rank adapters give them."""
    model, up = tiny(), torch.full((32, 1), 0.01, requires_grad=True)
    name = "layers.0.mixer.out_proj.weight"
    summed = model.get_parameter(name).detach() + up @ torch.ones(1, 64)
    weights = rounded({**dict(model.named_parameters()), name: summed}, 8)
    assert torch.equal(weights[name], decode(encode({name: summed}, 8))[name])
    functional_call(model, weights, (clips(),)).square().sum().backward()
    assert up.grad.abs().max() > 0


@each_model
def test_autocast_rounds_no_further(model):
    model = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = rounded(model, 8)
        assert same(weights, rounded(dict(model.named_parameters()), 8))
        functional_call(model, weights, (clips(),)).float().square().sum().backward()
    stored = decode(encode(model.state_dict(), 8))
    for name, value in weights.items():
        assert torch.equal(value, stored[name]), name
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_batch_norm_goes_on_following_the_data():
    net = conv_net().train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    functional_call(net, rounded(net, 8), (clips() + 3,))
    assert all(not torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_steps_smaller_than_the_rounding_add_up():
    """Eight weights of 0 and 1 at 8 bits: steps of 1 / 127. The optimiser's are a fiftieth of that."""
    weight = nn.Parameter(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]))
    optimizer = torch.optim.SGD([weight], lr=1 / 127 / 50)
    seen = set()
    for _ in range(100):
        value = rounded({"weight": weight}, 8)["weight"]
        seen.add(round(value[0, 1].item() * 127))
        optimizer.zero_grad()
        (-value[0, 1]).backward()
        optimizer.step()
    assert seen == {0, 1, 2}


# Stored models


def saved(folder, model: nn.Module, bits: int = 8):
    path = folder / "stored" / "general.safetensors"
    save_model(path, model.state_dict(), bits, HEADER)
    return path


@each_model
@each_size
def test_a_stored_model_comes_back_and_is_stored_again_alike(tmp_path, model, bits):
    path = saved(tmp_path, model, bits)
    with safetensors.safe_open(path, "pt") as file:  # safetensors itself can read it
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = json.loads(file.metadata()[KEY])
    assert same(tensors, encode(model.state_dict(), bits))
    assert whole["format"] == 1 and whole["header"] == HEADER
    state, header = load_model(path)
    assert same(state, decode(tensors)) and header == HEADER
    assert [file.name for file in path.parent.iterdir()] == ["general.safetensors"]
    copy.deepcopy(model).load_state_dict({**model.state_dict(), **state})
    save_model(tmp_path / "again.safetensors", state, bits, header)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@each_model
@each_size
def test_on_disk_a_model_takes_what_is_counted(tmp_path, model, bits):
    for length in range(8):  # the header's padding takes every value
        path = tmp_path / f"{length}.safetensors"
        save_model(path, model.state_dict(), bits, {"padding": "x" * length})
        header_bytes, tensor_bytes = file_sizes(path)
        assert header_bytes + tensor_bytes == path.stat().st_size
        assert tensor_bytes == sum(stored_bytes(model, bits).values())
        assert header_bytes % 8 == 0
        assert json.loads(path.read_bytes()[8:header_bytes])["__metadata__"].keys() == {KEY}


def test_a_weight_that_cannot_be_stored_leaves_the_old_file(tmp_path):
    path = saved(tmp_path, tiny())
    before = path.read_bytes()
    model = tiny()
    nn.init.constant_(model.norm_f.weight, float("nan"))
    assert "norm_f.weight" in refusal(save_model, path, model.state_dict(), 8, HEADER)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
    (tmp_path / "file").write_text("no folder")
    assert "cannot be written" in refusal(save_model, tmp_path / "file" / "a.safetensors", {}, 8, {})
    for value in (float("nan"), tmp_path):  # no JSON
        with pytest.raises((ValueError, TypeError)):
            save_model(path, tiny().state_dict(), 8, {"value": value})
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_a_file_that_is_cut_short_or_has_a_wrong_byte_is_refused_wherever_it_is(tmp_path):
    path = tmp_path / "general.safetensors"  # short: every byte is tried
    header = {"config": {"model": "aum_nano"}}  # without letters such as ä, whose escape is the same in capitals
    save_model(path, nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)).state_dict(), 8, header)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        assert str(path) in refusal(load_model, path)
        for flip in (1, 0x20, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert str(path) in refusal(load_model, path)
    path.write_bytes(whole + b"\0")
    assert str(path) in refusal(load_model, path)


def test_a_header_with_another_shape_or_name_is_refused(tmp_path):
    path = tmp_path / "general.safetensors"
    save_model(path, {"b": torch.ones(12, 34)}, 16, HEADER)
    whole = path.read_bytes()
    for before, after in ((b"[12,34]", b"[34,12]"), (b'"b"', b'"c"'), (b'"F16"', b'"I16"'), (b"aum_nano", b"aum_tiny")):
        assert whole.count(before) == 1
        path.write_bytes(whole.replace(before, after))
        assert "checksum" in refusal(load_model, path)


def forged(path, tensors: dict[str, Tensor], metadata: dict | None) -> str:
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return refusal(load_model, path)


def test_another_s_file_is_refused_with_the_reason(tmp_path):
    path = saved(tmp_path, tiny())
    message = refusal(load_model, tmp_path / "none.safetensors")
    assert "none.safetensors cannot be read (No such file" in message and "--ckpt_path" in message
    assert "it is a folder" in refusal(load_model, tmp_path)
    tensors = {"a": torch.ones(2)}
    assert f"has no {KEY}" in forged(path, tensors, None)
    assert f"has no {KEY}" in forged(path, tensors, {"format": "pt"})
    assert "has format 2, and this code reads 1" in forged(path, tensors, {KEY: '{"format": 2}'})
    for text in ("", "{", "[]", "1", "null", "{}", '{"format": 1}', "[" * 10**5):
        assert "damaged" in forged(path, tensors, {KEY: text})
    for header in (1, None, "text", [], [["a", 1]]):
        text = json.dumps({"format": 1, "crc32": 1, "header": header})
        assert "damaged" in forged(path, tensors, {KEY: text})
    for header in ('{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800\\n"}'):
        assert "damaged" in forged(path, tensors, {KEY: f'{{"format": 1, "crc32": 1, "header": {header}}}'})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head.weight.scale": None}, "head.weight is int8 without"),
        ({"head.weight.scale": torch.ones(4).half()}, "head.weight is int8 without"),
        ({"head.weight": torch.ones(10, 32, dtype=torch.bfloat16)}, "head.weight is bfloat16"),
        ({"head.bias": torch.ones(10, dtype=torch.int64)}, "head.bias is int64"),
        ({"head.bias": torch.full((10,), float("inf")).half()}, "head.bias is not finite"),
        ({"head.weight.scale": torch.full((10,), float("nan")).half()}, "head.weight is not finite"),
    ],
)
def test_tensors_that_are_not_ours_are_refused_by_name(tmp_path, monkeypatch, change, reason):
    """Even where the checksum is right."""
    stored = encode(tiny(head="linear").state_dict(), 8)
    changed = {name: value for name, value in {**stored, **change}.items() if value is not None}
    monkeypatch.setattr("dcase.runs.stored.encode", lambda state, bits: state)
    path = tmp_path / "general.safetensors"
    save_model(path, changed, 8, HEADER)
    message = refusal(load_model, path)
    assert str(path) in message and reason in message


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    path = tmp_path / "general.safetensors"
    torch.save({"a": Trap()}, path)
    assert str(path) in refusal(load_model, path)
    pickled = pickle.dumps(Trap())
    for content in (pickled, struct.pack("<Q", len(pickled)) + pickled):
        path.write_bytes(content)
        assert str(path) in refusal(load_model, path)
    assert f"has no {KEY}" in forged(path, {"a": torch.ones(1)}, {"trap": pickled.decode("latin-1")})
    assert "damaged" in forged(path, {"a": torch.ones(1)}, {KEY: pickled.decode("latin-1")})
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickled)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_stored_models_of_devices_that_are_gone_are_removed(tmp_path):
    config = {"model": {}, "logmel": {}, "split": {}, "data": {"orig_sample_rate": 8000}}
    starts = ("model.", "device_models.a.", "device_models.b.")
    checkpoint = {"config": config, "device_ids": ["a", "b"], "frames": 65, "clips_id": "", "clips_per_step": 1}
    checkpoint |= {"dcase_format": 1, "state_dict": {f"{start}w": torch.ones(3) for start in starts}}
    save_stored(checkpoint, tmp_path, 16)
    save_stored(checkpoint | {"device_ids": ["a"]}, tmp_path, 16)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "general"]
