"""The challenge's published checkpoints: files of every layout are made up here, as trainers write them."""

import argparse
import collections
import json
import os
import pathlib
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import QUIET, only_run, read_results, refusal
from data_folder import SAMPLE_RATE, clip_row, noise, write_lists
from test_cp_mobile import random_model

import test_only
import train_base
from dcase import predict, submit
from dcase.data.labels import DEVICES, SCENES, Labels
from dcase.data.logmel import LogMel, LogMelConfig
from dcase.deployment.prediction import load_module
from dcase.model.cp_mobile import CPMobile
from dcase.runs.challenge import load_file
from dcase.runs.checkpoints import UNKNOWN_CLIPS
from dcase.runs.config import BaseConfig
from dcase.runs.defaults import with_defaults
from dcase.runs.trained import load_trained
from dcase.submission import inference
from dcase.submission.package import Submission
from dcase.training.lit import SceneClassifier

TUNED = ("a", "s1")
MODELS = {"general": random_model(0), **{device: random_model(seed) for seed, device in enumerate(TUNED, start=1)}}


def tensors(model: CPMobile, start: str) -> dict:
    return {f"{start}{name}": x.clone() for name, x in model.state_dict().items()}


def single(start: str = "model.") -> dict:
    return tensors(MODELS["general"], start)


def multi_device(start: str = "multi_device_model.") -> dict:
    state = tensors(MODELS["general"], f"{start}base_model.")
    for device in TUNED:
        state |= tensors(MODELS[device], f"{start}device_models.{device}.")
    return state


def front_end() -> dict:
    ours = LogMel(LogMelConfig(), SAMPLE_RATE)
    return {
        "mel.0.kernel": torch.zeros(320, 1, 459),
        "mel.1.spectrogram.window": ours.window.clone(),
        "mel.1.mel_scale.fb": ours.filters + 2e-5,  # another version's rounding
    }


def halved(state: dict) -> dict:
    return {name: x.half() if x.is_floating_point() else x for name, x in state.items()}


def lightning(state: dict, **more) -> dict:
    return {"epoch": 3, "pytorch-lightning_version": "2.4.0", "state_dict": state, "callbacks": {}, **more}


