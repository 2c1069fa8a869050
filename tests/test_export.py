"""Exported models: the same logits as PyTorch's, weights as they are stored, and what is refused."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import refusal, tone
from onnx import numpy_helper
from stored_files import with_device_models
from torch import Tensor, nn
from torch.export import Dim

import aum
from aum.scan import loop_scan, torch_scan
from dcase import cli, export
from dcase.data.labels import SCENES
from dcase.data.logmel import LogMel, LogMelConfig
from dcase.deployment import onnx_format
from dcase.deployment.exported import Exported, FrontEnd
from dcase.export import ExportConfig, Mismatch
from dcase.model import named as models
from dcase.model.quantisation import decode, encode
from dcase.runs.checkpoints import load_checkpoint, save_checkpoint
from dcase.runs.folder import Run
from dcase.runs.stored import load_model, load_stored, save_stored
from dcase.training.lit import SceneClassifier

TINY = {"n_mels": 16, "target_length": 20, "patch_size": (8, 4), "embed_dim": 16, "depth": 2, "d_state": 3}
VARIANTS = {
    "bi_bi": {"head": "mlp"},
    "fo_bi": {"direction": "fo_bi", "head": "linear", "pool": "cls", "pos_embed": True},
    "fo_fo, paired": {"direction": "fo_fo", "paired_layers": True, "cls_position": "end", "head": "linear"},
}


def shaken(model: nn.Module) -> nn.Module:
    """With other weights and statistics than at the start, where many are 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
    return model.eval()


def onnx_of(model: nn.Module, example: Tensor, bits: int, path: Path):
    """ONNX Runtime's function of a model of log-mels."""
    with torch.no_grad():
        program = torch.export.export(
            Exported(model, bits), (example,), dynamic_shapes=({0: Dim("batch")},), strict=False
        )
    path.write_bytes(onnx_format.to_onnx(program, "log_mel", {}))
    return onnx_format.runner(path)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


def stored_as_they_are(path: Path, stored: dict[str, Tensor]) -> None:
    """The file holds these tensors, bit for bit and of their dtypes, under their names, and no others of their size."""
    there = initializers(path)
    for name, value in stored.items():
        if value.numel():  # of a position embedding without a class token
            held = there["weights." + name.replace(".scale", "_scale")]
            assert held.dtype == value.numpy().dtype and np.array_equal(held, value.numpy()), name
    others = [x.size for name, x in there.items() if not name.startswith(("weights.", "front_end."))]
    assert max(others) <= onnx_format.FOLDED


@pytest.mark.parametrize("name", [*VARIANTS, "aum_nano", "cp_mobile"])
def test_onnx_runtime_gives_pytorchs_logits(name, tmp_path):
    bits = {"aum_nano": 8, "cp_mobile": 16}.get(name, 32)
    if name in VARIANTS:
        model, shape = aum.AudioMamba(aum.AuMConfig(**TINY, **VARIANTS[name])), (16, 20)
    else:
        model, shape = (
            models.build(models.ModelConfig(model=name, depth=1 if name == "aum_nano" else None), 256, 65),
            (256, 65),
        )
    model = shaken(model)
    x = torch.randn(8, 1, *shape)
    run = onnx_of(model, x[:2], bits, tmp_path / "model.onnx")
    stored = encode(model.state_dict(), bits)
    stored_as_they_are(tmp_path / "model.onnx", stored)
    model.load_state_dict(model.state_dict() | decode(stored))
    for b in (1, 3, 8):
        with torch.no_grad():
            expected = model(x[:b])
        assert expected.std() > 0.05
        assert (run(x[:b]) - expected).abs().max() < 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert ("Scan" in operators) == (name != "cp_mobile")


