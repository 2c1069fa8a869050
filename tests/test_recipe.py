"""Distillation, averaging, rounding, responses, pruning and low-rank fine-tuning through the scripts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FIT, RATE, ROOT, SMALL, only_run, read_results
from test_scripts import QUIET, kill_and_resume, weights

from dcase.data.tau22 import SplitConfig
from dcase.errors import UserError
from dcase.model.averaging import WeightAverage
from dcase.model.distillation import DistillConfig, soft_loss, soft_targets
from dcase.model.named import ModelConfig, fill
from dcase.runs import stored
from dcase.runs.checkpoints import final_state
from dcase.runs.config import DeviceConfig, TrainConfig, from_plain, to_plain
from dcase.training.lit import SceneClassifier

DEVICE_FIT = "--n_epochs 2 --batch_size 8 --warmup_steps 2 --check_val_every_n_epoch 1 --qat_epochs 1".split()


def run_script(name: str, *args, cwd: Path) -> str:
    command = [sys.executable, name if name == "-m" else str(ROOT / name), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
def recipe(teacher_run, learnable, responses) -> list:
    """The flags of a run with everything at once, beside the general run that is its teacher."""
    return [
        *(
            "--dataset_dir",
            learnable,
            *SMALL,
            "--model",
            "aum_nano",
            "--head",
            "patch",
            *FIT,
            "--teacher",
            teacher_run.name,
            "--dir_path",
            responses,
        ),
        *"--dir_p 0.5 --mixup_alpha 0.3 --ema_decay 0.9 --weight_bits 8 --qat_epochs 2".split(),
    ]


@pytest.fixture(scope="module")
def student(teacher_run, recipe) -> Path:
    """The folder of a finished run of that recipe, in the general run's project."""
    project = teacher_run.parent
    out = run_script("train_base.py", *recipe, "--project_name", project.name, cwd=project.parent)
    assert f"teachers: {teacher_run.name} (aum_tiny)" in out and "Stored in 8 bit" in out
    return run_of(out, project)


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
    with pytest.raises(UserError, match=f"--{field}"):
        DistillConfig(**{field: value})


def test_a_teachers_outputs_are_kept_and_are_those_of_its_model(student, teacher_run, learnable):
    (file,) = (teacher_run / "teacher_outputs").iterdir()
    logits = torch.load(file, weights_only=True)
    assert logits.shape[1] == 10 and len(logits) > 20 and logits.isfinite().all()
    assert (logits.argmax(1) < 10).all() and logits.std() > 0.1


def test_a_teacher_that_does_not_fit_is_refused(teacher_run, learnable, script):
    project = teacher_run.parent
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--project_name", project.name]
    refused = script("train_base.py", *args, "--teacher", "nobody", cwd=project.parent)
    refused.refused("--teacher nobody", "no such run")
    other = script("train_base.py", *args, "--teacher", teacher_run.name, "--val_fraction", 0, cwd=project.parent)
    other.refused("--teacher", "clips")


def test_live_teachers_hear_what_the_model_hears(teacher_run, recipe):
    project = teacher_run.parent
    live = [*recipe, "--n_epochs", 1, "--teacher_input", "live", "--project_name", project.name]
    out = run_script("train_base.py", *live, cwd=project.parent)
    assert read_results(run_of(out, project))["n_clips"] == 32


# All of it together, resumed and stored


def test_the_whole_recipe_killed_and_resumed_equals_undisturbed_bit_for_bit(student, teacher_run, recipe, tmp_path):
    project = tmp_path / "P"
    teacher = project / teacher_run.name
    (teacher / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "checkpoints/best.ckpt"):
        (teacher / name).write_bytes((teacher_run / name).read_bytes())
    teacher.rename(project / "general")  # where kill_and_resume expects what is not its own run
    args = [x if x != teacher_run.name else "general" for x in recipe]
    run = kill_and_resume("train_base.py", args, project, "checkpoints/last.ckpt", 0.3)
    assert (run / "results.json").read_bytes() == (student / "results.json").read_bytes()
    resumed, undisturbed = (weights(folder / "checkpoints" / "last.ckpt") for folder in (run, student))
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())
    assert (run / "stored" / "general.safetensors").stat().st_size > 0


