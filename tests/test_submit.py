"""A submission from a small run: built, installed into a fresh environment, called as the challenge does, checked."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PathDistribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import RATE, ROOT, only_run, read_results, refusal
from stored_files import with_device_models
from test_imports import imported

import test_only
from dcase import complexity, submit, validate_submission
from dcase.data.labels import DEVICES, SCENES
from dcase.data.sound import read_wav
from dcase.data.tau22 import load_clips
from dcase.files import write_json
from dcase.model.named import ModelConfig
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import DeviceConfig, EvalConfig, from_plain, to_plain
from dcase.runs.folder import Run, run_of
from dcase.runs.stored import save_stored
from dcase.runs.trained import load_trained
from dcase.submission import inference, probe
from dcase.submission.meta import meta_of, read_authors, todo_fields
from dcase.submission.meta_check import check_meta
from dcase.submission.output import HEADER, check_output, evaluation_list, write_output
from dcase.submission.package import NEEDED, Submission, needed_code
from dcase.training.lit import SceneClassifier

TUNED = ("a", "b", "s1")
AUTHORS = [
    {
        "lastname": "Doe",
        "firstname": "Jo",
        "email": "jo@uni.example",
        "corresponding": True,
        "affiliation": {"abbreviation": "Uni", "institute": "University", "department": "Sound", "location": "Lyon"},
    }
]
CALL = """
import json, sys
from Doe_Uni_task1 import Doe_Uni_task1_1 as api
paths, device_ids = json.load(open(sys.argv[1]))
logits, class_order = api.predict(file_paths=paths, device_ids=device_ids, model_file_path=None, use_cuda=False)
model = api.load_model()
inputs = api.load_inputs(paths, device_ids, model)
json.dump({
    "logits": [x.tolist() for x in logits],
    "class_order": class_order,
    "input_shapes": sorted({tuple(x.shape) for x in inputs}),
    "where": api.__file__,
    "weights": sorted(model.model.state_dict()),
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}, open(sys.argv[2], "w"))
"""


def tuned(general_run: Path, bits: int) -> dict:
    return with_device_models(general_run / "checkpoints" / "best.ckpt", {"a": 1.3, "b": 0.7, "s1": 1.1}, bits)


@dataclass(frozen=True)
class Made:
    """A submission of a small run, and what it was made from."""

    submission: Submission
    run: Path  # of the test whose stored/ was given
    eval_dir: Path

    @property
    def folder(self) -> Path:
        return self.submission.folder


def call(main, *args, cwd: Path | None = None) -> None:
    """Run a command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["python -m", *map(str, args)])
        if cwd:
            patch.chdir(cwd)
        main()


@pytest.fixture(scope="session")
def made(general_run, learnable, tmp_path_factory) -> Made:
    """Stage 1's run, a stage 2's on it, their test, and the submission of what that has stored in 8 bits."""
    cwd = tmp_path_factory.mktemp("submit")
    shutil.copytree(general_run, cwd / "P" / general_run.name)
    checkpoint = tuned(general_run, 8)
    config = replace(from_plain(DeviceConfig, checkpoint["config"]), ckpt_id=general_run.name, finetune="lora")
    write_json(cwd / "P" / "stage2" / "config.json", {"config": to_plain(config)})
    save_stored(checkpoint, cwd / "P" / "stage2" / "stored", 8)
    quiet = ["--wandb_mode", "disabled", "--accelerator", "cpu", "--num_workers", "0", "--dataset_dir", learnable]
    call(test_only.main, "--ckpt_path", "P/stage2/stored", "--project_name", "T", *quiet, cwd=cwd)
    run = only_run(cwd / "T")
    (cwd / "authors.yaml").write_text(yaml.safe_dump(AUTHORS))
    write_evaluation_set(cwd / "eval", learnable)
    given = ["--ckpt_path", run / "stored", "--label", "Doe_Uni", "--dataset_dir", learnable]
    # First a trial; then everything is made again over it, with the evaluation set.
    call(submit.main, *given, cwd=cwd)
    more = ["--authors", cwd / "authors.yaml", "--eval_dir", cwd / "eval", "--out", cwd / "submissions"]
    call(submit.main, *given, *more)
    return Made(Submission(cwd / "submissions" / "Doe_Uni", "Doe_Uni", 1), run, cwd / "eval")


def write_evaluation_set(folder: Path, learnable: Path) -> None:
    """Write some test clips under other names; devices that training does not know are "unknown"."""
    (folder / "audio").mkdir(parents=True)
    (folder / "evaluation_setup").mkdir()
    clips = load_clips(learnable, "test")
    lines = ["filename\tdevice_id\n"]
    for i in range(0, len(clips), 3):
        shutil.copy(clips.path(i), folder / "audio" / f"{i}.wav")
        device_id = DEVICES[clips.device[i]]
        lines.append(f"audio/{i}.wav\t{'unknown' if device_id == 's4' else device_id}\n")
    (folder / "evaluation_setup" / "fold1_test.csv").write_text("".join(lines))


