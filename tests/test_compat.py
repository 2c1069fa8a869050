"""`aum.compat.Mamba` against the reference model's mixer: names, shapes, outputs, initial values and refusals."""

from types import SimpleNamespace

import pytest
import reference_model
import torch
import torch.nn.functional as F
from torch import Tensor

import aum
from aum.compat import DIRECTIONS, Mamba

D_MODEL, D_INNER, D_STATE, D_CONV, RANK = 24, 48, 5, 3, 2
SIZES = {"d_model": D_MODEL, "d_state": D_STATE, "d_conv": D_CONV}


def branch(suffix: str, A_log: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published branch."""
    return {
        A_log: (D_INNER, D_STATE),
        f"D{suffix}": (D_INNER,),
        f"conv1d{suffix}.weight": (D_INNER, 1, D_CONV),
        f"conv1d{suffix}.bias": (D_INNER,),
        f"x_proj{suffix}.weight": (RANK + 2 * D_STATE, D_INNER),
        f"dt_proj{suffix}.weight": (D_INNER, RANK),
        f"dt_proj{suffix}.bias": (D_INNER,),
    }


OUTER = {"in_proj.weight": (2 * D_INNER, D_MODEL), "out_proj.weight": (D_MODEL, D_INNER)}
PUBLISHED = {
    "none": OUTER | branch("", "A_log"),
    "v1": OUTER | branch("", "A_log") | {"A_b_log": (D_INNER, D_STATE)},
    "v2": OUTER | branch("", "A_log") | branch("_b", "A_b_log"),
}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def expected(state: dict[str, Tensor], x: Tensor, bimamba_type: str) -> Tensor:
    """The reference mixer's output, which is half the sum with "v2"."""
    config = SimpleNamespace(d_state=D_STATE, direction=DIRECTIONS[bimamba_type])
    state = {name: value.double().numpy() for name, value in state.items()}
    return torch.stack([torch.from_numpy(reference_model.mixer(state, clip.double().numpy(), config)) for clip in x])


@pytest.mark.parametrize("l", [17, 50])  # the CPU has kernels of its own for short sequences
@pytest.mark.parametrize("bimamba_type", PUBLISHED)
def test_published_state_dicts_load_and_mean_what_they_say(bimamba_type, l):
    state, x = drawn(PUBLISHED[bimamba_type]), torch.randn(2, l, D_MODEL)
    mixer = Mamba(**SIZES, bimamba_type=bimamba_type, if_divide_out=True)
    mixer.load_state_dict(state)  # strict
    torch.testing.assert_close(mixer(x), expected(state, x, bimamba_type).float(), rtol=1e-5, atol=1e-5)


def test_the_default_is_mambas_own_direction():
    assert {name: tuple(value.shape) for name, value in aum.compat.Mamba(**SIZES).state_dict().items()} == PUBLISHED[
        "none"
    ]


@pytest.mark.parametrize("divide", [{}, {"if_divide_out": True}, {"if_devide_out": True}])
def test_v2_is_the_sum_unless_it_is_divided(divide):
    state = drawn(PUBLISHED["v2"] | {"in_proj.bias": (2 * D_INNER,), "out_proj.bias": (D_MODEL,)})
    x, bias = torch.randn(2, 20, D_MODEL), state["out_proj.bias"]
    mixer = Mamba(**SIZES, bimamba_type="v2", bias=True, **divide)
    mixer.load_state_dict(state)
    half = expected(state, x, "v2").float()
    torch.testing.assert_close(mixer(x), half if divide else 2 * (half - bias) + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_other_ranks_widths_and_no_bias_of_the_convolution(backend):
    shapes = {
        name: tuple({D_INNER: 36, 2 * D_INNER: 72, RANK: 7, RANK + 2 * D_STATE: 7 + 2 * D_STATE}.get(n, n) for n in s)
        for name, s in PUBLISHED["v2"].items()
    }
    without = {name: shape for name, shape in shapes.items() if not name.startswith("conv1d") or "bias" not in name}
    state, x = drawn(without | {"gamma": (D_MODEL,)}), torch.randn(2, 20, D_MODEL)
    options = {"expand": 1.5, "dt_rank": 7, "conv_bias": False, "init_layer_scale": 0.1, "if_divide_out": True}
    mixer = Mamba(**SIZES, **options, bimamba_type="v2")
    assert (mixer.gamma == 0.1).all()
    mixer.load_state_dict(state)
    zeros = {"conv1d.bias": torch.zeros(36), "conv1d_b.bias": torch.zeros(36)}
    with aum.use_backend(backend):
        y = mixer(x)
        y.sum().backward()
    torch.testing.assert_close(y, (expected(state | zeros, x, "v2") * state["gamma"]).float(), rtol=1e-5, atol=1e-5)
    assert all(parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())
    assert mixer.conv1d.bias is None  # and no buffer, which would be left without values by device="meta"


def test_initial_values_and_marks_are_the_published_ones():
    torch.manual_seed(0)
    mixer = Mamba(256, dt_min=0.01, dt_max=0.05, dt_init="constant", dt_scale=2.0, bimamba_type="v2")
    assert (mixer.dt_proj.weight == 2.0 / 4).all()
    delta = F.softplus(mixer.dt_proj.bias)
    assert 0.01 <= delta.min() < 0.011 and 0.045 < delta.max() <= 0.0501
    assert mixer.dt_proj_b.bias.abs().max() <= 1 / 4 and mixer.dt_proj_b.bias.min() < -0.2  # a plain linear layer's
    assert mixer.dt_proj.bias._no_reinit and not hasattr(mixer.dt_proj_b.bias, "_no_reinit")
    spared = {name for name, parameter in mixer.named_parameters() if hasattr(parameter, "_no_weight_decay")}
    assert spared == {"A_log", "D", "A_b_log", "D_b"}
    floor = F.softplus(Mamba(32, dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.02).dt_proj.bias)
    assert floor.tolist() == pytest.approx([0.02] * 64, rel=1e-4)


def test_a_device_and_a_dtype():
    mixer = Mamba(D_MODEL, device="meta", dtype=torch.float16, bimamba_type="v1", init_layer_scale=1.0)
    assert {parameter.device.type for parameter in mixer.parameters()} == {"meta"}
    single = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert single == {"A_log", "A_b_log", "D", "gamma"} and mixer.in_proj.weight.dtype == torch.float16
    mixer = Mamba(D_MODEL, dtype=torch.bfloat16)
    x = torch.randn(2, 9, D_MODEL)
    y = mixer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mixer.float()(x), rtol=0.1, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert Mamba(D_MODEL, bimamba_type="v2", bias=True)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"bimamba_type": "v3"}, "bimamba_type is none, v1 or v2; got 'v3'"),
        ({"dt_init": "ones"}, "dt_init is random or constant; got 'ones'"),
        ({"use_fast_path": False, "bimamba_type": "v1"}, "use_fast_path=False .* 'v1'"),
    ],
)
def test_arguments_without_a_meaning_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        Mamba(D_MODEL, **arguments)


def test_states_between_calls_are_refused():
    mixer, x = Mamba(D_MODEL, layer_idx=3, use_fast_path=False), torch.randn(1, 4, D_MODEL)
    assert mixer(x, inference_params=None).shape == x.shape and mixer.layer_idx == 3
    with pytest.raises(NotImplementedError, match="inference_params: .* whole sequences"):
        mixer(x, inference_params=SimpleNamespace(seqlen_offset=0))
    with pytest.raises(NotImplementedError, match="allocate_inference_cache: .* mamba_ssm's own"):
        mixer.allocate_inference_cache(1, 4)


@pytest.mark.parametrize("bias", [False, True])
def test_padded_batches_are_computed_clip_by_clip(bias):
    mixer, x = Mamba(**SIZES, bimamba_type="v2", bias=bias), torch.randn(3, 9, D_MODEL)
    lengths = [9, 1, 4]
    y = mixer(x, lengths=torch.tensor(lengths))
    for i, l in enumerate(lengths):
        torch.testing.assert_close(y[i, :l], mixer(x[i : i + 1, :l])[0], rtol=1e-5, atol=1e-5)