def beside() -> dict:
    """What trainers keep in hyper_parameters and callbacks."""
    best = collections.defaultdict(list, {"a": [np.float64(0.5)]})
    return {"config": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")), "best": best, "seen": np.arange(3)}


LAYOUTS = {
    "multi-device": lambda: lightning(multi_device() | front_end()),
    "multi-device, half": lambda: lightning(halved(multi_device()) | front_end()),
    "single": lambda: lightning(single() | front_end(), hyper_parameters=beside()),
    "single, bfloat16": lambda: lightning({name: x.bfloat16() for name, x in single().items()}),
    "container's own": lambda: multi_device("model."),
    "bare": lambda: single(""),
    "beside a teacher": lambda: lightning(single() | {"teacher_model.conv.weight": torch.ones(2, 2)}),
}


def written(tmp_path, content: object, name: str = "published.ckpt") -> str:
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def rounded_as(content: dict, model: CPMobile) -> CPMobile:
    """The network with the weights as they are in the file."""
    dtype = next(x.dtype for x in content.get("state_dict", content).values())
    again = CPMobile().eval()
    again.load_state_dict(
        {name: x.to(dtype).float() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    )
    return again


def test_the_front_end_is_the_baselines():
    baseline = LogMelConfig(sample_rate=32000, window_length=3072, hop_length=500, n_fft=4096, n_mels=256, f_min=0.0)
    assert LogMelConfig() == baseline and baseline.f_max is None and baseline.target_length is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_networks_own_logits(layout, tmp_path, capsys):
    content = LAYOUTS[layout]()
    module = load_module(written(tmp_path, content))
    said = capsys.readouterr().out.strip()
    assert "\n" not in said and "the challenge's CP-Mobile" in said
    with_devices = "device_models" in str(list(content.get("state_dict", content)))
    assert list(module.device_models) == (list(TUNED) if with_devices else [])
    assert ("as in the file" in said) == ("mel.1.spectrogram.window" in content.get("state_dict", content))
    assert ("argparse.Namespace, collections.defaultdict, numpy." in said) == ("hyper_parameters" in content)
    assert ("left out: teacher_model" in said) == (layout == "beside a teacher")

    waveform = torch.from_numpy(np.stack([noise(seed, SAMPLE_RATE) for seed in range(3)])[:, None]).float()
    device = torch.tensor([DEVICES.index("a"), DEVICES.index("s1"), DEVICES.index("s5")])
    logmel = LogMel(LogMelConfig(), SAMPLE_RATE)
    sound, length = logmel.resampled(waveform, torch.full((3,), SAMPLE_RATE))
    with torch.no_grad():
        x, found = logmel.raw(sound, length), module(waveform, device)  # log(mel + 1e-5), not normalised
        rows = {"a": [0], "s1": [1], "general": [2]} if with_devices else {"general": [0, 1, 2]}
        for model, of_model in rows.items():
            assert torch.equal(found[of_model], rounded_as(content, MODELS[model])(x[of_model]))
    checkpoint = module.as_checkpoint()
    assert checkpoint["clips_id"] == UNKNOWN_CLIPS
    assert checkpoint["config"]["storage"]["weight_bits"] == (16 if "half" in layout else 32)
    assert Labels.from_plain(checkpoint, "") == module.labels and module.labels.scenes == SCENES


class RunsCode:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def with_grn() -> dict:
    return lightning(single() | {"model.stages.s1.b1.after_block_norm.gamma": torch.ones(1)})


def without(name: str) -> dict:
    state = multi_device()
    del state[name]
    return lightning(state)


def other_scenes() -> dict:
    return lightning(tensors(CPMobile(7), "model."))


def other_filters() -> dict:
    filters = {"mel.1.mel_scale.fb": LogMel(LogMelConfig(sample_rate=44100), SAMPLE_RATE).filters.clone()}
    return lightning(single() | front_end() | filters)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


REFUSED = {
    "code": (lambda: lightning(single(), hyper_parameters={"x": RunsCode()}), "it holds builtins.eval beside weights"),
    "a module": (lambda: CPMobile(), "it holds dcase.model.cp_mobile.Block beside weights"),
    "network": (with_grn, "the challenge's baseline: model.stages.s1.b1.after_block_norm.gamma is none of its tensors"),
    "missing": (
        lambda: without("multi_device_model.device_models.s1.in_c.0.0.weight"),
        "multi_device_model.device_models.s1.in_c.0.0.weight is missing",
    ),
    "classes": (other_scenes, "model.feed_forward.0.weight is (7, 104, 1, 1), not (10, 104, 1, 1)"),
    "filters": (other_filters, "has another front end than the challenge's baseline: mel.1.mel_scale.fb differs"),
    "window": (lambda: lightning(single() | {"mel.window": torch.ones(2048)}), "mel.window differs"),
    "integers": (lambda: {name: x.int() for name, x in single().items()}, "model.in_c.0.0.weight is of torch.int32"),
    "device": (lambda: multi_device() | tensors(MODELS["a"], "multi_device_model.device_models.q."), "device_ids"),
    "other names": (
        lambda: lightning(multi_device("student.")),
        "holds no CP-Mobile of the challenge's baseline, under model. or multi_device_model.; it holds student.device",
    ),
    "no weights": (lambda: {"epoch": 3}, "written neither by train_base.py nor train_device_specific.py"),
    "no values": (lambda: lightning({n: x.to("meta") for n, x in single().items()}), "more values than the file holds"),
    "nested": (lambda: lightning(single() | {"x": nested()}), "x claims more values than the file holds"),
    "not finite": (lambda: lightning({n: x * float("nan") for n, x in single().items()}), "is NaN or infinite"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_that_one_line_says_why(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = REFUSED[what]
    path = written(tmp_path, content())
    said = refusal(load_trained, path)
    assert said.startswith((f"checkpoint {path}", f"--ckpt_path {path}")) and reason in said
    assert not os.path.exists("ran")


@pytest.mark.parametrize("kind", [torch.Tensor.to_sparse, lambda x: x.to("meta")])
def test_a_checkpoint_of_ours_without_plain_values_is_refused_too(kind, tmp_path):
    checkpoint = SceneClassifier(with_defaults(BaseConfig(), "aum_nano"), 65).as_checkpoint() | {"clips_id": "x"}
    state = checkpoint["state_dict"]
    state |= {name: kind(x) for name, x in state.items() if name.startswith("model.patch_embed")}
    said = refusal(load_trained, written(tmp_path, checkpoint))
    assert "claims more values than the file holds" in said


def test_at_most_three_differences_are_named(tmp_path):
    said = refusal(load_file, written(tmp_path, {f"in_c.{n}": torch.ones(1) for n in range(9)}))
    assert said.count("in_c") == 3 and re.search(r"and \d+ more differences$", said)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory):
    """A data folder with clips of a second: 16 for training and 4 to test."""
    folder = tmp_path_factory.mktemp("seconds") / "data"
    rows = [
        clip_row(scene, "lisbon", 10 * number + place, 0, device)
        for number, scene in enumerate(("airport", "tram"), start=1)
        for place in range(4)
        for device in ("a", "s1")
    ]
    test = [clip_row("airport", "lyon", 7, piece, device) for piece, device in enumerate(("a", "b", "s1", "s4"))]
    write_lists(folder, rows, test)
    (folder / "audio").mkdir()
    for seed, (name, *_) in enumerate(rows + test):
        soundfile.write(folder / name, noise(seed, SAMPLE_RATE), SAMPLE_RATE, subtype="PCM_24")
    return folder


def logits_of(folder, names: list[str], devices: list[str], bits: type = torch.float16) -> torch.Tensor:
    """What the file's networks say of clips, after the baseline's front end."""
    logmel, content = LogMel(LogMelConfig(), SAMPLE_RATE), {"x": torch.zeros(1, dtype=bits)}
    found = []
    for name, device in zip(names, devices, strict=True):
        waveform = torch.from_numpy(soundfile.read(folder / name, dtype="float32")[0])[None, None]
        x = logmel.raw(*logmel.resampled(waveform, torch.tensor([SAMPLE_RATE])))
        with torch.no_grad():
            found.append(rounded_as(content, MODELS[device if device in TUNED else "general"])(x)[0])
    return torch.stack(found)


def test_it_is_tested_predicts_and_is_packaged(seconds, tmp_path, call_main):
    path = written(tmp_path, LAYOUTS["multi-device, half"]())
    call_main(test_only.main, "--ckpt_path", path, "--dataset_dir", seconds, "--project_name", "P", *QUIET).succeeded()
    results = read_results(only_run(tmp_path / "P"))
    names = [f"audio/airport-lyon-7-70-{n}-{device}.wav" for n, device in enumerate(("a", "b", "s1", "s4"))]
    wanted = logits_of(seconds, names, ["a", "b", "s1", "s4"])
    right = wanted.argmax(1) == SCENES.index("airport")
    assert results["device_models"] == list(TUNED) and results["acc"] == pytest.approx(right.double().mean().item())
    assert results["loss"] == pytest.approx(-wanted.log_softmax(1)[:, SCENES.index("airport")].mean().item(), abs=1e-5)

    wav = seconds / names[2]
    call_main(predict.main, wav, "--ckpt_path", path, "--device_id", "s1", "--out", "scenes.json").succeeded()
    assert SCENES[wanted[2].argmax()] in json.dumps(json.loads((tmp_path / "scenes.json").read_text()))

    call_main(submit.main, "--ckpt_path", path, "--label", "Doe_Uni", "--dataset_dir", seconds).succeeded()
    models = inference.load(Submission(tmp_path / "submissions" / "Doe_Uni", "Doe_Uni", 1).checkpoint)
    packed = torch.stack(inference.predict(models, [seconds / name for name in names], ["a", "b", "s1", "s4"]))
    torch.testing.assert_close(packed, wanted, atol=1e-5, rtol=1e-5)


def test_weights_in_32_bits_are_to_be_stored_smaller_before_they_are_packaged(tmp_path):
    path = written(tmp_path, LAYOUTS["single"]())
    assert f"test_only.py --ckpt_path {path} --weight_bits 16 stores it smaller" in refusal(submit.trained, path)


@pytest.mark.parametrize("flag", ["--pretrained", "--init_from"])
def test_training_starts_from_it(flag, seconds, tmp_path, call_main):
    """At a learning rate of 0 only BatchNorm's statistics move."""
    path = written(tmp_path, LAYOUTS["multi-device"]())
    fit = "--model cp_mobile --n_epochs 1 --batch_size 8 --lr 0 --val_fraction 0 --project_name P".split()
    done = call_main(train_base.main, flag, path, "--dataset_dir", seconds, *fit, *QUIET).succeeded()
    assert f"WARNING: the model {flag} {path} does not name the clips that it was trained on" in done.out
    state = load_file(only_run(tmp_path / "P") / "checkpoints" / "last.ckpt")["state_dict"]
    for name, wanted in MODELS["general"].named_parameters():
        assert torch.equal(state[f"model.{name}"], wanted), name


def test_it_does_not_start_another_model(tmp_path):
    module = SceneClassifier(with_defaults(BaseConfig(), "aum_nano"), 65)
    said = refusal(module.start_from, load_file(written(tmp_path, LAYOUTS["single"]())))
    assert said == "--init_from: that model is of another kind than --model: give the same"


def test_a_teacher_of_random_weights_is_found_out(seconds, tmp_path, call_main):
    path = written(tmp_path, LAYOUTS["single"]())
    fit = "--model cp_mobile --n_epochs 1 --batch_size 8 --val_fraction 0 --project_name P".split()
    done = call_main(train_base.main, "--teacher", path, "--dataset_dir", seconds, *fit, *QUIET)
    assert done.code == 2 and f"error: --teacher {path} is right on " in done.err
    assert f"WARNING: the teacher --teacher {path} does not name the clips that it was trained on" in done.out
    assert len(list((tmp_path / "P" / "teacher_outputs").glob("*.pt"))) == 1