@pytest.fixture
def sub(made, tmp_path) -> Submission:
    """A copy to break."""
    shutil.copytree(made.folder, tmp_path / "Doe_Uni")
    return Submission(tmp_path / "Doe_Uni", "Doe_Uni", 1)


@pytest.fixture(scope="session")
def installed(made, learnable, tmp_path_factory) -> SimpleNamespace:
    """The submission, installed into a fresh environment without this repository, and what its functions gave there.

    Dependencies and setuptools are those of the tests' environment: a test fetches nothing.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "v"], check=True)
    python = folder / "v" / "bin" / "python"
    (site,) = (folder / "v").glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    source = shutil.copytree(made.folder, folder / "source")  # setuptools leaves build/ there
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clips = load_clips(learnable, "test")
    paths, device_ids = [clips.path(i) for i in range(len(clips))], [DEVICES[i] for i in clips.device]
    paths, device_ids = paths + paths[:2], [*device_ids, "unknown", "s10"]
    (folder / "call.py").write_text(CALL)
    (folder / "asked.json").write_text(json.dumps([list(map(str, paths)), device_ids]))
    calls = [([*pip, "--no-build-isolation", source], None), ([python, "call.py", "asked.json", "answer.json"], alone)]
    for command, env in calls:
        done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((folder / "answer.json").read_text())
    return SimpleNamespace(site=site, clips=clips, paths=paths, device_ids=device_ids, **answer)


def logits_of_scripts(path: Path | str, waveforms: list[torch.Tensor], device_ids: list[str]) -> torch.Tensor:
    """Return the logits of the scripts' own module with the stored models."""
    checkpoint = load_trained(str(path))
    module = SceneClassifier.from_checkpoint(checkpoint, from_plain(EvalConfig, checkpoint["config"])).eval()
    device = torch.tensor([DEVICES.index(d) if d in DEVICES else -1 for d in device_ids])
    with torch.no_grad():
        return module(torch.stack(waveforms), device)


# The package


def test_an_installed_submission_predicts_what_the_scripts_predict(made, installed):
    waveforms = [read_wav(path, RATE) for path in installed.paths]
    expected = logits_of_scripts(made.run / "stored", waveforms, installed.device_ids)
    assert torch.allclose(torch.tensor(installed.logits), expected, atol=1e-5)
    assert not torch.allclose(expected[0], expected[-2], atol=1e-2)  # device a's model is not the general one
    assert installed.class_order == list(SCENES)
    assert installed.input_shapes == [[1, 1, 32, 32]]
    assert {name.partition(".")[0] for name in installed.weights} >= {"general", *TUNED}
    # What a test says is of these logits too.
    correct = np.array(installed.logits)[: len(installed.clips)].argmax(1) == installed.clips.scene
    assert correct.mean() == pytest.approx(read_results(made.run)["acc"])