def test_the_stored_file_gives_the_runs_figures_and_has_the_counted_size(student, learnable, script, tmp_path):
    path, results = student / "stored" / "general.safetensors", read_results(student)
    header, tensors = stored.file_sizes(path)
    assert header + tensors == path.stat().st_size
    assert tensors == results["complexity"]["total_param_bytes"] == sum(results["complexity"]["param_bytes"].values())
    assert set(results["complexity"]["param_bytes"]) == {"int8", "float16"}
    args = ["--dataset_dir", learnable, "--project_name", "T", *QUIET]
    done = script("test_only.py", "--ckpt_path", path, *args)
    assert done.code == 0, done.err
    assert read_results(only_run(tmp_path / "T")) == results


def test_the_checkpoint_is_tested_as_stored_or_in_32_bit(student, learnable, script, tmp_path):
    args = ["--ckpt_path", student / "checkpoints" / "best.ckpt", "--dataset_dir", learnable, *QUIET]
    as_stored = script("test_only.py", *args, "--project_name", "T8")
    in_32 = script("test_only.py", *args, "--project_name", "T32", "--weight_bits", "32")
    assert as_stored.code == in_32.code == 0, as_stored.err + in_32.err
    results = read_results(student)
    assert read_results(only_run(tmp_path / "T8")) == results
    unrounded = read_results(only_run(tmp_path / "T32"))
    assert unrounded["loss"] != results["loss"] and unrounded["loss"] == pytest.approx(results["loss"], abs=0.1)
    assert set(unrounded["complexity"]["param_bytes"]) == {"float32"}
    again = script(
        "test_only.py", "--ckpt_path", only_run(tmp_path / "T8") / "stored", *args[2:], "--project_name", "T2"
    )
    assert again.code == 0, again.err  # what a test has stored is as good as what training has
    assert read_results(only_run(tmp_path / "T2")) == results


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
    learning = {
        name for name, layer in module.model.named_modules() if "BatchNorm" in type(layer).__name__ and layer.training
    }
    in_stem = {name for name in learning if name.startswith("stem")}
    assert bool(in_stem) == (finetune == "full") and ("head.scores" in learning) == (finetune != "lora")


def test_learning_rates_cannot_be_chosen_without_validation_clips():
    with pytest.raises(UserError, match="--lr_choices"):
        DeviceConfig(lr_choices="0.1,0.2", split=SplitConfig(val_fraction=0))


def test_a_configuration_from_before_a_field_was_there_means_what_it_meant():
    filled = to_plain(TrainConfig(model=fill(ModelConfig("aum_small"), 256, 65)))
    old = {"embed_dim": 48, "head": "linear", "cls_position": "middle", "model": "aum_nano"}
    for name in ("stem", "stem_blocks", "freq_norm", "row_scan", "local_conv", "factorised_pos_embed"):
        del filled["model"][name]
    config = from_plain(TrainConfig, {**filled, "model": filled["model"] | old})
    shape = fill(config.model, 256, 65)
    assert (shape.stem, shape.row_scan, shape.head, shape.cls_position) == ((), False, "linear", "middle")


@pytest.mark.parametrize("finetune", ["full", "lora", "head"])
def test_stage_2_trains_what_it_is_told_to_and_stores_a_file_per_device(finetune, student, learnable):
    project = student.parent
    args = ["--ckpt_id", student.name, "--dataset_dir", learnable, "--project_name", project.name, *DEVICE_FIT, *QUIET]
    tried = ["--finetune", finetune, "--lr_choices", "0.003,0.02", "--lora_rank", 2]
    out = run_script("train_device_specific.py", *args, *tried, cwd=project.parent)
    run = run_of(out, project)
    results = read_results(run)
    outcomes = results["fine_tuning"]
    assert {outcomes[d]["lr"] for d in ("a", "b", "s1")} <= {0.003, 0.02}
    general = weights(student / "checkpoints" / "best.ckpt")
    for device_id in ("a", "b", "s1"):
        tuned = weights(run / "checkpoints" / device_id / "tuned.ckpt")
        moved = {name for name, value in tuned.items() if not torch.equal(value, general[f"model.{name}"])}
        assert set(tuned) == {name.removeprefix("model.") for name in general if name.startswith("model.")}
        assert moved, "nothing was trained"
        if finetune == "head":
            assert {name.partition(".")[0] for name in moved} == {"head"}
        if finetune == "lora":
            assert {name.rpartition(".")[2] for name in moved} == {"weight"}
            assert not [name for name in moved if "norm" in name or "conv1d" in name or "dt_proj" in name]
    kept = [device_id for device_id, outcome in outcomes.items() if outcome["kept"]]
    files = {path.stem for path in (run / "stored").iterdir()}
    assert files == {"general", *kept} and results["device_models"] == kept
    for path in (run / "stored").iterdir():
        assert stored.file_sizes(path)[1] == results["complexity"]["total_param_bytes"]
    test = ["--ckpt_path", run / "stored", "--dataset_dir", learnable, "--project_name", project.name, *QUIET]
    again = run_script("test_only.py", *test, cwd=project.parent)
    repeated = read_results(run_of(again, project))
    results.pop("fine_tuning")
    assert repeated == results