def test_a_mixer_that_is_not_plain_is_exported_too(tmp_path):
    model = shaken(aum.AudioMamba(aum.AuMConfig(**{**TINY, "depth": 1})))
    model.layers[0].mixer.x_proj.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 1, 16, 20)
    with torch.no_grad():
        expected = model(x)
    assert (onnx_of(model, x[:2], 32, tmp_path / "model.onnx")(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("groups, reverse", [(1, False), (2, True)])
def test_the_loop_scans_as_the_reference_does(groups, reverse):
    torch.manual_seed(0)
    b, d, l, n = 2, 6, 5, 3
    u, delta, z = torch.randn(3, b, d, l)
    A, D, bias = -torch.rand(d, n), torch.randn(d), torch.randn(d)
    B, C = torch.randn(2, b, groups, n, l)
    arguments = (u, delta, A, B, C, D, z, bias, True, reverse)
    for ours, wanted in zip(loop_scan.scan(*arguments), torch_scan.scan(*arguments), strict=True):
        assert (ours - wanted).abs().max() < 1e-5


def test_the_loop_is_for_export_alone():
    assert "loop" not in aum.available_backends()
    with pytest.raises(ValueError, match="'loop'.*torch.export"), aum.use_backend("loop"):
        aum.BiMamba(16)(torch.randn(1, 4, 16))


# The front end

FRONT_ENDS = {
    "as trained": (LogMelConfig(), 44100, 44100),
    "cut": (LogMelConfig(target_length=40), 44100, 44100),
    "padded, not resampled": (LogMelConfig(target_length=80), 32000, 32000),
    "small": (LogMelConfig(8000, 256, 128, 256, 32), 8000, 4000),
    "other factors, upper frequencies left out": (LogMelConfig(8000, 200, 70, 250, 32, 50, 3000), 16000, 9999),
    "prime": (LogMelConfig(16000, 401, 160, 401, 32), 44100, 22050),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("in_graph", [True, False])
def test_the_front_end_in_matrix_products_is_the_front_end(name, in_graph):
    config, rate, samples = FRONT_ENDS[name]
    logmel = LogMel(config, rate)
    logmel.mean.fill_(-5)
    logmel.std.fill_(3)
    torch.manual_seed(0)
    waveform = torch.randn(3, samples) * torch.tensor([[0.1], [1e-4], [0.0]])
    expected = logmel(*logmel.resampled(waveform.unsqueeze(1), torch.full((3,), samples)))
    x = FrontEnd(logmel, samples, in_graph)(waveform)
    assert x.shape == expected.shape
    assert (x - expected).abs().max() < 1e-5


# The command


@pytest.fixture
def call(call_main):
    return partial(call_main, export.main)


def config_of(run: Path, **options) -> ExportConfig:
    return ExportConfig(ckpt_path=str(run / "checkpoints/best.ckpt"), **options)


def module_of(run: Path) -> SceneClassifier:
    return SceneClassifier.from_checkpoint(load_checkpoint(run / "checkpoints/best.ckpt")).eval()


@pytest.fixture(scope="module")
def with_device(general_run, tmp_path_factory) -> Path:
    """A run's checkpoint that holds a model of device a, too."""
    run = Run(tmp_path_factory.mktemp("devices") / "run")
    save_checkpoint(with_device_models(general_run / "checkpoints/best.ckpt", {"a": 1.5}), run.best)
    shutil.copy(general_run / "config.json", run.folder)
    return run.best


def test_a_recording_goes_in_as_windows_and_an_8_bit_model_stays_one(general_run, learnable, call, tmp_path):
    ckpt = general_run / "checkpoints/best.ckpt"
    done = call("--ckpt_path", ckpt, "--dataset_dir", learnable, "--weight_bits", 8, "--out", "model.onnx")
    assert done.code == 0, done.err
    assert "Largest Difference" in done.out and "on 32 clips" in done.out
    assert "waveform (b, 4000): exactly 0.50 s of one channel at 8,000 Hz\n" in done.out
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    module = module_of(general_run)
    stored = encode(module.model.state_dict(), 8)
    stored_as_they_are(path, stored)
    model = onnx.load(path)
    assert model.producer_name == "audio_mamba"
    (given,), (logits,) = model.graph.input, model.graph.output
    assert (given.name, logits.name) == ("waveform", "logits")
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 4000]
    session = onnx_format.session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["scenes"]) == list(SCENES)
    assert metadata["input"] == "waveform" and metadata["device_id"] == "general" and metadata["weight_bits"] == "8"
    assert (metadata["orig_sample_rate"], metadata["samples"], metadata["frames"]) == ("8000", "4000", "32")
    assert float(metadata["mean"]) == module.logmel.mean.item()
    assert json.loads(metadata["logmel"])["n_mels"] == 32
    waveform = np.concatenate([tone(scene, "a", 1) for scene in ("bus", "tram")]).astype(np.float32)
    windows = waveform.reshape(-1, 4000)
    (logits,) = session.run(["logits"], {"waveform": windows})
    assert [SCENES[i] for i in logits.argmax(1)] == ["bus", "tram"]
    module.model.load_state_dict(decode(stored))
    with torch.no_grad():
        expected = module(torch.from_numpy(windows).unsqueeze(1), torch.zeros(2, dtype=torch.long))
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4


def test_a_pt2_file_needs_nothing_of_ours(general_run, learnable, with_device, call, tmp_path):
    done = call(
        "--ckpt_path", with_device, "--dataset_dir", learnable, "--format", "torch_export",
        "--device_id", "a", "--input", "log_mel",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "log_mel (b, 1, 32, 32), normalised\n" in done.out
    path = with_device.parents[1] / "export" / "a.pt2"
    program = (
        "import sys, torch\n"
        f"model = torch.export.load({str(path)!r}).module()\n"
        "torch.save([model(torch.ones(b, 1, 32, 32)) for b in (1, 3)], 'logits')\n"
        "assert not {'aum', 'dcase'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module = SceneClassifier.from_checkpoint(load_checkpoint(with_device)).eval()
    one, three = torch.load(tmp_path / "logits", weights_only=True)
    with torch.no_grad():
        expected = module.device_models["a"](torch.ones(1, 1, 32, 32))
        assert (expected - module.model(torch.ones(1, 1, 32, 32))).abs().max() > 0.01
    assert (one - expected).abs().max() < 1e-5 and (three - expected).abs().max() < 1e-5


def test_safetensors_are_what_a_run_stores(with_device, learnable, call, tmp_path):
    done = call(
        "--ckpt_path", with_device, "--dataset_dir", learnable, "--format", "safetensors",
        "--device_id", "a", "--weight_bits", 16,
    )  # fmt: skip
    assert done.code == 0, done.err
    path = with_device.parents[1] / "export" / "a.safetensors"
    save_stored(SceneClassifier.from_checkpoint(load_checkpoint(with_device)).as_checkpoint(), tmp_path / "stored", 16)
    assert load_model(path)[1]["model"] == "a"
    assert path.read_bytes() == (tmp_path / "stored" / "a.safetensors").read_bytes()
    assert load_stored(path)["config"]["storage"]["weight_bits"] == 16  # not those of the run's training


def test_what_cannot_be_exported_is_refused(general_run, with_device, call, learnable, tmp_path):
    checkpoint = load_checkpoint(general_run / "checkpoints/best.ckpt")
    checkpoint["config"]["logmel"]["batch_lengths"], checkpoint["config"]["model"]["pos_embed"] = True, False
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: x for name, x in state.items() if "pos_embed" not in name}
    save_checkpoint(checkpoint, tmp_path / "own.ckpt")
    call("--ckpt_path", tmp_path / "own.ckpt", "--dataset_dir", learnable).refused("was trained with --batch_lengths")
    ckpt = ("--ckpt_path", general_run / "checkpoints/best.ckpt", "--dataset_dir", learnable)
    call(*ckpt, "--device_id", "s6").refused(
        "--device_id s6", "only general; the general model serves that device: leave --device_id out"
    )
    assert not (general_run / "export").exists()
    module = SceneClassifier.from_checkpoint(load_checkpoint(with_device))
    assert "only general, a; the general model serves" in refusal(export.choose, module, "b", None)
    assert refusal(export.choose, module, "z", None).endswith("only general, a")  # which is no device
    assert "--ckpt_path is missing" in refusal(ExportConfig)
    message = refusal(lambda: ExportConfig(ckpt_path="x", check_clips=0))
    assert "--check_clips is at least 1; got 0" in message


def test_a_format_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(ExportConfig, "", args=["--ckpt_path", "x", "--format", "tflite"])
    assert end.value.code == 2 and "tflite" in "".join(capsys.readouterr())


@pytest.fixture
def wrong(monkeypatch):
    """ONNX files in which one weight of the classifier is another one."""
    right = onnx_format.to_onnx

    def to_onnx(*args) -> bytes:
        model = onnx.load_from_string(right(*args))
        (bias,) = (value for value in model.graph.initializer if value.name == "weights.head.bias")
        array = numpy_helper.to_array(bias).copy()
        array[0] += 0.001
        bias.CopyFrom(numpy_helper.from_array(array, bias.name))
        return model.SerializeToString()

    monkeypatch.setattr(onnx_format, "to_onnx", to_onnx)


def test_a_file_that_calculates_something_else_is_not_kept(wrong, call, general_run, learnable, tmp_path):
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an earlier one")
    ckpt = general_run / "checkpoints/best.ckpt"
    done = call("--ckpt_path", ckpt, "--dataset_dir", learnable, "--out", out, "--input", "log_mel")
    assert done.code == 1
    assert done.error.startswith("error: logits differ from PyTorch's by up to 0.001 on 32 clips (0.0001 is allowed)")
    assert done.error.endswith("nothing was written")
    assert out.read_bytes() == b"an earlier one" and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("value, said", [(float("nan"), "up to nan"), (0.01, "up to 0.01")])
def test_any_difference_counts(general_run, value, said):
    module = module_of(general_run)
    off = lambda x: module.model(x) + value * (torch.arange(len(x)).view(-1, 1) == len(x) - 1)  # noqa: E731
    with pytest.raises(Mismatch, match=said):
        export.compare(off, module, export.LOG_MEL, torch.randn(9, 4000)).check()


def test_another_scene_counts(general_run):
    module = module_of(general_run)
    with pytest.raises(Mismatch, match="18 of 18 predictions are other scenes"):
        export.compare(lambda x: -module.model(x), module, export.LOG_MEL, torch.randn(9, 4000) * 0.1).check()
    with pytest.raises(Mismatch, match="shape"):
        export.compare(lambda x: module.model(x)[:, :9], module, export.LOG_MEL, torch.randn(9, 4000) * 0.1)


def test_files_lie_in_the_run_or_beside_a_checkpoint_of_none(tmp_path):
    run = Run(tmp_path / "run")
    run.stored.mkdir(parents=True)
    (run.folder / "config.json").touch()
    for given, device_id, expected in [
        (run.best, "a", run.export / "a.onnx"),
        (run.stored, "general", run.export / "general.onnx"),
        (run.stored / "b.safetensors", "general", run.export / "b.onnx"),
        (tmp_path / "alone.ckpt", "general", tmp_path / "export/general.onnx"),
    ]:
        assert export.default_path(ExportConfig(ckpt_path=str(given), device_id=device_id)) == expected