def test_pip_installs_the_package_and_nothing_else(made, installed):
    assert Path(installed.where).is_relative_to(installed.site)
    (metadata,) = installed.site.glob("*.dist-info")
    distribution = PathDistribution(metadata)
    assert distribution.version == "1.0" and distribution.metadata["Name"] == "Doe_Uni_task1"
    assert f"torch=={torch.__version__.partition('+')[0]}" in distribution.requires
    there = {path for path in made.submission.package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files = {Path(file) for file in distribution.files if "__pycache__" not in file.parts}
    assert {path for path in files if path.parts[0] != metadata.name} == {
        path.relative_to(made.folder) for path in there
    }


def test_the_package_needs_nothing_of_training_and_nothing_of_this_repository(made, installed):
    absent = {"aum", "dcase", "pytorch_lightning", "lightning_fabric", "pandas", "tyro", "wandb"}
    assert not set(installed.modules) & absent
    files = sorted(made.submission.package.rglob("*.py"))
    roots = {name.partition(".")[0] for path in files for name in imported(path)}
    optional = {"triton", "causal_conv1d", "huggingface_hub"}
    assert roots - set(sys.stdlib_module_names) <= {*NEEDED, *optional, "Doe_Uni_task1"}
    copied = {path.relative_to(made.submission.package / "models") for path in files if "models" in path.parts}
    assert {path.relative_to(ROOT) for path in needed_code() if path.suffix == ".py"} <= copied
    assert "dcase/training/lit.py" not in {str(path) for path in copied}


def test_other_rates_channels_and_lengths_are_read(made, tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 700 * np.arange(2 * RATE) / (2 * RATE))  # 1 s at twice the rate: twice as long
    soundfile.write(tmp_path / "long.flac", np.stack([tone, 0 * tone], 1), 2 * RATE)
    soundfile.write(tmp_path / "cut.wav", read_wav(tmp_path / "long.flac", RATE)[0, : RATE // 2].numpy(), RATE, "FLOAT")
    soundfile.write(tmp_path / "short.wav", tone[: RATE // 4], RATE)
    models = inference.load(made.submission.checkpoint)
    x = inference.load_inputs(models, [tmp_path / name for name in ("long.flac", "cut.wav", "short.wav")])
    assert x.shape == (3, 1, 32, 32) and x.isfinite().all()
    assert torch.allclose(x[0, ..., :31], x[1, ..., :31], atol=1e-4)  # the last frame reaches into what was cut off
    silence = (np.log(1e-5) - models.logmel.mean) / models.logmel.std
    assert torch.allclose(x[2, ..., -8:], silence.expand(1, 32, 8))
    soundfile.write(tmp_path / "click.wav", tone[:50], RATE)
    assert "click.wav: clips of 50 samples" in refusal(inference.load_inputs, models, [tmp_path / "click.wav"])
    assert "nowhere.wav cannot be read" in refusal(inference.load_inputs, models, [tmp_path / "nowhere.wav"])
    assert "1 files and 2 device ids" in refusal(inference.predict, models, [tmp_path / "cut.wav"], ["a", "b"])


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("model", ["aum", "cp_mobile"])
def test_models_count_as_stored_and_calculate_like_the_rounded_ones(general_run, tmp_path, model, bits):
    checkpoint = tuned(general_run, bits)
    if model == "cp_mobile":
        config = from_plain(EvalConfig, checkpoint["config"])
        module = SceneClassifier(replace(config, model=ModelConfig("cp_mobile")), checkpoint["frames"], ("a",))
        with torch.no_grad():
            for name, x in module.state_dict().items():
                if "running" in name:  # as if it had been trained
                    x.add_(torch.rand_like(x))
        checkpoint = module.as_checkpoint() | {"clips_id": "", "clips_per_step": 1}
        checkpoint["config"] = checkpoint["config"] | {"split": {}}
    inference.save(checkpoint, tmp_path / "x.ckpt", bits)
    save_stored(checkpoint, tmp_path / "stored", bits)
    models = inference.load(tmp_path / "x.ckpt")
    x = torch.randn(3, 1, 32, checkpoint["frames"], generator=torch.Generator().manual_seed(0))
    module = SceneClassifier(from_plain(EvalConfig, checkpoint["config"]), 32, tuple(checkpoint["device_ids"])).eval()
    module.load_stored(load_trained(str(tmp_path / "stored")))
    with torch.no_grad():
        assert torch.allclose(models.for_device("a")(x), module.device_models["a"](x), atol=1e-5)
        assert torch.allclose(models.for_device("s6")(x), module.model(x), atol=1e-5)
    one = models.for_device("a")
    assert all(not parameter.requires_grad for parameter in one.parameters())
    counted = sum(complexity.param_bytes(one).values())  # as the challenge counts
    stored = sum(complexity.stored_bytes(module.model, bits).values())
    buffers = sum(x.numel() for x in module.model.buffers() if x.is_floating_point())
    assert counted == stored - buffers * (4 if bits == 32 else 2)
    assert set(complexity.param_bytes(one)) == {32: {"float32"}, 16: {"float16"}, 8: {"int8", "float16"}}[bits]
    # The challenge's script takes a copy in float32, and hands it to torchinfo.
    torchinfo = pytest.importorskip("torchinfo")
    probe = copy.deepcopy(one).float()
    assert torch.allclose(probe(x), one(x), atol=1e-6)
    macs = torchinfo.summary(probe, input_size=(1, 1, 32, 32), verbose=0).total_mult_adds
    assert macs == complexity.torchinfo_macs(module.model, (1, 1, 32, 32))


def test_a_file_that_holds_no_submission_is_refused(made, tmp_path):
    stored = made.run / "stored" / "general.safetensors"
    assert f"{stored} holds no models of a submission" in refusal(inference.load, stored)
    (tmp_path / "x.ckpt").write_bytes(made.submission.checkpoint.read_bytes()[:-1])
    assert "cut short, damaged" in refusal(inference.load, tmp_path / "x.ckpt")


# Outputs and meta.yaml


def test_the_outputs_are_the_models_and_say_which_set_they_are_of(made, learnable):
    with open(made.submission.output) as file:
        rows = list(csv.reader(file, delimiter="\t"))
    listed = evaluation_list(made.eval_dir)
    assert rows[0] == ["filename", "scene_label", *SCENES]
    assert [row[0] for row in rows[1:]] == listed["filename"].tolist()
    waveforms = [read_wav(made.eval_dir / name, RATE) for name in listed["filename"]]
    expected = logits_of_scripts(made.run / "stored", waveforms, listed["device_id"].tolist()).softmax(1)
    assert np.allclose([[float(x) for x in row[2:]] for row in rows[1:]], expected, atol=1e-6)
    assert [row[1] for row in rows[1:]] == [SCENES[i] for i in expected.argmax(1)]
    test_names = [load_clips(learnable, "test").name(i) for i in range(32)]
    assert made.submission.trial_output.name == "output_development.csv"
    assert check_output(made.submission.trial_output, test_names) == []


def test_meta_yaml_says_what_the_runs_say(made, general_run):
    meta = yaml.safe_load(made.submission.meta.read_text())
    assert meta["submission"]["label"] == "Doe_Uni_task1_1" and meta["submission"]["authors"] == AUTHORS
    description = meta["system"]["description"]
    assert description["input_sampling_rate"] == "8kHz" and description["num_models_at_inference"] == 4
    assert description["data_augmentation"] == "freq-mixstyle, time rolling, frequency masking, time masking"
    assert description["complexity_management"] == "network design, weight quantization"
    assert description["pipeline"] == (
        "train general model (4 epochs of AdamW; lr 0.01; batch 16; split25), "
        "per-device low-rank fine-tuning, merged into the weights (4 epochs of AdamW; lr 0.01; batch 16; split25), "
        "weight interpolation with the general model"
    )
    assert description["external_data_usage"] is None and meta["system"]["external_datasets"] is None
    results = read_results(made.run)
    costs = meta["system"]["complexity"]
    assert costs["total_model_size"] == results["complexity"]["total_param_bytes"]
    assert costs["macs"] == results["complexity"]["torchinfo_macs"]
    assert costs["macs_with_every_token_and_scan"] == results["complexity"]["macs"] > costs["macs"]
    reported = meta["results"]["development_dataset"]
    assert reported["device_specific"]["overall"]["accuracy"] == round(100 * results["macro_avg_acc"], 2)
    assert reported["device_specific"]["class_wise"]["metro"] == {"accuracy": None, "logloss": None}
    assert reported["device_specific"]["device_wise"]["s4"]["accuracy"] == round(100 * results["device_acc"]["s4"], 2)
    assert reported["general"] is None  # stage 1 was tested in 32 bits, and these are other weights
    assert reported["note"].startswith("Not TAU22")


def test_meta_yaml_of_a_distilled_run_with_data_of_others(general_run, tmp_path):
    run = Run(Path(shutil.copytree(general_run, tmp_path / "run")))
    config = run.read_config()
    config["augment"] |= {"dir_path": "/data/MicIRP", "mixstyle_p": 0.0, "mixup_alpha": 0.3}
    config |= {
        "distill": {"teacher": "x1,/data/beats.pt,/P/x2/cross_fit/logits.npz"},
        "pretrained": "/data/aum_base.pth",
    }
    write_json(run.folder / "config.json", {"config": config})
    module = SceneClassifier.from_checkpoint(load_checkpoint(run.best))
    cost = complexity.measure(module.model, (1, 1, 32, module.frames))
    meta = meta_of("Doe_Uni_task1_1", module.as_checkpoint(), [run], cost, [])
    description = meta["system"]["description"]
    assert description["data_augmentation"] == "mixup, dir augmentation, time rolling, frequency masking, time masking"
    assert description["external_data_usage"] == "impulse responses of devices, pre-trained model, teachers"
    assert description["complexity_management"] == "network design, knowledge distillation"
    assert description["pipeline"].startswith(
        "train teachers, train general student model with knowledge distillation ("
    )
    assert description["device_information"] is None and description["model_weight_sharing"] == "fully shared"
    reported = meta["results"]["development_dataset"]
    assert reported["device_specific"] is None
    assert reported["general"]["overall"]["logloss"] == round(read_results(general_run)["loss"], 4)
    data = meta["system"]["external_datasets"]
    assert todo_fields(data) == ["1.name", "1.url", "2.name", "2.url", "3.name", "3.url"]
    write_json(run.folder / "config.json", {"config": config | {"pretrained": "", "init_from": "x3"}})
    pruned = meta_of("Doe_Uni_task1_1", module.as_checkpoint(), [run], cost, [])["system"]["description"]
    assert pruned["complexity_management"] == "network design, knowledge distillation, pruning"
    moved = meta_of("Doe_Uni_task1_1", module.as_checkpoint(), [], cost, [])["system"]["description"]
    assert todo_fields(moved) == ["data_augmentation", "pipeline"]  # no run to look them up in


def test_the_runs_behind_a_checkpoint(made, general_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the test was started elsewhere, and given a path from there
    found = run_of(str(made.run / "stored" / "general.safetensors")).lineage()
    assert [run.id for run in found] == [made.run.name, "stage2", general_run.name]
    (tmp_path / "link").symlink_to(made.run / "stored")
    assert run_of("link").folder == made.run
    assert run_of(str(general_run / "checkpoints" / "best.ckpt")).lineage() == [Run(general_run)]
    assert run_of("somewhere/best.ckpt") is None and Run(general_run).tested() is None


def test_what_authors_have_filled_in_stays_when_a_submission_is_made_again(made, sub, learnable, capsys):
    meta = yaml.safe_load(sub.meta.read_text())
    meta["system"]["inference_code"] = "https://git.example/doe"
    meta["system"]["complexity"]["macs"] = 1
    sub.meta.write_text(yaml.safe_dump(meta))
    given = ["--ckpt_path", made.run / "stored", "--label", "Doe_Uni", "--dataset_dir", learnable]
    call(submit.main, *given, "--eval_dir", made.eval_dir, "--out", sub.folder.parent)
    check = f"python -m dcase.validate_submission --folder {sub.folder} --eval_dir {made.eval_dir}\n"
    assert capsys.readouterr().out.endswith(f"check all of it: {check}")
    again = yaml.safe_load(sub.meta.read_text())
    assert again["system"]["inference_code"] == "https://git.example/doe"
    assert again["submission"]["authors"] == AUTHORS and again["system"]["complexity"]["macs"] > 1
    call(submit.main, *given, "--index", 2, "--out", sub.folder.parent)  # a second system shares the package
    systems = validate_submission.find_systems(sub.folder)
    assert [system.system for system in systems] == ["Doe_Uni_task1_1", "Doe_Uni_task1_2"]
    assert systems[1].api.read_text() == systems[0].api.read_text() and inference.load(systems[1].checkpoint)
    assert todo_fields(yaml.safe_load(systems[1].meta.read_text())["submission"]) != []


# The validator


def fill_in(sub: Submission, monkeypatch) -> None:
    """Write what only TAU22 and the authors can give."""
    monkeypatch.setattr(validate_submission, "TEST_CLIPS", 32)
    meta = yaml.safe_load(sub.meta.read_text())
    meta["system"]["inference_code"] = "https://git.example/doe"
    results = meta["results"]["development_dataset"]
    del results["note"]
    for table in ("class_wise", "device_wise"):
        for figures in results["device_specific"][table].values():
            figures["accuracy"] = 50.0
    sub.meta.write_text(yaml.safe_dump(meta))


def test_the_validator_passes_a_whole_submission_and_names_what_is_left_of_a_trial(made, sub, monkeypatch):
    problems = validate_submission.check_folder(sub.folder, made.eval_dir)
    scenes = [scene for scene in SCENES if scene not in ("airport", "bus", "park", "tram")]
    devices = ("c", "s2", "s3", "s5", "s6")
    figures = "results.development_dataset.device_specific"
    assert problems == [
        f"{sub.resources}/test.csv lists 32 clips, and TAU22's test split has 29680: build the package with "
        "--dataset_dir TAU22",
        *(
            f"{sub.meta}: {problem}"
            for problem in (
                "system.inference_code is still to be filled in (TODO)",
                "results.development_dataset.note says 'Not TAU22: not comparable with figures from TAU22.': "
                "give figures of TAU22",
                *(f"{figures}.class_wise.{scene}.accuracy is None, not a percentage" for scene in scenes),
                *(f"{figures}.device_wise.{device_id}.accuracy is None, not a percentage" for device_id in devices),
            )
        ),
    ]
    fill_in(sub, monkeypatch)
    monkeypatch.setattr(validate_submission, "check_package", lambda system: [])  # as before
    assert validate_submission.check_folder(sub.folder, made.eval_dir) == []


def test_the_validator_as_a_user_runs_it(sub, call_main, tmp_path):
    sub.checkpoint.unlink()
    sub.output.unlink()
    done = call_main(validate_submission.main, "--folder", sub.folder)
    assert done.code == 1
    assert f"{sub.checkpoint} is missing: build the package again with python -m dcase.submit" in done.out
    assert f"{sub.output} is missing: make it with python -m dcase.submit --eval_dir" in done.out
    assert "problems: not ready to be handed in" in done.out
    assert "no package Name_Inst_task1/" in refusal(validate_submission.find_systems, tmp_path / "none")
    assert "--folder is missing" in refusal(call, validate_submission.main)


ROWS = [["audio/0.wav", "bus", "0.1", "0.6", *["0.0375"] * 8], ["audio/1.wav", "tram", *["0.1"] * 10]]


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda rows: None, []),
        (lambda rows: rows[0].pop(), [", row 1: 11 columns, not 12: filename, scene_label, airport"]),
        (lambda rows: rows[0].reverse(), [", row 1: column 1 is 'tram', not 'filename': the columns are filename"]),
        (lambda rows: rows[1].pop(), [", row 2: 11 fields, not 12"]),
        (lambda rows: rows[1].__setitem__(1, "Bus"), [", row 2, column scene_label: 'Bus' is no scene: one of air"]),
        (lambda rows: rows[1].__setitem__(1, "park"), [", row 2, column scene_label: park, but bus is more probable"]),
        (lambda rows: rows[1].__setitem__(3, "0.9"), [", row 2: the probabilities sum to 1.3000, not 1: take the so"]),
        (lambda rows: rows[2].__setitem__(4, "nan"), [", row 3, column metro: nan is not finite"]),
        (lambda rows: rows[2].__setitem__(4, "high"), [", row 3, column metro: 'high' is no number"]),
        (lambda rows: rows[2].__setitem__(4, "-2.5"), [", row 3, column metro: -2.5 is no probability, 0 to 1: take"]),
        (lambda rows: rows.pop(), [": audio/1.wav of the evaluation list is missing"]),
        (lambda rows: rows.append(rows[1]), [", row 4: audio/0.wav is there already, in row 2: leave one"]),
        (
            lambda rows: rows[2].__setitem__(0, "1.wav"),
            [": audio/1.wav of the evaluation list is missing", ", row 3: 1.wav is not in the evaluation list"],
        ),
        (
            lambda rows: rows.extend(["x", "bus"] for _ in range(5)),
            [", row 4: 2 fields, not 12", ", row 5: ", ", row 6: ", ": 2 more like the last one", ", row 5: x is the"]
            + [", row 4: x is not in the evaluation list"],
        ),
    ],
)
def test_each_fault_of_an_output_is_one_line(tmp_path, change, expected):
    rows = copy.deepcopy([HEADER, *ROWS])
    change(rows)
    path = tmp_path / "output.csv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    problems = check_output(path, ["audio/0.wav", "audio/1.wav"])
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert problem.startswith(f"{path}{part}") and "\n" not in problem, problem


def test_outputs_that_are_no_table(tmp_path):
    path = tmp_path / "output.csv"
    path.write_text(",".join(HEADER) + "\n")
    assert check_output(path) == [f"{path}, row 1: columns are separated by commas: use tabs"]
    path.write_text("\t".join(HEADER) + "\n")
    assert check_output(path) == [f"{path} has no row but the header"]
    path.write_bytes(b"\xff\xfe")
    assert check_output(path)[0].startswith(f"{path} cannot be read")
    write_output(path, ["0.wav"], torch.full((1, 10), 1e4))
    assert check_output(path, ["0.wav"]) == []


def change(meta: dict, dotted: str, value) -> None:
    *path, last = dotted.split(".")
    for name in path:
        meta = meta[name]
    if value is KeyError:
        del meta[last]
    else:
        meta[last] = value


FIGURES = "results.development_dataset"


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("system.description.framework", KeyError, "system.description.framework is missing"),
        ("submission.label", "Doe_Uni_task1_2", "submission.label is 'Doe_Uni_task1_2', not 'Doe_Uni_task1_1'"),
        ("submission.abbreviation", "aum_nano_8bit", "submission.abbreviation has more than 10 letters: 'aum_nano"),
        ("submission.authors", [], "submission.authors: this is no list of authors, each with lastname, firstname"),
        ("submission.authors", AUTHORS * 2, "submission.authors: 2 authors are corresponding: mark one of them"),
        ("submission.authors", [{**AUTHORS[0], "email": "TODO"}], "submission.authors.1.email is still to be"),
        ("submission.authors", [{"corresponding": True, "lastname": "x"}],
         "submission.authors: author 1 has no firstname, email, affiliation.abbreviation, affiliation.insti"),
        ("submission.authors", [{**AUTHORS[0], "affiliation": {"abbreviation": "Uni", "institute": "University"}}],
         "submission.authors: author 1 has no affiliation.location"),
        ("system.complexity.total_model_size", 128_001, "system.complexity.total_model_size is 128001, not"),
        ("system.complexity.macs", "10 M", "system.complexity.macs is '10 M', not a number up to 30,000,000"),
        ("system.complexity.total_parameters", None, "system.complexity.total_parameters is None, not a number"),
        (f"{FIGURES}.device_specific", None, f"{FIGURES} has neither device_specific nor general: test the checkpoint"),
        (f"{FIGURES}.device_specific.overall.accuracy", 101, f"{FIGURES}.device_specific.overall.accuracy is 101"),
        (f"{FIGURES}.device_specific.class_wise", KeyError, f"{FIGURES}.device_specific.class_wise is missing"),
    ],
)  # fmt: skip
def test_each_fault_of_meta_yaml_is_one_line(sub, monkeypatch, field, value, expected):
    fill_in(sub, monkeypatch)
    assert check_meta(sub) == []
    meta = yaml.safe_load(sub.meta.read_text())
    change(meta, field, value)
    sub.meta.write_text(yaml.safe_dump(meta))
    (problem,) = check_meta(sub)
    assert problem.startswith(f"{sub.meta}: {expected}") and "\n" not in problem, problem


PLACE = AUTHORS[0]["affiliation"]


@pytest.mark.parametrize(
    "authors, expected",
    [
        (AUTHORS, ""),
        # In the challenge's template one author is corresponding, and the others do not have the field.
        ([*AUTHORS, {name: AUTHORS[0][name] for name in ("lastname", "firstname", "email", "affiliation")}], ""),
        ([{**AUTHORS[0], "affiliation": {name: PLACE[name] for name in PLACE if name != "department"}}], ""),
        ([{**AUTHORS[0], "affiliation": [PLACE, PLACE]}], ""),
        ([{**AUTHORS[0], "affiliation": [PLACE, {}]}],
         "author 1 has no affiliation.abbreviation, affiliation.institute, affiliation.location"),
        ([{**AUTHORS[0], "affiliation": "Uni"}],
         "author 1 has no affiliation.abbreviation, affiliation.institute, affiliation.location"),
        ([{"lastname": "Doe", "email": None, "affiliation": PLACE}, {**AUTHORS[0], "firstname": ""}],
         "author 1 has no firstname, email; author 2 has no firstname"),
        ([{"lastname": "Doe", "affiliation": PLACE}],
         "author 1 has no firstname, email; 0 authors are corresponding: mark one of them, corresponding: true"),
        ("just a name",
         "this is no list of authors, each with lastname, firstname, email, corresponding, affiliation"),
    ],
)  # fmt: skip
def test_all_that_authors_lack_is_said_at_once(sub, monkeypatch, tmp_path, authors, expected):
    path = tmp_path / "authors.yaml"
    path.write_text(yaml.safe_dump(authors))
    if expected:
        assert refusal(read_authors, path) == f"--authors {path}: {expected}"
    else:
        assert read_authors(path) == authors
    fill_in(sub, monkeypatch)
    meta = yaml.safe_load(sub.meta.read_text())
    meta["submission"]["authors"] = authors
    sub.meta.write_text(yaml.safe_dump(meta))
    assert check_meta(sub) == [f"{sub.meta}: submission.authors: {part}" for part in expected.split("; ") if part]


def test_a_meta_yaml_that_cannot_be_read(sub):
    sub.meta.write_text("submission: [")
    assert check_meta(sub)[0].startswith(f"{sub.meta} cannot be read as YAML")
    sub.meta.unlink()
    assert check_meta(sub) == [f"{sub.meta} is missing: make it with python -m dcase.submit"]


def test_each_fault_of_the_api_is_one_line(sub):
    code = sub.api.read_text()
    for old, new in (
        (", list(SCENES)", ", sorted(SCENES, key=len)"),
        ("use_cuda, batch_size)", "use_cuda, batch_size)[::-1]"),
    ):
        assert old in code
        code = code.replace(old, new)
    sub.api.write_text(code)
    order, other = validate_submission.check_package(sub)
    assert order.startswith(f"{sub.api}: predict's class order is ['bus', ") and "\n" not in order
    assert other.startswith(f"{sub.api}: predict gives other logits than the models of") and "\n" not in other


def test_a_package_that_cannot_be_called_is_one_line(sub, monkeypatch):
    (sub.folder / "broken").mkdir()
    (sub.folder / "broken" / "broken_1.py").write_text("import nothing_there")
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = probe.probe(str(sub.folder), "broken", "1")
    assert found == {"failed": "import", "error": "ModuleNotFoundError: No module named 'nothing_there'"}
    x, layer = torch.zeros(1, 1, 4, 4), torch.nn.Conv2d(1, 10, 4)
    api = SimpleNamespace(
        load_model=lambda: SimpleNamespace(model=layer),
        load_inputs=lambda paths, device_ids, model: [x] * len(paths),
        get_model_for_device=lambda model, device_id: layer,
        predict=lambda file_paths, device_ids, model_file_path: None,  # the challenge gives use_cuda too
    )
    with monkeypatch.context() as patch:
        patch.setattr(probe.importlib, "import_module", lambda name: api)
        found = probe.probe(str(sub.folder), sub.name, "1")
    assert found["failed"] == "predict" and "TypeError" in found["error"] and "use_cuda" in found["error"]
    crashed = SimpleNamespace(returncode=7, stderr="Fatal\nkilled\n")
    failed = SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(found)}\n")
    for done, part in [
        (crashed, "Python ends with exit code 7 while its functions are called: killed"),
        (failed, f"predict fails: {found['error']}"),
    ]:
        monkeypatch.setattr(validate_submission.subprocess, "run", lambda *args, done=done, **options: done)
        assert validate_submission.check_package(sub) == [f"{sub.api}: {part}"]


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("n_weights", 0, ".model of what load_model gives has no weights"),
        ("input_shapes", [[1, 32, 32]] * 13, "load_inputs gives [(1, 32, 32)], not a tensor (1, 1, n_mels, frames)"),
        ("input_shapes", [[1, 1, 32, 32]], "load_inputs gives [(1, 1, 32, 32)], not a tensor"),
        ("dtypes", ["float64", "int8"], "parameters are float64, which the challenge cannot count"),
        ("bytes", {"a": 128_001, "b": 1}, "by the challenge's count the model of a has 128,001 bytes, and 128,000 are"),
        ("macs", {"a": 1, "s7": 30_000_001}, "by the challenge's count the model of s7 has 30,000,001 macs"),
        ("logits", [[0.0] * 10], "predict does not give 10 logits for each of 2 files"),
        ("logits", [[0.0] * 9 + [float("nan")]] * 2, "predict gives logits that are not finite"),
    ],
)
def test_what_the_functions_give_is_checked(field, value, expected):
    logits = [[0.1 * i for i in range(10)]] * 2
    found = {
        "n_weights": 1, "input_shapes": [[1, 1, 32, 32]] * 13, "dtypes": ["int8", "float16"], "bytes": {"a": 128_000},
        "macs": {"a": 30_000_000}, "class_order": list(SCENES), "logits": logits, "expected": logits,
    }  # fmt: skip
    assert validate_submission.problems_of_api(found) == []
    (problem,) = validate_submission.problems_of_api(found | {field: value})
    assert problem.startswith(expected)


