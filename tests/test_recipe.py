"""Distillation, averaging, rounding, responses, pruning and low-rank fine-tuning through the scripts."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FIT, QUIET, RATE, SMALL, assert_same_run, only_run, read_results, refusal, weights
from forked import run_script
from stored_files import file_sizes
from test_scripts import copy_general, kill_and_resume
from torch import nn

from dcase.data.tau22 import SplitConfig
from dcase.model.averaging import WeightAverage
from dcase.model.distillation import DistillConfig, soft_loss, soft_targets
from dcase.model.named import ModelConfig, fill
from dcase.runs.checkpoints import final_state
from dcase.runs.config import DeviceConfig, TrainConfig, from_plain, to_plain
from dcase.training.lit import SceneClassifier
from dcase.training.teachers import TrainedModel

DEVICE_FIT = "--n_epochs 2 --batch_size 8 --warmup_steps 2 --check_val_every_n_epoch 1 --qat_epochs 1".split()


def run_of(out: str, project: Path) -> Path:
    return project / re.search(r"^run (\w+): everything", out, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> Path:
    """Three impulse responses of other microphones."""
    folder = tmp_path_factory.mktemp("responses")
    for seed in range(3):
        taps = np.random.default_rng(seed).normal(0, 1, 40) * 0.8 ** np.arange(40)
        soundfile.write(folder / f"{seed}.wav", taps / np.abs(taps).max(), RATE, subtype="PCM_24")
    return folder


@pytest.fixture(scope="module")
def teacher_run(general_run, tmp_path_factory) -> Path:
    """The general run in a project of its own, to which these tests add."""
    project = tmp_path_factory.mktemp("recipe") / "P"
    return Path(shutil.copytree(general_run, project / general_run.name))


@pytest.fixture(scope="module")
def run(teacher_run):
    """Run a script in the teacher's project."""
    return lambda name, *args: run_script(name, *args, "--project_name", "P", cwd=teacher_run.parent.parent)


@pytest.fixture(scope="module")
def recipe(teacher_run, learnable, responses) -> list:
    """The flags of a run with everything at once, beside the general run that is its teacher."""
    flags = "--dir_p 0.5 --mixup_alpha 0.3 --ema_decay 0.9 --weight_bits 8 --qat_epochs 2".split()
    model = ["--model", "aum_nano", "--head", "patch"]
    paths = ["--dataset_dir", learnable, "--teacher", teacher_run.name, "--dir_path", responses]
    return [*SMALL, *model, *FIT, *paths, *flags]


@pytest.fixture(scope="module")
def student(teacher_run, recipe, run) -> Path:
    """The folder of a finished run of that recipe, in the general run's project."""
    out = run("train_base.py", *recipe).succeeded().out
    assert f"teacher {teacher_run.name}: aum_tiny\n" in out and f"teacher {teacher_run.name}: right on " in out
    assert "Stored in 8 bit" in out
    return run_of(out, teacher_run.parent)


# Averaging


def test_the_average_is_the_formulas_and_gives_the_models_own_weights_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average, expected = WeightAverage(model, 0.5), model[0].weight.detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            model[0].weight += step
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    own = model[0].weight.detach().clone()
    with average.swapped(model):
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight, own)
    again = WeightAverage(model, 0.5)
    again.load_state_dict(average.state_dict())
    assert again.steps == 4 and all(torch.equal(x, again.average[name]) for name, x in average.average.items())


# Distillation


def test_soft_loss_is_the_papers():
    torch.manual_seed(0)
    ours, theirs, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4), 3.0
    p, q = torch.softmax(theirs.double() / t, 1), torch.softmax(ours.double() / t, 1)
    expected = t * t * (p * (p / q).log()).sum(1).mean()
    loss = soft_loss(ours, soft_targets(theirs, t), t)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert soft_loss(theirs, soft_targets(theirs, t), t).abs() < 1e-6
    loss.backward()
    torch.testing.assert_close(ours.grad, (t * (q - p) / 5).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "field, value", [("teacher_weight", 1.5), ("temperature", 0.0), ("teacher", "abc,abc"), ("teacher", "abc,")]
)
def test_impossible_distillation_names_the_flag(field, value):
    assert f"--{field}" in refusal(lambda: DistillConfig(**{field: value}))


