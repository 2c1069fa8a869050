"""Published and earlier checkpoints: files of each layout, with random weights, and every kind of defect in them."""

import argparse
import dataclasses
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import FIT, ROOT, SMALL, assert_same_run, only_run, refusal, wait_for
from forked import Program, run_script
from reference_model import logits, vim_tokens
from test_processes import PLAIN, assert_same_training
from test_survival import LONG

import aum
from aum.pretrained import __main__ as pretrained
from aum.pretrained.source import read_source
from aum.pretrained.transfer import Report, resized_grid, resized_kernel
from dcase import cli
from dcase.errors import UserError
from dcase.model import named as models
from dcase.model.named import ModelConfig
from dcase.model.quantisation import encode
from dcase.runs.config import BaseConfig, DeviceConfig, FitConfig, from_plain
from dcase.training.lit import SceneClassifier

DEPTH, D = 24, 32
KINDS = {"fo_fo": "none", "fo_bi": "v1", "bi_bi": "v2"}  # AuM's names for the directions


# Files as they are published: the names and shapes, from the tables of the authors' models


def layer(direction: str, d: int, n: int = 16) -> dict:
    """Name -> shape below layers.N."""
    di, r = 2 * d, -(-d // 16)
    branch = {
        "conv1d{}.weight": (di, 1, 4), "conv1d{}.bias": (di,), "x_proj{}.weight": (r + 2 * n, di),
        "dt_proj{}.weight": (di, r), "dt_proj{}.bias": (di,),
    }  # fmt: skip
    shapes = {"in_proj.weight": (2 * di, d), "out_proj.weight": (d, di), "A_log": (di, n), "D": (di,)}
    shapes |= {name.format(""): shape for name, shape in branch.items()}
    if direction != "fo_fo":
        shapes["A_b_log"] = (di, n)
    if direction == "bi_bi":
        shapes |= {name.format("_b"): shape for name, shape in branch.items()} | {"D_b": (di,)}
    return {f"mixer.{name}": shape for name, shape in shapes.items()} | {"norm.weight": (d,)}


def backbone(direction: str, d: int = D, depth: int = DEPTH, channels: int = 1, patch=(16, 16)) -> dict:
    shapes = {"cls_token": (1, 1, d), "norm_f.weight": (d,)}
    shapes |= {"patch_embed.proj.weight": (d, channels, *patch), "patch_embed.proj.bias": (d,)}
    return shapes | {f"layers.{i}.{k}": shape for i in range(depth) for k, shape in layer(direction, d).items()}


def fill(shapes: dict, seed: int = 0) -> dict:
    """Random weights of the sizes that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("A_log") or name.endswith("A_b_log"):
            x = torch.arange(1, shape[1] + 1).log() + 0.1 * x
        elif name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            x = 1 + 0.2 * x
        elif len(shape) >= 2 and "pos_embed" not in name and "cls" not in name:
            x = x / x[0].numel() ** 0.5
        state[name] = x
    return state


def linear_head(n_classes: int, d: int = D) -> dict:
    return {"head.weight": (n_classes, d), "head.bias": (n_classes,)}


def vim(d: int = D, depth: int = DEPTH, side: int = 4, n_classes: int = 1000, **other) -> dict:
    shapes = backbone("bi_bi", d, depth, channels=3, **other) | linear_head(n_classes, d)
    return fill(shapes | {"pos_embed": (1, side * side + 1, d)})


def audio(direction="bi_bi", d: int = D, depth: int = DEPTH, patches: int = 16, n_classes: int = 527, **other) -> dict:
    """AuM's; ``patches`` 0: without position embedding."""
    shapes = backbone(direction, d, depth, **other) | linear_head(n_classes, d)
    return fill(shapes | ({"pos_embed.pos_embed": (1, patches + 1, d)} if patches else {}))


def earlier(d: int = D, depth: int = DEPTH) -> dict:
    """The earlier code's model: no position embedding, an MLP as its head."""
    shapes = {f"aum_model.{name}": shape for name, shape in backbone("bi_bi", d, depth).items()}
    mlp = {"0.weight": (d,), "0.bias": (d,), "2.weight": (512, d), "2.bias": (512,)}
    mlp |= {"5.weight": (10, 512), "5.bias": (10,)}
    return fill(shapes | {f"classifier.{name}": shape for name, shape in mlp.items()})


def small(**other) -> dict:
    """AuM's, of two layers: for what goes wrong."""
    return audio(**{"d": 16, "depth": 2, "patches": 0, **other})


def model_for(path: Path, **changes) -> aum.AudioMamba:
    """The file's own model, with a grid of 4 x 4 patches."""
    config = {**vars(read_source(path).config), "n_mels": 64, "target_length": 64}
    return aum.AudioMamba(aum.AuMConfig(**config | changes)).eval()


def saved(content, folder: Path, name: str = "x.pth") -> Path:
    path = folder / name
    safetensors.torch.save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def load_own(content, folder: Path, name: str = "x.pth", source_grid=None, **changes) -> tuple:
    """Save a file and load it into its own model, changed: (the model, the report)."""
    path = saved(content, folder, name)
    model = model_for(path, **changes)
    return model, aum.load_pretrained(model, path, source_grid=source_grid)


def accounted(report: Report, model: aum.AudioMamba, in_file: int) -> None:
    """Every tensor of the model is in one part of the report, and every one of the file."""
    ours = [*report.loaded, *report.adapted, *report.initial]
    assert sorted(ours) == sorted(model.state_dict())
    assert len(report.loaded) + len(report.adapted) + len(report.left_out) == in_file


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(aum.PretrainedError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Every layout, whole

VIM = "vim"
LAYOUTS = {  # name -> (state dict, number of its tensors)
    VIM: (vim, 415),
    "fo_fo": (lambda **size: audio("fo_fo", **size), 247),
    "fo_bi": (lambda **size: audio("fo_bi", **size), 271),
    "bi_bi": (lambda **size: audio("bi_bi", **size), 415),
    "earlier": (earlier, 418),
}
GRIDS = {VIM: None, "earlier": None}  # the others do not say theirs: (4, 4)


def as_published(name: str, state: dict) -> dict:
    """The containers and prefixes of the authors' files."""
    if name == VIM:
        return {"model": state, "args": argparse.Namespace(batch_size=128), "epoch": 299}
    if name == "earlier":
        lightning = {f"model.{key}": value for key, value in state.items()}
        return {"state_dict": lightning | {"mel.mel_scale.fb": torch.rand(8, 4)}, "hyper_parameters": {"lr": 0.1}}
    return {f"module.{key}": value for key, value in state.items()}


def reference(name: str, state: dict, x: torch.Tensor, config: aum.AuMConfig) -> np.ndarray:
    """What the authors' model makes of a log-mel (n_mels, frames), in float64."""
    state = {key.removeprefix("aum_model."): value.double().numpy() for key, value in state.items()}
    if name == VIM:  # three equal channels that add up to the log-mel: the mean of the kernels is the sum over them
        return logits(state, np.stack([x.double().numpy() / 3] * 3), config, vim_tokens)
    return logits(state, x.double().numpy(), config)


def compare(model: aum.AudioMamba, name: str, state: dict) -> float:
    """The largest difference to the source model's outputs in float64; in float32 it is rounding's, too."""
    x = torch.randn(1, 1, 64, 64)
    expected = reference(name, state, x[0, 0], model.config)
    assert expected.std() > 0.1
    in_32 = np.abs(model(x)[0].detach().numpy() - expected).max() / np.abs(expected).max()
    in_64 = np.abs(model.double()(x.double())[0].detach().numpy() - expected).max()
    print(f"{name}: largest difference {in_64:.2g}; {in_32:.2g} of the largest output in float32")
    assert in_32 < 1e-4
    return in_64


FULL_SIZE = {  # the published models; (4, 4) patches keep the reference's loops short
    "Vim tiny": (VIM, {"d": 192}),
    "Vim small": (VIM, {"d": 384}),
    "AuM base, Fo-Bi": ("fo_bi", {"d": 768}),
    "AuM small, Bi-Bi": ("bi_bi", {"d": 384}),
    "the earlier code's small": ("earlier", {"d": 384}),
}


@pytest.mark.parametrize(
    "name, size",
    [pytest.param(name, {}, id=name) for name in LAYOUTS]
    + [pytest.param(*of, id=name, marks=pytest.mark.slow) for name, of in FULL_SIZE.items()],
)
def test_every_tensor_is_accounted_for_and_the_output_is_the_source_models(name, size, tmp_path):
    make, count = LAYOUTS[name]
    state = make(**size)
    assert len(state) == count
    path = saved(as_published(name, state), tmp_path)
    model = model_for(path)
    assert model.config.paired_layers == (name == "earlier") and model.config.depth == DEPTH
    report = aum.load_pretrained(model, path, source_grid=GRIDS.get(name, (4, 4)))
    path.unlink()
    accounted(report, model, count + (name == "earlier"))
    adapted = {"patch_embed.proj.weight", "pos_embed.pos_embed"} if name == VIM else set()
    assert set(report.adapted) == adapted and not report.initial
    assert list(report.left_out) == (["mel.mel_scale.fb"] if name == "earlier" else [])
    assert compare(model, name, state) < 1e-5


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod."]


@pytest.mark.parametrize("ending", ["pth", "pt", "ckpt", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_file_types(prefix, ending, tmp_path):
    state = small(direction="fo_bi", n_classes=10)
    content = {f"{prefix}{name}": value for name, value in state.items()}
    content = {"state_dict": content} if ending == "ckpt" else content
    model, report = load_own(content, tmp_path, f"x.{ending}")
    accounted(report, model, len(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_earlier_codes_prefixes_are_stripped_once_and_not_out_of_the_middle(tmp_path):
    state = earlier(16, 2)
    for prefix in ("", "model.", "module.", "model._orig_mod."):
        model, report = load_own({f"{prefix}{name}": value for name, value in state.items()}, tmp_path)
        accounted(report, model, len(state))
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name if name.startswith("classifier.") else f"aum_model.{name}"]), name


def test_half_precision_is_read_too(tmp_path):
    state = small()
    model, _ = load_own({name: value.half() for name, value in state.items()}, tmp_path, "x.safetensors")
    assert model.norm_f.weight.dtype == torch.float32
    assert torch.equal(model.norm_f.weight.detach(), state["norm_f.weight"].half().float())


def test_rotary_buffers_are_left_out_and_said(tmp_path):
    rope = {"rope.freqs_cos": torch.rand(16, 16), "rope.freqs_sin": torch.rand(16, 16)}
    _, report = load_own({"model": vim(16, 2) | rope}, tmp_path)
    assert set(report.left_out) == set(rope) and "computes differently: rotary" in str(report)


def test_the_report_of_415_tensors_fits_a_terminal(tmp_path):
    shape = {"n_mels": 256, "target_length": 65, "n_classes": 10, "head": "mlp", "pool": "mean"}
    lines = str(load_own(as_published(VIM, vim()), tmp_path, **shape)[1]).splitlines()
    assert len(lines) < 25 and max(map(len, lines[1:])) <= 112
    text = " ".join(" ".join(lines).split())
    for part in (
        "415 tensors in the layout of Vim: bi_bi, 24 layers of 32", "loaded: 411 tensors",
        "layers.0-23.mixer.conv1d_b.bias", "adapted: 2 tensors", "patch_embed.proj.weight: mean of its 3 channels",
        "row, 8 of 17, moved to the front; grid 4 x 4 resized to 16 x 4 (mel x time)", "left out: 2 tensors",
        "another head (linear, 1000 classes; here mlp, 10 classes)", "left at its initial value: 6 tensors",
        "computes differently: pool is cls in the published model, mean here (--pool)",
    ):  # fmt: skip
        assert part in text, part


# Resizing


def triangles(old: int, new: int, antialias: bool) -> np.ndarray:
    """(new, old): bilinear interpolation along one axis, pixels' centres at half numbers."""
    scale = old / new
    width = max(scale, 1) if antialias else 1
    centre = (np.arange(new)[:, None] + 0.5) * scale
    if not antialias:
        centre = centre.clip(0.5, old - 0.5)  # beyond the last centre it stays what it is there
    weights = np.clip(1 - np.abs(np.arange(old)[None] + 0.5 - centre) / width, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("new", [(16, 4), (8, 8), (3, 20)])
def test_position_embeddings_are_interpolated_with_antialiasing(new):
    rows = torch.randn(1, 8, 8, 5)
    mel, time = triangles(8, new[0], True), triangles(8, new[1], True)
    expected = np.einsum("im,jt,mtd->ijd", mel, time, rows[0].numpy())
    np.testing.assert_allclose(resized_grid(rows, new)[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("new", [(20, 24), (16, 16), (8, 4), (32, 8)])
def test_patch_kernels_are_resized_by_pseudo_inverse(new):
    kernel = torch.randn(3, 1, 16, 16)
    resized = resized_kernel(kernel, new).double().numpy()
    B = np.kron(triangles(16, new[0], False), triangles(16, new[1], False))  # resizes a patch, row by row
    w, v = kernel.double().numpy().reshape(3, -1), resized.reshape(3, -1)
    np.testing.assert_allclose(v, w @ np.linalg.pinv(B, rcond=1e-6), atol=1e-5)
    if min(new) >= 16:  # a larger patch gives what the patch gave
        patch = np.random.default_rng(0).normal(size=256)
        np.testing.assert_allclose(v @ (B @ patch), w @ patch, atol=1e-4)


def test_another_patch_size_and_grid_in_a_model(tmp_path):
    state = audio(d=16, depth=2)
    shape = {"patch_size": (8, 12), "n_mels": 64, "target_length": 60, "n_classes": 10}
    model, report = load_own(state, tmp_path, source_grid=(2, 8), **shape)
    assert report.adapted == {
        "patch_embed.proj.weight": "16 x 16 resized to 8 x 12 by pseudo-inverse",
        "pos_embed.pos_embed": "grid 2 x 8 resized to 8 x 5 (mel x time)",
    }
    torch.testing.assert_close(model.patch_embed.proj.weight, resized_kernel(state["patch_embed.proj.weight"], (8, 12)))
    pos, theirs = model.pos_embed.pos_embed[0], state["pos_embed.pos_embed"][0]
    assert torch.equal(pos[0], theirs[0])  # the class token's
    expected = resized_grid(theirs[1:].reshape(1, 2, 8, 16), (8, 5)).reshape(40, 16)
    torch.testing.assert_close(pos[1:].detach(), expected)
    assert model(torch.randn(1, 1, 64, 60)).isfinite().all()


def test_vims_class_row_is_the_middle_one(tmp_path):
    state = vim(16, 2, side=14)
    for i in range(197):
        state["pos_embed"][0, i] = i
    model, _ = load_own({"model": state}, tmp_path, n_mels=224, target_length=224)
    assert model.pos_embed.pos_embed[0, :, 0].tolist() == [98, *range(98), *range(99, 197)]


# The grid


def test_an_ambiguous_grid_is_refused_with_the_candidates_and_never_guessed(tmp_path):
    path = saved(audio(d=16, depth=2, patches=512), tmp_path)
    model = model_for(path, n_mels=128, target_length=1024)  # 8 x 64, which 128 mel bins would be a guess for
    before = model.pos_embed.pos_embed.clone()
    said = refused(aum.load_pretrained, model, path)
    assert "512 rows" in said and "4 x 128 or 8 x 64 or 16 x 32" in said
    assert torch.equal(model.pos_embed.pos_embed, before)
    assert "8 x 63 has 504" in refused(aum.load_pretrained, model, path, source_grid=(8, 63))
    assert "pos_embed.pos_embed" in aum.load_pretrained(model, path, source_grid=(8, 64)).loaded
    other = aum.load_pretrained(model, path, source_grid=(16, 32))
    assert other.adapted["pos_embed.pos_embed"] == "grid 16 x 32 resized to 8 x 64 (mel x time)"


def test_a_grid_that_leaves_no_choice_is_derived(tmp_path):
    path = saved(audio(d=16, depth=2, patches=4 * 3), tmp_path)
    assert read_source(path).find_grid() == (4, 3)
    none = saved(audio(d=16, depth=2, patches=7), tmp_path, "y.pth")
    assert "any number of mel bins" in refused(read_source(none).find_grid)
    model = model_for(none, n_mels=16, target_length=112)
    assert "pos_embed.pos_embed" in aum.load_pretrained(model, none, source_grid=(1, 7)).loaded


def test_vims_grid_is_square_or_given(tmp_path):
    state = vim(16, 2)
    state["pos_embed"] = torch.randn(1, 13, 16)
    path = saved({"model": state}, tmp_path)
    assert "no square grid" in refused(aum.load_pretrained, model_for(path), path)
    adapted = aum.load_pretrained(model_for(path), path, source_grid=(3, 4)).adapted
    assert "3 x 4 resized" in adapted["pos_embed.pos_embed"]


def test_without_need_no_grid_is_asked_for(tmp_path):
    _, report = load_own(audio(d=16, depth=2, patches=512), tmp_path, pos_embed=False)
    assert report.left_out == {"pos_embed.pos_embed": "this model has no position embedding (--pos_embed True)"}
    plain = saved(small(), tmp_path, "y.pth")
    assert "no position embedding" in refused(aum.load_pretrained, model_for(plain), plain, source_grid=(4, 4))
    report = aum.load_pretrained(model_for(plain, pos_embed=True), plain)
    assert report.initial == {"pos_embed.pos_embed": "the file has none"}


# Heads and shapes


def test_the_head_is_kept_or_left_out_by_its_classes(tmp_path):
    state = small(n_classes=527)
    path = saved(state, tmp_path)
    same = model_for(path)
    assert {"head.weight", "head.bias"} <= set(aum.load_pretrained(same, path).loaded)
    assert torch.equal(same.head.weight.detach(), state["head.weight"])
    other = model_for(path, n_classes=10)
    before = other.head.weight.clone()
    report = aum.load_pretrained(other, path)
    assert set(report.left_out) == set(report.initial) == {"head.weight", "head.bias"}
    assert torch.equal(other.head.weight, before)
    mlp, report = load_own(state, tmp_path, head="mlp")
    accounted(report, mlp, len(state))
    assert set(report.left_out) == {"head.weight", "head.bias"} and len(report.initial) == 6
    headless = saved({name: value for name, value in state.items() if "head" not in name}, tmp_path, "y.pth")
    assert set(aum.load_pretrained(other, headless).initial) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    "state, changes, flag",
    [
        (small(direction="fo_bi"), {"direction": "bi_bi"}, "fo_bi, and this model bi_bi: give --direction fo_bi"),
        (small(direction="bi_bi"), {"direction": "fo_bi"}, "give --direction bi_bi"),
        (small(direction="fo_fo"), {"direction": "fo_bi"}, "give --direction fo_fo"),
        (earlier(16, 2), {"paired_layers": False}, "give --paired_layers True"),
        (small(), {"paired_layers": True}, "give --paired_layers False"),
        (small(), {"depth": 4}, "give --depth 2"),
        (small(), {"embed_dim": 32}, "give --embed_dim 16"),
        (small(), {"d_state": 8}, "give --d_state 16"),
        (small(), {"d_conv": 3}, "give --d_conv 4"),
        (small(), {"expand": 1}, "give --expand 2"),
        (small(), {"stem": (4, 8)}, 'give --stem ""'),
    ],
)  # fmt: skip
def test_a_model_of_another_shape_is_refused_with_the_flag_to_give(state, changes, flag, tmp_path):
    path = saved(state, tmp_path)
    model = model_for(path, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = refused(aum.load_pretrained, model, path)
    assert flag in said and str(path) in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_class_tokens(tmp_path):
    state = audio(d=16, depth=2)
    model, report = load_own(state, tmp_path, source_grid=(4, 4), cls_position="none", pool="mean")
    assert report.left_out == {"cls_token": "this model has none"}
    assert report.adapted["pos_embed.pos_embed"] == "the class token's row left out"
    assert torch.equal(model.pos_embed.pos_embed.detach(), state["pos_embed.pos_embed"][:, 1:])
    none = saved(without(small(), "cls_token"), tmp_path, "y.pth")
    assert "give --cls_position none" in refused(aum.load_pretrained, model_for(none, cls_position="middle"), none)


def test_only_audio_mambas_take_weights(tmp_path):
    assert "Linear is no Audio Mamba" in refused(aum.load_pretrained, torch.nn.Linear(1, 1), "x.pth")


# Defects


def without(state: dict, *names: str) -> dict:
    return {name: value for name, value in state.items() if name not in names}


SOUND = small()
NAN = {"norm_f.weight": torch.full((16,), float("nan"))}
DEFECTS = {
    "missing": (without(SOUND, "layers.1.mixer.D_b"), "missing: layers.1.mixer.D_b"),
    "a whole layer missing": (
        {name: value for name, value in SOUND.items() if not name.startswith("layers.0.")}, "and 14 more",
    ),
    "half a head": (without(SOUND, "head.bias"), "missing: head.bias"),
    "no class token, with its row": (without(audio(d=16, depth=2), "norm_f.weight"), "missing: norm_f.weight"),
    "extra": (SOUND | {"layers.0.mixer.gamma": torch.ones(16)}, "unexpected: layers.0.mixer.gamma"),
    "extra, of a Lightning module": (
        {f"model.{name}": value for name, value in SOUND.items()} | {"ema.decay": torch.ones(1)},
        "unexpected: ema.decay",
    ),
    "two class tokens": (
        without(SOUND, "cls_token") | {"cls_token_head": torch.ones(1, 1, 16), "cls_token_tail": torch.ones(1, 1, 16)},
        "unexpected: cls_token_head, cls_token_tail",
    ),
    "wrong shape": (
        SOUND | {"layers.1.mixer.A_log": torch.zeros(32, 15)},
        "of a wrong shape: layers.1.mixer.A_log (32, 15), not (32, 16)",
    ),
    "wrong width of the head": (SOUND | {"head.weight": torch.zeros(527, 15)}, "head.weight (527, 15), not (527, 16)"),
    "wrong width of the position embedding": (
        SOUND | {"pos_embed.pos_embed": torch.zeros(1, 17, 8)}, "pos_embed.pos_embed (1, 17, 8), not (1, 17, 16)",
    ),
    "a flat position embedding": (SOUND | {"pos_embed.pos_embed": torch.zeros(17)}, "pos_embed.pos_embed (17,)"),
    "a kernel of four channels": (
        SOUND | {"patch_embed.proj.weight": torch.zeros(16, 4, 16, 16)}, "(16, 4, 16, 16), not (16, 1, 16, 16)",
    ),
    "not finite": (SOUND | NAN, "norm_f.weight has values that are not finite"),
    "stored in 8 bit": (encode(SOUND, 8), "stored in 8 bit: give the checkpoint of its run"),
    "integers": (SOUND | {"norm_f.weight": torch.ones(16, dtype=torch.int32)}, "norm_f.weight is of torch.int32"),
    "two state dicts": (SOUND | {f"model.{name}": value for name, value in SOUND.items()}, "two state dicts"),
    "adapters": ({"adapters.up.x": torch.ones(1), **SOUND}, "low-rank adapters"),
    "parts that only a run describes": (SOUND | {"stem.0.0.weight": torch.ones(1)}, "only a run's own checkpoint"),
    "another model": (torch.nn.Linear(2, 2).state_dict(), "no Audio Mamba"),
    "only a number": ({"epoch": 3}, "its entry 'epoch' is no tensor"),
    "a list": ([1, 2], "holds no state dict"),
    "nothing": ({}, "holds no state dict"),
    "another wrapper": ({"student": SOUND}, "looked for under model, state_dict, model_state_dict"),
    "more values than bytes": (
        SOUND | {"norm_f.weight": torch.zeros(1).expand(10**12)}, "norm_f.weight claims more values than the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "weights", "model_ema"])
def test_the_wrapper_that_holds_tensors_is_taken(key, tmp_path):
    wrapped = {"model": {"depth": 1}, "state_dict": {}, "epoch": 3} | {key: SOUND}
    assert read_source(saved(wrapped, tmp_path)).state.keys() == SOUND.keys()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_stops_with_one_line_that_names_it(defect, tmp_path, capsys):
    content, said = DEFECTS[defect]
    path = saved(content, tmp_path)
    message = refused(read_source, path)
    assert said in message and str(path) in message
    assert pretrained.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out and err == f"error: {message}\n"


class Harmful:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_code_in_the_pickle_is_refused_and_does_not_run(tmp_path, capsys):
    mark = tmp_path / "it_ran"
    for content in ({**SOUND, "x": Harmful(mark)}, {"model": SOUND, "args": Harmful(mark)}):
        path = saved(content, tmp_path)
        message = refused(read_source, path)
        assert "could run code" in message and "open" in message
        assert pretrained.main([str(path)]) == 1 and not mark.exists()


def test_files_that_are_none(tmp_path):
    whole = saved(SOUND, tmp_path).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    contents = {"cut.pth": whole[: len(whole) // 2], "flipped.pth": flipped, "empty.pth": b"", "text.pt": b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in refused(read_source, tmp_path / name), name
    weights = saved(SOUND, tmp_path, "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be read" in refused(read_source, tmp_path / "cut.safetensors")
    assert "does not exist" in refused(read_source, tmp_path / "nothing.pth")
    assert "is a folder without model.safetensors" in refused(read_source, tmp_path)


# The command line


def test_the_command_shows_what_a_file_holds(tmp_path, capsys):
    path = saved({"model": vim(16, 2)}, tmp_path)
    assert pretrained.main([str(path)]) == 0
    assert "left out: 0 tensors" in capsys.readouterr().out
    into = "--n_mels 256 --target_length 65 --n_classes 10 --pool mean --strides 16,8".split()
    assert pretrained.main([str(path), *into]) == 0
    assert "resized to 16 x 7" in capsys.readouterr().out
    assert pretrained.main([str(path), "--model", "aum_small"]) == 1
    assert "give --embed_dim 16" in capsys.readouterr().err
    assert pretrained.main([str(path), "--depth", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --depth is a whole number from 1 to 256")


def test_the_command_asks_for_an_ambiguous_grid(tmp_path, capsys):
    path = saved(audio(d=16, depth=2, patches=512), tmp_path)
    assert pretrained.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "4 x 128 or 8 x 64 or 16 x 32: give --source_grid MEL,TIME" in said and said.count("\n") == 1
    assert pretrained.main([str(path), "--source_grid", "8,64"]) == 0
    assert "loaded: 41 tensors" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        pretrained.main([str(path), "--source_grid", "8"])


def test_the_command_as_a_user_gives_it(script, tmp_path):
    path = saved({"module." + name: value for name, value in small(direction="fo_bi").items()}, tmp_path)
    done = script("aum.pretrained", path)
    assert done.code == 0 and not done.err and "AuM: fo_bi, 2 layers of 16" in done.out
    done = script("aum.pretrained", path, "--direction", "bi_bi")
    assert done.code == 1 and done.err.count("\n") == 1 and "give --direction fo_bi" in done.err


# Our own runs


def test_a_runs_checkpoint_says_its_grid_and_its_shape(general_run):
    path = general_run / "checkpoints" / "best.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    source = read_source(path)
    assert source.kind == "a run" and source.grid == (4, 8) == source.find_grid()
    assert "says that its grid is 4 x 8" in refused(source.find_grid, (8, 4))
    model = aum.AudioMamba(source.config)
    report = aum.load_pretrained(model, path)
    accounted(report, model, len(state))
    assert set(report.left_out) == {"logmel.mean", "logmel.std"}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())
    assert "--init_from" in str(report)


def test_a_nano_run_with_device_models_and_averaged_weights(tmp_path):
    config = BaseConfig(model=models.fill(ModelConfig("aum_nano"), 256, 65), fit=FitConfig(ema_decay=0.9))
    module = SceneClassifier(config, 65, ("a", "s1"))
    module.start_averaging()
    module.average.average = {name: value + 1 for name, value in module.average.average.items()}
    checkpoint = module.as_checkpoint()
    path = saved(checkpoint, tmp_path, "last.ckpt")
    model = aum.AudioMamba(module.model.config)
    report = aum.load_pretrained(model, path)
    accounted(report, model, len(checkpoint["state_dict"]))
    assert any(name.startswith("device_models.s1.") for name in report.left_out)
    own = module.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] + (1 if value.is_floating_point() else 0)), name
    shown = str(report)
    assert "the average of the weights over training's last steps" in " ".join(shown.split())
    assert len(shown.splitlines()) < 25 and "device_models.* (168)" in shown
    longer = aum.create_model("aum_nano", target_length=130)
    adapted = aum.load_pretrained(longer, path).adapted
    assert "resized" in adapted["pos_embed.pos_embed_time"] and "resized" not in adapted["pos_embed.pos_embed_mel"]
    assert "--stem" in refused(aum.load_pretrained, aum.create_model("aum_nano", stem=(8, 16)), path)


def test_flags_that_do_not_go_together():
    for config, wrong, said in (
        (BaseConfig, {"pretrained": "x.pth", "init_from": "abc"}, "--init_from"),
        (BaseConfig, {"pretrained_grid": (8, 64)}, "--pretrained_grid"),
        (BaseConfig, {"pretrained": "x.pth", "pretrained_grid": (0, 64)}, "--pretrained_grid"),
        (BaseConfig, {"pretrained": "x", "pretrained_grid": (8, 6), "model": ModelConfig("cp_mobile")}, "cp_mobile"),
        (BaseConfig, {"fit": FitConfig(layer_decay=0.5), "model": ModelConfig("cp_mobile")}, "--layer_decay"),
        (FitConfig, {"layer_decay": 0.0}, "--layer_decay"),
        (FitConfig, {"layer_decay": 1.1}, "--layer_decay"),
        (FitConfig, {"freeze_epochs": -1}, "--freeze_epochs"),
        (FitConfig, {"freeze_epochs": 3, "n_epochs": 3}, "--freeze_epochs"),
        (DeviceConfig, {"finetune": "lora", "fit": FitConfig(layer_decay=0.5)}, "--finetune full"),
    ):
        with pytest.raises(UserError, match=said):
            config(**wrong)
    assert from_plain(BaseConfig, {"pretrained": "x", "pretrained_grid": [8, 64]}).pretrained_grid == (8, 64)


# Fine-tuning


def test_layer_decay_is_beits_and_its_absence_changes_nothing():
    model = aum.create_model("aum_tiny", embed_dim=16, depth=3, pos_embed=True)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = aum.parameter_groups(model, 0.1, 1.0, 0.5)
    got = {name_of[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(got) == len(name_of)
    plain = aum.parameter_groups(model, 0.1)
    decayed = {name_of[id(p)] for p in plain[0]["params"]}
    for name, (lr, weight_decay) in got.items():
        part = name.split(".")
        depth = {"layers": 3 - int(part[1]) if part[0] == "layers" else 0, "norm_f": 0, "classifier": 0}
        assert lr == 0.5 ** depth.get(part[0], 4), name  # 4: patch embedding, class token, positions
        assert weight_decay == (0.1 if name in decayed else 0.0), name
    assert groups[0]["lr"] == 1.0  # what is logged
    assert [set(group) for group in plain] == [{"params", "weight_decay"}] * 2
    same = aum.parameter_groups(model, 0.1, 1.0)
    assert [[id(p) for p in group["params"]] for group in same] == [[id(p) for p in group["params"]] for group in plain]
    with pytest.raises(ValueError, match="layer_decay"):
        aum.parameter_groups(torch.nn.Linear(2, 2), 0.1, 1.0, 0.5)
    with pytest.raises(ValueError, match="layer_decay"):
        aum.parameter_groups(model, 0.1, layer_decay=0.5)


NANO = [*SMALL, "--model", "aum_nano", "--head", "patch", "--stem", "4,8"]  # it has BatchNorm in its backbone


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory) -> Path:
    """Weights of that model, as a run leaves them, moved off their initial values."""
    config = cli.parse(BaseConfig, "", args=NANO)
    config = dataclasses.replace(config, model=models.fill(config.model, 32, 32))
    module = SceneClassifier(config, 32)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        for name, buffer in module.model.named_buffers():
            if "running" in name:
                buffer += torch.rand_like(buffer)
    return saved(module.as_checkpoint(), tmp_path_factory.mktemp("pretrained"), "nano.ckpt")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_training_starts_from_a_file_and_its_first_epochs_move_the_head_alone(nano_file, learnable, script, tmp_path):
    args = [*NANO, *FIT, "--dataset_dir", learnable, "--val_fraction", 0, "--weight_decay", 0.1, "--project_name", "P"]
    args += ["--pretrained", nano_file, "--n_epochs", 2, "--freeze_epochs", 1, "--layer_decay", 0.5]
    done = script("train_base.py", *args).succeeded()
    assert "in the layout of a run: bi_bi, 1 layers of 16" in done.out and "left at its initial value: 0" in done.out
    start, run = load(nano_file)["state_dict"], only_run(tmp_path / "P")
    frozen, free = (load(run / "checkpoints" / name) for name in ("previous.ckpt", "last.ckpt"))
    moved = {
        key: {name for name, value in state["state_dict"].items() if not torch.equal(value, start[name])}
        for key, state in (("frozen", frozen), ("free", free))
    }
    backbone = {name for name in start if name.startswith("model.") and not name.startswith("model.head.")}
    head = {name for name in start if name.startswith("model.head.")}
    assert moved["frozen"] == head | {"logmel.mean", "logmel.std"}  # the log-mel is normalised as ever
    assert {name for name in backbone if start[name].numel()} <= moved["free"]
    assert len(frozen["optimizer_states"][0]["state"]) == len([n for n in head if n.endswith(("weight", "bias"))])
    rates = [group["lr"] for group in free["optimizer_states"][0]["param_groups"]]
    assert len(set(group["initial_lr"] for group in free["optimizer_states"][0]["param_groups"])) == 3 == len(rates) / 2


@pytest.fixture(scope="module")
def frozen_at_first(nano_file, learnable) -> list:
    """The flags of a run whose first epochs, of 24 steps each, train the head alone."""
    args = [*LONG, *NANO, "--pretrained", nano_file, "--layer_decay", "0.7", "--dataset_dir", learnable]
    return [*args, "--n_epochs", "6", "--freeze_epochs", "4"]


@pytest.fixture(scope="module")
def undisturbed(frozen_at_first, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    run_script("train_base.py", *frozen_at_first, cwd=cwd).succeeded()
    return only_run(cwd / "P")


@pytest.mark.parametrize("when", ["config.json", "checkpoints/last.ckpt"])
def test_stopped_while_frozen_and_resumed_equals_undisturbed_bit_for_bit(
    when, frozen_at_first, undisturbed, script, tmp_path
):
    """In the middle of an epoch; and killed before the first checkpoint, where the weights are taken once more."""
    program = Program("train_base.py", *frozen_at_first, cwd=tmp_path)
    wait_for(f"P/*/{when}", tmp_path, program)
    run, before = only_run(tmp_path / "P"), when == "config.json"
    program.send(signal.SIGKILL if before else signal.SIGTERM)
    assert program.wait().code == (-signal.SIGKILL if before else 128 + signal.SIGTERM)
    last = run / "checkpoints" / "last.ckpt"
    assert not last.exists() if before else load(last)["epoch"] < 4
    done = script("train_base.py", "--resume", run.name, "--project_name", "P").succeeded()
    assert ("pretrained weights of" in done.out) == before
    assert_same_run(run, undisturbed)


def test_two_processes_freeze_as_one_does(general_run, learnable, script, tmp_path):
    args = [*SMALL, *FIT, *PLAIN, "--dataset_dir", learnable, "--n_epochs", 2, "--freeze_epochs", 1]
    args += ["--layer_decay", 0.5, "--pretrained", general_run / "checkpoints" / "best.ckpt", "--lr", 0.003]
    for project, processes, batch_size in (("A", 1, 12), ("B", 2, 6)):
        sizes = ["--devices", processes, "--batch_size", batch_size]
        done = script("train_base.py", *args, "--project_name", project, *sizes).succeeded()
        assert done.out.count("pretrained weights of") == 1
    assert_same_training(only_run(tmp_path / "A"), only_run(tmp_path / "B"))


def test_a_script_refuses_what_does_not_fit(learnable, script, tmp_path):
    path = saved(audio(d=16, depth=1, patches=512), tmp_path)
    args = [*SMALL, *FIT, "--dataset_dir", learnable, "--d_state", 16]
    script("train_base.py", *args, "--pretrained", path).refused("8 x 64", "give --pretrained_grid MEL,TIME")
    config = cli.parse(BaseConfig, "", args=list(map(str, [*args, "--direction", "fo_bi"])))
    module = SceneClassifier(config, 32)
    assert "--pretrained: " in refusal(module.start_from_file, str(path), (8, 64))
    assert "give --direction bi_bi" in refusal(module.start_from_file, str(path), (8, 64))
    assert "does not exist" in refusal(module.start_from_file, str(tmp_path / "none.pth"), None)


def test_the_shown_commands_are_of_this_program(capsys):
    section = (ROOT / "docs/models_in_and_out.md").read_text()
    section = section.partition("## Starting from pretrained weights")[2].partition("\n## ")[0]
    commands = section.replace("\\\n", " ").split("```bash")[1].partition("```")[0].strip().splitlines()
    shown = [line.split("#")[0].split() for line in commands if "aum.pretrained" in line]
    assert shown
    for _, _, _, path, *args in shown:
        assert pretrained.main([path, *args]) == 1  # there is no such file, and the flags are right
        assert "does not exist" in capsys.readouterr().err


# create_model


def tiny_folder(folder: Path, **overrides) -> tuple[Path, aum.AudioMamba]:
    """An aum_tiny of two layers with random weights, saved."""
    torch.manual_seed(0)
    shape = {"depth": 2, "n_mels": 32, "target_length": 48, "pool": "cls", "pos_embed": True, "head": "linear"}
    model = aum.create_model("aum_tiny", **shape | overrides).eval()
    model.save_pretrained(folder / "saved", front_end={"sample_rate": 16000})
    return folder / "saved", model


def test_a_model_is_created_with_the_weights_of_a_folder(tmp_path, caplog):
    folder, saved_model = tiny_folder(tmp_path)
    caplog.set_level("INFO", "aum.create")
    x = torch.randn(2, 1, 32, 48)
    for place in (folder, str(folder), folder / "model.safetensors"):
        model = aum.create_model("aum_tiny", pretrained=place, depth=2)
        assert model.training and model.config == saved_model.config and model.front_end == {"sample_rate": 16000}
        assert torch.equal(model.eval()(x), saved_model(x))
        assert "left out: 0 tensors" in caplog.text and "left at its initial value: 0 tensors" in caplog.text
    assert pretrained.main([str(folder)]) == 0
    other = aum.create_model("aum_tiny", pretrained=folder, depth=2, n_classes=3, drop_path=0.1).eval()
    assert other(x).shape == (2, 3) and other.config.drop_path == 0.1
    assert torch.equal(other.forward_features(x), saved_model.forward_features(x))
    longer = aum.create_model("aum_tiny", pretrained=folder, depth=2, target_length=96)
    assert longer.config.grid == (2, 6) and torch.equal(longer.layers[1].mixer.D, saved_model.layers[1].mixer.D)
    assert "grid 2 x 3 resized to 2 x 6" in " ".join(caplog.text.split())
    folder, _ = tiny_folder(tmp_path / "fine", patch_size=(4, 4), pos_embed=False)  # less than a patch of the name's
    assert aum.create_model("aum_tiny", pretrained=folder, depth=2, target_length=12).config.grid == (8, 3)


def test_a_model_is_created_with_the_weights_of_a_file(general_run, tmp_path):
    path = saved(audio("fo_bi", d=192, depth=24, patches=512), tmp_path)
    assert "8 x 64 or 16 x 32" in refused(partial(aum.create_model, pretrained=path, direction="fo_bi"), "aum_tiny")
    model = aum.create_model("aum_tiny", pretrained=path, direction="fo_bi", source_grid=(8, 64))
    own = model_for(path, n_mels=128, target_length=1024)
    aum.load_pretrained(own, path, source_grid=(8, 64))
    assert model.config == own.config and (own.config.pool, own.config.n_classes) == ("cls", 527)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    headless = saved({k: v for k, v in audio(d=192, patches=0).items() if not k.startswith("head")}, tmp_path, "y.pth")
    model = aum.create_model("aum_tiny", pretrained=headless, n_mels=128)
    assert (model.config.head, model.config.n_classes, model.config.n_mels) == ("mlp", 10, 128)
    run = general_run / "checkpoints" / "best.ckpt"
    config = read_source(run).config
    shape = {name: getattr(config, name) for name in ("embed_dim", "depth", "d_state")}
    assert aum.create_model("aum_small", pretrained=run, **shape).config == config


def test_weights_that_contradict_the_name_are_refused(tmp_path):
    folder, _ = tiny_folder(tmp_path)
    for name, overrides, said in [
        (
            "aum_base",
            {},
            f"{folder} (save_pretrained) has embed_dim=192, and aum_base 768 here: give embed_dim=192, or",
        ),
        ("aum_tiny", {}, "has depth=2, and aum_tiny 24 here: give depth=2"),
        ("aum_tiny", {"depth": 2, "direction": "fo_fo"}, "give direction='bi_bi'"),
    ]:
        assert said in refused(partial(aum.create_model, pretrained=folder, **overrides), name)
    missing = tmp_path / "gone.pth"
    assert f"{missing} does not exist" in refused(partial(aum.create_model, pretrained=missing), "aum_tiny")
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(partial(aum.create_model, pretrained=folder), "aum_tiny")
    with pytest.raises(ValueError, match="pretrained is a folder, a file or a repository"):
        aum.create_model("aum_tiny", pretrained=True)


def test_another_name_is_a_repository_of_the_hub(monkeypatch, tmp_path):
    folder, saved_model = tiny_folder(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: folder if name == "me/tiny" else 1)
    model = aum.create_model("aum_tiny", pretrained="me/tiny", depth=2)
    assert torch.equal(model.norm_f.weight, saved_model.norm_f.weight) and model.config == saved_model.config