def test_models_over_the_limits_are_named(general_run, sub):
    checkpoint = tuned(general_run, 32)
    config = from_plain(EvalConfig, checkpoint["config"])
    module = SceneClassifier(replace(config, model=replace(config.model, embed_dim=256, depth=6)), 32, ("a",))
    checkpoint = module.as_checkpoint()
    checkpoint["config"] = checkpoint["config"] | {"split": to_plain(config)["data"]}
    inference.save(checkpoint, sub.checkpoint, 32)
    problems = validate_submission.check_package(sub)
    everyone = "a, b, c, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, unknown"
    n = 4 * sum(x.numel() for x in module.model.parameters())
    assert problems[0] == (
        f"{sub.api}: by the challenge's count the model of {everyone} has {n:,} bytes, and 128,000 are allowed"
    )
    assert problems[1].startswith(f"{sub.checkpoint}: the model of general takes {n:,} B, and 128,000 are allowed")
    assert problems[2].startswith(f"{sub.checkpoint}: the model of a takes")
    assert problems[3].startswith(f"{sub.checkpoint}: a model takes ") and "MACs with every token" in problems[3]
    assert len(problems) == 4


# What submit refuses


@pytest.mark.parametrize("label", ["Doe", "Doe_Uni_task1", "Doe-Uni", "1_2", "Doe_", ""])
def test_labels_that_make_no_package_name(label):
    message = refusal(Submission, Path("x"), label, 1)
    assert "--label" in message and "as Doe_Uni" in message