def test_a_teachers_outputs_are_kept_and_are_those_of_its_model(student, teacher_run):
    (file,) = (teacher_run.parent / "teacher_outputs").iterdir()
    logits = torch.load(file, weights_only=True)
    assert logits.shape[1] == 10 and len(logits) > 20 and logits.isfinite().all() and logits.std() > 0.1


def test_a_teacher_that_does_not_fit_is_refused(teacher_run, learnable, run):
    args = ["--dataset_dir", learnable, *SMALL, *FIT]
    run("train_base.py", *args, "--teacher", "nobody").refused("--teacher nobody", "no such run")
    run("train_base.py", *args, "--teacher", teacher_run.name, "--val_fraction", 0).refused("--teacher", "clips")


def test_live_teachers_get_the_waveform_that_the_model_gets(teacher_run, recipe, run):
    out = run("train_base.py", *recipe, "--n_epochs", 1, "--teacher_input", "live").succeeded().out
    assert read_results(run_of(out, teacher_run.parent))["n_clips"] == 32


# All of it together, resumed and stored


def test_the_whole_recipe_killed_and_resumed_equals_undisturbed_bit_for_bit(student, teacher_run, recipe, tmp_path):
    copy_general(teacher_run, tmp_path / "P")
    killed = kill_and_resume("train_base.py", recipe, tmp_path / "P", "checkpoints/last.ckpt", 0.3)
    assert_same_run(killed, student)
    file = "stored/general.safetensors"
    assert (killed / file).read_bytes() == (student / file).read_bytes()


def test_the_stored_file_gives_the_runs_figures_and_has_the_counted_size(student, learnable, script, tmp_path):
    path, results = student / "stored" / "general.safetensors", read_results(student)
    header, tensors = file_sizes(path)
    assert header + tensors == path.stat().st_size
    assert tensors == results["complexity"]["total_param_bytes"] == sum(results["complexity"]["param_bytes"].values())
    assert set(results["complexity"]["param_bytes"]) == {"int8", "float16"}
    script("test_only.py", "--ckpt_path", path, "--dataset_dir", learnable, "--project_name", "T", *QUIET).succeeded()
    assert read_results(only_run(tmp_path / "T")) == results


def test_the_checkpoint_is_tested_as_stored_or_in_32_bit(student, learnable, script, tmp_path):
    args = ["--ckpt_path", student / "checkpoints" / "best.ckpt", "--dataset_dir", learnable, *QUIET]
    script("test_only.py", *args, "--project_name", "T8").succeeded()
    script("test_only.py", *args, "--project_name", "T32", "--weight_bits", "32").succeeded()
    results = read_results(student)
    assert read_results(only_run(tmp_path / "T8")) == results
    file = "stored/general.safetensors"
    assert (only_run(tmp_path / "T8") / file).read_bytes() == (student / file).read_bytes()
    unrounded = read_results(only_run(tmp_path / "T32"))
    assert unrounded["loss"] != results["loss"] and unrounded["loss"] == pytest.approx(results["loss"], abs=0.1)
    assert set(unrounded["complexity"]["param_bytes"]) == {"float32"}


# Stage 2


def test_the_average_of_adapters_belongs_to_the_adapters():
    zero, one = torch.zeros(2), torch.ones(2)
    tuned = {"state_dict": {"model.w": zero, "adapters.up.w": zero}, "average": {"steps": 1, "average": {"up.w": one}}}
    assert torch.equal(final_state(tuned)["adapters.up.w"], one) and set(final_state(tuned)) == set(tuned["state_dict"])
    whole = {"state_dict": {"model.w": zero}, "average": {"steps": 1, "average": {"w": one}}}
    assert torch.equal(final_state(whole)["model.w"], one)


@pytest.mark.parametrize("finetune", ["full", "lora", "head"])
def test_batch_norm_that_is_not_trained_keeps_its_statistics(finetune):
    module = SceneClassifier(TrainConfig(model=ModelConfig("aum_nano")), 65)
    module.choose_trained(finetune, 2)
    layers = module.model.named_modules()
    learning = {name for name, layer in layers if "BatchNorm" in type(layer).__name__ and layer.training}
    in_stem = {name for name in learning if name.startswith("stem")}
    assert bool(in_stem) == (finetune == "full") and ("head.scores" in learning) == (finetune != "lora")