# Pruning


def test_a_larger_model_is_pruned_into_a_smaller_one_and_trained_on(teacher_run, learnable):
    project = teacher_run.parent
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--project_name", project.name, "--init_from", teacher_run.name]
    out = run_script("train_base.py", *args, "--embed_dim", 12, "--d_state", 3, "--lr", 1e-9, cwd=project.parent)
    run = run_of(out, project)
    pruned, large = (weights(r / "checkpoints" / "best.ckpt") for r in (run, teacher_run))
    assert pruned["model.layers.0.mixer.A_log"].shape == (24, 3)
    ours, theirs = (state["model.head.bias"] for state in (pruned, large))
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # it started from there, and hardly moved
    with_more = [*args, "--embed_dim", "32"]
    command = [sys.executable, str(ROOT / "train_base.py"), *map(str, with_more)]
    done = subprocess.run(command, cwd=project.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "--embed_dim 32 is more than the 16" in done.stderr


# The recipe of docs/challenge.md


def recipe_commands() -> list[list[str]]:
    """Those of the page's section, each as its words."""
    section = (ROOT / "docs/challenge.md").read_text().partition("## A recipe\n")[2]
    block = section.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("python ")]


SMALLER = "--n_epochs 2 --n_mels 64 --n_fft 1024 --window_length 1024 --num_workers 0 --wandb_mode disabled".split()


def test_every_command_of_the_recipe_runs_on_synthtau(tmp_path):
    data, responses = tmp_path / "synth", tmp_path / "responses"
    run_script("-m", "dcase.synth", "--out", data, "--train_clips", 120, "--test_clips_per_device", 10, cwd=ROOT)
    run_script("-m", "dcase.synth", "--responses", responses, cwd=ROOT)
    known = {"/data/TAU22": str(data), "/data/MicIRP": str(responses)}
    trained = {}
    names = iter(("TEACHER_1", "TEACHER_2", "STUDENT", "DEVICE_RUN"))
    commands = recipe_commands()
    assert [command[1] for command in commands] == [
        *["train_base.py"] * 3, "train_device_specific.py", "test_only.py", "-m"
    ]  # fmt: skip
    for _, script, *args in commands:
        for name, value in {**known, **trained}.items():
            args = [arg.replace(name, value) for arg in args]
        if script == "-m":
            args += ["--n_mels", "64"]
        elif script == "train_base.py":
            size = ["--depth", "1", "--embed_dim", "32"] if "aum_small" in args else []
            args += [*SMALLER, *size, "--qat_epochs", "1", "--batch_size", "32"]
        else:
            args += ["--num_workers", "0", "--wandb_mode", "disabled"]
            args += ["--n_epochs", "1"] if script == "train_device_specific.py" else []
        out = run_script(script, *args, cwd=tmp_path)
        if script.startswith("train"):
            run = run_of(out, tmp_path / "DCASE25_Task1")
            trained[next(names)] = run.name
    assert "Memory: pass" in out and "MACs: pass" in out
    results = read_results(run)
    assert results["n_clips"] == 90 and results["complexity"]["within_limits"]
    assert (run / "stored" / "general.safetensors").is_file()