def test_what_submit_refuses(made, learnable, tmp_path):
    assert "--index 5" in refusal(Submission, Path("x"), "Doe_Uni", 5)
    assert "--ckpt_path is missing" in refusal(call, submit.main, "--label", "Doe_Uni")
    empty = tmp_path / "empty"
    assert "fold1_test.csv cannot be read" in refusal(evaluation_list, empty)
    (empty / "evaluation_setup").mkdir(parents=True)
    for content, expected in (
        ("filename,device_id\n", "has no column filename (columns are separated by tabs)"),
        ("filename\tdevice_id\n", "lists no recording"),
        ("filename\tdevice_id\n../secret.wav\ta\n", "lists '../secret.wav', which leaves the folder"),
    ):
        (empty / "evaluation_setup" / "fold1_test.csv").write_text(content)
        assert expected in refusal(evaluation_list, empty)
    (empty / "evaluation_setup" / "fold1_test.csv").write_text("filename\tdevice_id\naudio/0.wav\ta\n")
    given = ["--ckpt_path", made.run / "stored", "--label", "Doe_Uni", "--dataset_dir", learnable, "--out", tmp_path]
    message = refusal(call, submit.main, *given, "--eval_dir", empty)
    assert "--eval_dir: 1 of 1 recordings are missing" in message and "audio/0.wav" in message
    assert not (tmp_path / "Doe_Uni").exists()  # nothing half-made
    path = tmp_path / "authors.yaml"
    assert refusal(call, submit.main, *given, "--authors", path) == f"--authors {path}: there is no such file"
    path.write_text("- {lastname: Doe")
    assert f"{path} cannot be read as YAML" in refusal(call, submit.main, *given, "--authors", path)
    path.write_text("[" * 10_000)
    assert f"{path} cannot be read as YAML" in refusal(call, submit.main, *given, "--authors", path)