def test_learning_rates_cannot_be_chosen_without_validation_clips():
    said = refusal(lambda: DeviceConfig(lr_choices="0.1,0.2", split=SplitConfig(val_fraction=0)))
    assert said.startswith("--lr_choices")


def test_a_configuration_from_before_a_field_was_there_means_what_it_meant():
    filled = to_plain(TrainConfig(model=fill(ModelConfig("aum_small"), 256, 65)))
    old = {"embed_dim": 48, "head": "linear", "cls_position": "middle", "model": "aum_nano"}
    for name in ("stem", "stem_blocks", "freq_norm", "row_scan", "local_conv", "factorised_pos_embed"):
        del filled["model"][name]
    config = from_plain(TrainConfig, {**filled, "model": filled["model"] | old})
    shape = fill(config.model, 256, 65)
    assert (shape.stem, shape.row_scan, shape.head, shape.cls_position) == ((), False, "linear", "middle")


@pytest.mark.parametrize("finetune", ["full", "lora", "head"])
def test_stage_2_trains_what_it_is_told_to_and_stores_a_file_per_device(finetune, student, learnable, run):
    data = ["--dataset_dir", learnable, *QUIET]
    tried = ["--finetune", finetune, "--lr_choices", "0.003,0.02", "--lora_rank", 2]
    out = run("train_device_specific.py", "--ckpt_id", student.name, *data, *DEVICE_FIT, *tried).succeeded().out
    folder = run_of(out, student.parent)
    results = read_results(folder)
    outcomes = results["fine_tuning"]
    (lr,) = {outcomes[d]["lr"] for d in ("a", "b", "s1")}  # one for all devices
    assert lr in (0.003, 0.02)
    general = weights(student / "checkpoints" / "best.ckpt")
    for device_id in ("a", "b", "s1"):
        tuned = weights(folder / "checkpoints" / device_id / f"lr_{lr:g}" / "tuned.ckpt")
        moved = {name for name, value in tuned.items() if not torch.equal(value, general[f"model.{name}"])}
        assert set(tuned) == {name.removeprefix("model.") for name in general if name.startswith("model.")}
        assert moved, "nothing was trained"
        if finetune == "head":
            assert {name.partition(".")[0] for name in moved} == {"head"}
        if finetune == "lora":
            assert {name.rpartition(".")[2] for name in moved} == {"weight"}
            assert not [name for name in moved if "norm" in name or "conv1d" in name or "dt_proj" in name]
    kept = [device_id for device_id, outcome in outcomes.items() if outcome["kept"]]
    files = {path.stem for path in (folder / "stored").iterdir()}
    assert files == {"general", *kept} and results["device_models"] == kept
    for path in (folder / "stored").iterdir():
        assert file_sizes(path)[1] == results["complexity"]["total_param_bytes"]
    again = run("test_only.py", "--ckpt_path", folder / "stored", *data).succeeded().out
    results.pop("fine_tuning")
    assert read_results(run_of(again, student.parent)) == results


# Pruning


def test_a_larger_model_is_pruned_into_a_smaller_one_and_trained_on(teacher_run, learnable, run):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--init_from", teacher_run.name]
    out = run("train_base.py", *args, "--embed_dim", 12, "--d_state", 3, "--lr", 1e-9).succeeded().out
    folder = run_of(out, teacher_run.parent)
    pruned, large = (weights(r / "checkpoints" / "best.ckpt") for r in (folder, teacher_run))
    assert pruned["model.layers.0.mixer.A_log"].shape == (24, 3)
    ours, theirs = (state["model.head.bias"] for state in (pruned, large))
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # it started from there, and hardly moved
    run("train_base.py", *args, "--embed_dim", "32").refused("--embed_dim 32 is more than the 16")


def test_teachers_are_in_evaluation_mode(tmp_path):
    teacher = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    teacher.clips_id = "those of its run"
    path = tmp_path / "best.ckpt"
    path.touch()
    TrainedModel("x", teacher, path, tmp_path)
    assert not any(layer.training for layer in teacher.modules())
