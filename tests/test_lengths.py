"""Padded batches: what a clip gets there is what it gets alone, and so in training with --batch_lengths."""

import os
import subprocess
import sys

import pytest
import soundfile
import torch
from conftest import FIT, ROOT, SMALL, only_run
from data_folder import RATE, write_tones
from hypothesis import given, settings
from hypothesis import strategies as st

import aum
import train_base
from aum.scan import interface
from dcase import predict
from dcase.data.augment import Mix, freq_mixstyle
from dcase.data.logmel import LogMel, LogMelConfig
from dcase.data.sound import read_wav
from dcase.report.predictions import PREDICTIONS_CSV, read_predictions
from dcase.runs.checkpoints import load_checkpoint
from dcase.training.lit import SceneClassifier

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [pytest.param(torch.float64, "torch"), pytest.param(torch.float32, "torch"), (torch.float32, "cpu")]
if INTERPRETED:  # by the last test of this file
    BACKENDS = [(torch.float32, "triton")]
SHAPE = {"n_mels": 16, "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "n_classes": 3, "dropout": 0.0}
FRAMES = 23


@pytest.fixture(autouse=True)
def _needs_the_backend(request):
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if backend not in aum.available_backends():
            pytest.skip(f"backend {backend} is not available")


def close(got, expected, what):
    """Check that values agree to 1e-5, 1e-10 in float64, of the largest of them, or of 1."""
    tolerance = (1e-10 if expected.dtype == torch.float64 else 1e-5) * max(1.0, expected.abs().max().item())
    assert torch.allclose(got, expected, rtol=0, atol=tolerance), f"{what}: {(got - expected).abs().max()}"


def compare(function, x, lengths, parameters, axis):
    """Check ``function(x, lengths)`` and its gradients against those of the clips alone, cut at ``axis`` of x."""
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    leaves = [*x.values(), *parameters.values()]
    outputs = function(**x, lengths=torch.tensor(lengths))
    alone = [
        function(**{k: v[i : i + 1].narrow(axis, 0, l) for k, v in x.items()}, lengths=None)
        for i, l in enumerate(lengths)
    ]
    total, expected = [], []
    for k, output in enumerate(outputs):
        assert output.isfinite().all()
        for i, l in enumerate(lengths):
            one, own = alone[i][k], output[i : i + 1]
            if one.shape != own.shape:  # steps
                padding = own.narrow(axis, l, own.shape[axis] - l)
                assert not padding.any(), "the padding's output is not 0"
                own = own.narrow(axis, 0, l)
            close(own, one, f"output {k}, clip {i} of {l}")
            expected.append((one * _weights(one)).sum())
            total.append((own * _weights(one)).sum())
    gradients = torch.autograd.grad(sum(total), leaves, allow_unused=True)
    of_clips = torch.autograd.grad(sum(expected), leaves, allow_unused=True)
    for name, got, one in zip([*x, *parameters], gradients, of_clips, strict=True):
        assert (got is None) == (one is None), name
        if got is not None:
            close(got, one, f"gradient of {name}")


def _weights(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).cos()


def draw(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_scan(dtype, backend, l=11, lengths=(11, 1, 4, 7), softplus=True, bias=True, gate=True, reverse=False):
    b, d, n = len(lengths), 6, 3
    x = {name: draw(b, d, l, dtype=dtype, seed=i) for i, name in enumerate(["u", "delta", "z"][: 2 + gate])}
    x |= {name: draw(b, n, l, dtype=dtype, seed=i) for i, name in enumerate("BC", 3)}
    x["delta"] = x["delta"] if softplus else x["delta"].abs()
    parameters = {"A": -draw(d, n, dtype=dtype, seed=5).exp(), "D": draw(d, dtype=dtype, seed=6)}
    parameters |= {"delta_bias": draw(d, dtype=dtype, seed=7).abs()} if bias else {}
    parameters = {name: value.requires_grad_() for name, value in parameters.items()}
    options = {"delta_softplus": softplus, "return_last_state": True, "reverse": reverse, "backend": backend}
    compare(lambda **x: aum.selective_scan_fn(**x, **parameters, **options), x, lengths, parameters, axis=2)


@pytest.mark.parametrize("dtype, backend", BACKENDS)
@settings(max_examples=3 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(st.data())
def test_the_scan_of_a_padded_batch_is_that_of_its_clips(dtype, backend, data):
    l = data.draw(st.sampled_from([1, 2, 5] if INTERPRETED else [1, 2, 7, 41]), "l")
    lengths = data.draw(st.lists(st.integers(1, l), min_size=1, max_size=4), "lengths")
    options = {name: data.draw(st.booleans(), name) for name in ("softplus", "bias", "gate", "reverse")}
    check_scan(dtype, backend, l, lengths, **options)


def check_mixer(dtype, backend, direction, lengths=(9, 5, 2), composed=False):
    torch.manual_seed(1)
    mixer = aum.BiMamba(16, d_state=3, direction=direction).to(dtype)
    if composed:  # a hook takes the way step by step
        mixer.x_proj.register_forward_hook(lambda *_: None)
    with aum.use_backend(backend):
        x = {"hidden": draw(len(lengths), max(lengths), 16, dtype=dtype)}
        compare(lambda **x: (mixer(**x),), x, lengths, dict(mixer.named_parameters()), axis=1)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("direction", ["fo_fo", "fo_bi", "bi_bi"])
@pytest.mark.parametrize("dtype, backend", BACKENDS)
def test_the_mixer_of_a_padded_batch_is_that_of_its_clips(dtype, backend, direction, composed):
    if INTERPRETED:
        return check_mixer(dtype, backend, direction, (5, 1, 3), composed)
    for lengths in ((9, 1, 5, 2), (45, 44, 3, 1)):  # of the kernels for short sequences, and above one chunk of steps
        check_mixer(dtype, backend, direction, lengths, composed)


MODELS = {
    "mean, class token in the middle": {},
    "class token in the middle": {"pool": "cls"},
    "class token at the start": {"pool": "cls", "cls_position": "start"},
    "class token at the end": {"pool": "cls", "cls_position": "end"},
    "no class token": {"cls_position": "none", "head": "linear"},
    "overlapping patches": {"strides": (4, 3), "pool": "cls"},
    "rows": {"cls_position": "none", "row_scan": True},
    "pairs of layers": {"paired_layers": True, "direction": "fo_fo"},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype, backend", BACKENDS)
def test_the_logits_of_a_padded_batch_are_those_of_its_clips(dtype, backend, options):
    torch.manual_seed(2)
    model = aum.AudioMamba(aum.AuMConfig(**SHAPE | options)).to(dtype)
    with aum.use_backend(backend):
        lengths = (23, 4, 12, 22, 7)  # whole and broken columns of patches, and a single one
        x = {"x": draw(len(lengths), 1, 16, FRAMES, dtype=dtype)}
        for function in (model, model.forward_features):
            compare(lambda **x: (function(**x),), x, lengths, dict(model.named_parameters()), axis=3)  # noqa: B023
    alone = model.forward_tokens(x["x"][2:3, ..., :12])
    tokens, *layers = model.forward_tokens(**x, lengths=lengths), *model.forward_layers(**x, lengths=lengths)
    if not model.config.row_scan:  # its rows are padded one by one
        close(tokens[2:3, : alone.shape[1]], alone, "tokens")
    assert [layer.shape for layer in layers[-1:]] == [tokens.shape]


@pytest.mark.parametrize("mixer", ["ours, with a bias", "compat.Mamba"])
def test_parts_that_are_replaced_leave_the_clips_alone(mixer):
    model, lengths = aum.AudioMamba(aum.AuMConfig(**SHAPE)).double(), [23, 4, 12]
    model.norm_f = torch.nn.LayerNorm(16, dtype=torch.float64)
    torch.nn.init.normal_(model.norm_f.bias)
    for layer in model.layers:
        if mixer == "compat.Mamba":
            layer.mixer = aum.compat.Mamba(16, bimamba_type="v2").double()
        layer.mixer.out_proj = torch.nn.Linear(32, 16, dtype=torch.float64)
    x = {"x": draw(3, 1, 16, FRAMES, dtype=torch.float64)}
    compare(lambda **x: (model(**x),), x, lengths, dict(model.named_parameters()), axis=3)


def test_full_lengths_change_nothing(monkeypatch):
    model, x = aum.AudioMamba(aum.AuMConfig(**SHAPE)).eval(), draw(3, 1, 16, FRAMES, dtype=torch.float32)
    expected = model(x)
    monkeypatch.setattr(aum.AudioMamba, "_own_tokens", None)
    assert torch.equal(model(x, torch.tensor([FRAMES] * 3)), expected)
    assert torch.equal(model(x, lengths=[23, 21, 20]), expected)  # the same 5 columns of patches


@pytest.mark.parametrize(
    "options, names",
    [
        ({"stem": (4,)}, "stem"),
        ({"freq_norm": 0.5}, "freq_norm"),
        ({"pos_embed": True}, "pos_embed"),
        ({"cls_position": "none", "local_conv": True, "head": "patch"}, "local_conv, head patch"),
    ],
)
def test_a_model_that_mixes_frames_refuses_lengths(options, names):
    model = aum.AudioMamba(aum.AuMConfig(**SHAPE | {"target_length": FRAMES, "patch_size": (4, 2)} | options))
    with pytest.raises(ValueError, match=f"^lengths do not go with {names}, .*batches of one length$"):
        model(draw(2, 1, 16, FRAMES, dtype=torch.float32), torch.tensor([FRAMES, FRAMES]))


@pytest.mark.parametrize(
    "lengths, message",
    [
        (torch.tensor([23, 3]), "lengths are from 4 to 23 here; got 3 to 23"),
        (torch.tensor([24, 9]), "lengths are from 4 to 23 here; got 9 to 24"),
        (torch.tensor([23.0, 9.0]), r"lengths are 2 whole numbers, one for each clip; got torch.float32 \(2,\)"),
        (torch.tensor([23, 9, 9]), r"lengths are 2 whole numbers, one for each clip; got torch.int64 \(3,\)"),
        (torch.tensor([True, False]), r"lengths are 2 whole numbers, one for each clip; got torch.bool \(2,\)"),
        (torch.ones(2, FRAMES, dtype=torch.bool), r"lengths are 2 whole numbers, one for each clip; got"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, message):
    model = aum.AudioMamba(aum.AuMConfig(**SHAPE))
    with pytest.raises(ValueError, match=message):
        model(draw(2, 1, 16, FRAMES, dtype=torch.float32), lengths)


def test_masks_of_another_shape_are_refused():
    u = draw(5, 3, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="^lengths are 5 whole numbers"):
        aum.selective_scan_fn(u, u.abs(), -torch.ones(3, 2), u[:, :2], u[:, :2], lengths=torch.tensor([True] * 5))


@pytest.mark.parametrize("by", [-1, 1])
def test_lengths_that_are_off_by_one_are_noticed(monkeypatch, by):
    true = interface.padding_mask

    def off(lengths, b, l, *rest, **options):
        if lengths is not None and lengths.dtype != torch.bool:
            lengths = (lengths + by).clamp(1, l)
        return true(lengths, b, l, *rest, **options)

    monkeypatch.setattr(interface, "padding_mask", off)
    monkeypatch.setattr("aum.mamba.padding_mask", off)
    with pytest.raises(AssertionError):
        check_scan(torch.float64, "torch", reverse=True)
    with pytest.raises(AssertionError):
        check_mixer(torch.float64, "torch", "bi_bi")


@pytest.mark.skipif(INTERPRETED, reason="this is the run in the interpreter")
def test_all_of_it_in_tritons_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before the kernels are decorated."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "the_scan_of or the_mixer_of and False",
        __file__,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


# ---- in training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several_lengths(tmp_path_factory):
    """The tones, each cut to a length of its own, from 0.1 s to half a second."""
    folder = tmp_path_factory.mktemp("several") / "data"
    write_tones(folder, places=(1, 2))
    for i, path in enumerate(sorted((folder / "audio").iterdir())):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[: RATE // 10 + 67 * i], rate, subtype="PCM_16")
    return folder


def test_clips_of_several_lengths_train_at_their_own(several_lengths, call_main, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    shape = ["--pos_embed", "False", "--mixstyle_p", "1", "--mixup_alpha", "0.3", "--batch_lengths"]
    few = ["--n_epochs", "1", "--project_name", "P"]
    data = ["--dataset_dir", several_lengths]
    done = call_main(train_base.main, *data, *SMALL, *FIT, *few, *shape)
    assert done.code == 0, done.err
    longest = max(soundfile.info(path).frames for path in (several_lengths / "audio").iterdir())
    assert f"the longest recording has {1 + longest // 128} frames (--target_length)" in done.out

    run = only_run(tmp_path / "P")
    checkpoint = load_checkpoint(run / "checkpoints/best.ckpt")
    assert checkpoint["frames"] == checkpoint["config"]["logmel"]["target_length"] == 1 + longest // 128
    module = SceneClassifier.from_checkpoint(checkpoint).eval()
    tested = read_predictions(run / PREDICTIONS_CSV, module.labels)
    lengths = set()
    for name, logits in zip(tested.filenames, tested.logits, strict=True):
        waveform = read_wav(several_lengths / name, RATE)
        lengths.add(waveform.shape[-1])
        alone = module.model(
            (module.logmel._whole(waveform[None])[..., : 1 + waveform.shape[-1] // 128] - module.logmel.mean)
            / module.logmel.std
        )
        torch.testing.assert_close(alone[0].double(), torch.from_numpy(logits), atol=1e-4, rtol=0)
    assert len(lengths) > 10

    done = call_main(
        predict.main, several_lengths / "audio", "--ckpt_path", run / "checkpoints/best.ckpt", "--out", "p.csv"
    )
    assert done.code == 0 and "repeated" not in done.out, done.err


@pytest.mark.parametrize("model", ["aum_nano", "cp_mobile"])
def test_models_that_mix_frames_refuse_batch_lengths(model, several_lengths, call_main):
    args = ["--dataset_dir", several_lengths, "--model", model, "--batch_lengths", "--wandb_mode", "disabled"]
    done = call_main(train_base.main, *args, "--num_workers", "0", "--project_name", "P")
    done.refused(f"--batch_lengths: {model} would mix a clip with its padding", "take --model aum_tiny")


def test_the_front_end_and_its_augmentation_leave_the_padding_out():
    config = LogMelConfig(8000, 256, 128, 256, 8, target_length=9, batch_lengths=True)
    length = torch.tensor([1024, 300])
    waveform = draw(2, 1, 1024, dtype=torch.float32)
    module, alone = LogMel(config, 8000), LogMel(LogMelConfig(8000, 256, 128, 256, 8), 8000)
    clips = [alone.raw(waveform[i : i + 1, :, :n]) for i, n in enumerate(length.tolist())]
    module.fit([(waveform, length)])
    values = torch.cat([clip.flatten() for clip in clips])
    torch.testing.assert_close(module.mean, values.mean())
    torch.testing.assert_close(module.std, values.std(correction=0))

    frames = torch.tensor([clip.shape[-1] for clip in clips])
    torch.manual_seed(0)
    x = module(waveform, length)
    mixed = freq_mixstyle(x, 1.0, 0.5, frames)
    torch.manual_seed(0)
    x[1, ..., frames[1] :] = 1e3
    again = freq_mixstyle(x, 1.0, 0.5, frames)
    for one, other, n in zip(mixed, again, frames, strict=True):
        torch.testing.assert_close(one[..., :n], other[..., :n])
    assert Mix(torch.ones(3), torch.tensor([1, 2, 0])).lengths(torch.tensor([4, 9, 2])).tolist() == [9, 9, 4]