@pytest.mark.parametrize(
    "wanted, bits, expected",
    [
        ({"embed_dim": 48, "depth": 2}, 32, "test_only.py --ckpt_path {} --weight_bits 16 stores it smaller"),
        ({"embed_dim": 256, "depth": 4}, 8, "of 128,000: take a smaller model"),
        ({"patch_size": (1, 1), "depth": 10}, 8, "MACs of 30,000,000: take a smaller one"),
    ],
)
def test_models_over_the_limits_are_not_built(general_run, tmp_path, wanted, bits, expected):
    module = SceneClassifier.from_checkpoint(load_checkpoint(general_run / "checkpoints" / "best.ckpt"))
    config = replace(module.config, model=replace(module.config.model, **wanted))
    checkpoint = SceneClassifier(config, module.frames).as_checkpoint()
    checkpoint["config"]["storage"] = {"weight_bits": bits}
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint, path)
    assert expected.format(path) in refusal(submit.trained, str(path))


def test_probabilities_that_sum_to_less_than_1(tmp_path):
    rows = [HEADER, ["x.wav", "bus", "0.1", "0.2", *["0.0375"] * 8]]
    path = tmp_path / "output.csv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    (problem,) = check_output(path, ["x.wav"])
    assert "sum to 0.6000" in problem


def test_outputs_that_are_not_finite_are_not_written(tmp_path):
    logits = torch.zeros(2, len(SCENES))
    logits[1, 3] = np.nan
    said = refusal(write_output, tmp_path / "out.csv", ["a.wav", "b.wav"], logits)
    assert "the model's output for b.wav is NaN or infinite" in said
    assert not (tmp_path / "out.csv").exists()
