"""From one script to the next: the commands that are printed can be run as they are, and measure the same data."""

import dataclasses
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FIT, SMALL, only_run, read_results, refusal

import test_only
import train_base
import train_device_specific
from dcase import errors, export
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import DeviceConfig, TrainConfig, find_dataset_dir, for_one_device, from_plain, to_plain
from dcase.runs.folder import resume_command

ON_CPU = "--num_workers 0 --wandb_mode disabled --accelerator cpu --report_audio False".split()


@pytest.fixture
def project(general_run, tmp_path) -> Path:
    """A project folder "P" with one run, "general"."""
    shutil.copytree(general_run, tmp_path / "P" / "general")
    return tmp_path / "P"


def what_comes_next(out: str) -> list[str]:
    """The arguments of the command that a script ends with."""
    python, *args = shlex.split(out.strip().splitlines()[-1].removeprefix("next: "))
    assert python == "python"
    return args


def test_the_printed_commands_stay_with_the_data_of_the_first(learnable, call_main, tmp_path, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    (tmp_path / "my data").symlink_to(learnable)
    more = ["--n_epochs", "1", "--project_name", "my runs", "--logger", "none"]
    done = call_main(train_base.main, "--dataset_dir", "my data", *SMALL, *FIT, *more).succeeded()
    place = ["--project_name", "my runs", "--dataset_dir", str(tmp_path / "my data")]
    script, *args = what_comes_next(done.out)
    assert script == "train_device_specific.py"
    assert args == ["--ckpt_id", only_run(tmp_path / "my runs").name, *place]

    more = ["--n_epochs", "1", "--only_devices", "a", "--run_id", "tuned"]
    done = call_main(train_device_specific.main, *args, *ON_CPU, *more).succeeded()
    given = ["test_only.py", "--ckpt_path", "my runs/tuned/checkpoints/best.ckpt,...", *place]
    assert what_comes_next(done.out) == given


def test_without_a_flag_the_data_is_that_of_the_checkpoints_run(project, learnable, call_main, tmp_path, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    best = project / "general" / "checkpoints" / "best.ckpt"
    done = call_main(test_only.main, "--ckpt_path", best, "--project_name", "T", *ON_CPU).succeeded()
    said = f"neither --dataset_dir nor TAU22_DIR is given: using the data of the checkpoint's run, {learnable}"
    assert said in done.out
    assert "SynthTAU" not in done.out and read_results(only_run(tmp_path / "T"))["n_clips"] == 32


def test_stored_models_have_the_data_of_the_run_that_they_lie_in(project, learnable, call_main, tmp_path, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    best = project / "general" / "checkpoints" / "best.ckpt"
    call_main(test_only.main, "--ckpt_path", best, "--project_name", "T", "--weight_bits", 8, *ON_CPU).succeeded()
    stored = only_run(tmp_path / "T") / "stored"
    for path in (stored, stored / "general.safetensors"):
        assert b"learnable" not in (stored / "general.safetensors").read_bytes()  # no path of this machine
        done = call_main(test_only.main, "--ckpt_path", path.relative_to(tmp_path), "--project_name", "U", *ON_CPU)
        assert done.code == 0 and f"using the data of the checkpoint's run, {learnable}" in done.out, done.err


def test_the_flag_comes_first_then_tau22_dir_then_the_run(learnable, capsys, monkeypatch, tmp_path):
    def of_run(folder: Path | None) -> dict:
        return {"config": {"data": {"dataset_dir": folder and str(folder)}}}

    monkeypatch.delenv("TAU22_DIR", raising=False)
    assert find_dataset_dir("given", of_run(learnable)) == "given"
    assert find_dataset_dir(None, of_run(None)) is None  # SynthTAU
    assert find_dataset_dir(None, {"config": {"data": {"orig_sample_rate": 1}}}) is None  # a stored model
    assert capsys.readouterr().out == ""
    assert find_dataset_dir(None, of_run(learnable)) == str(learnable)
    assert str(learnable) in capsys.readouterr().out
    gone = tmp_path / "gone"
    said = refusal(find_dataset_dir, None, of_run(gone))
    assert said == f"the data folder of the checkpoint's run, {gone}, is not there any more: give --dataset_dir"
    monkeypatch.setenv("TAU22_DIR", "elsewhere")
    assert find_dataset_dir(None, of_run(tmp_path / "gone")) is None  # `find_source` takes TAU22_DIR


@pytest.mark.parametrize(
    "main, args",
    [
        (train_device_specific.main, ["--ckpt_id", "general", "--project_name", "P", *ON_CPU]),
        (export.main, ["--ckpt_path", "P/general/checkpoints/best.ckpt"]),
    ],
)
def test_a_folder_that_is_gone_is_named(main, args, project, learnable, call_main, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    best = project / "general" / "checkpoints" / "best.ckpt"
    moved = load_checkpoint(best)
    assert moved["config"]["data"]["dataset_dir"] == str(learnable)
    moved["config"]["data"]["dataset_dir"] = "/nowhere/tau22"
    torch.save(moved, best)
    call_main(main, *args).refused("/nowhere/tau22, is not there any more: give --dataset_dir")


def test_a_finished_run_that_is_resumed_is_only_tested(project, call_main):
    last = project / "general" / "checkpoints" / "last.ckpt"
    before = last.read_bytes(), read_results(project / "general")
    done = call_main(train_base.main, "--resume", "general", "--project_name", "P", "--accelerator", "cpu")
    assert done.code == 0, done.err
    assert "run general is trained to its end: it is only tested again" in done.out
    assert before == (last.read_bytes(), read_results(project / "general"))


def test_how_a_run_goes_on():
    assert resume_command("train_base.py", "x1", "DCASE25_Task1") == "python train_base.py --resume x1"
    assert resume_command("train_base.py", "x1", "my runs") == (
        "python train_base.py --resume x1 --project_name 'my runs'"
    )


@pytest.mark.parametrize(
    "command, said", [("", ""), ("python x.py --resume y", "; go on with: python x.py --resume y")]
)
def test_ctrl_c_names_a_command_where_there_is_something_to_go_on_with(command, said, monkeypatch, capsys):
    def pressed():
        raise KeyboardInterrupt

    def resumable():
        with errors.resumable(command):
            pressed()

    monkeypatch.setattr(errors.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
        errors.run(resumable if command else pressed)
    assert end.value.code == 130 and capsys.readouterr().err == f"\nstopped by the keyboard{said}\n"


# What stage 2 takes from the general model


def test_stage_2_takes_augmentation_batch_and_a_tenth_of_the_rate_from_the_general_model(
    general_run, learnable, call_main, monkeypatch
):
    monkeypatch.setattr(train_device_specific, "with_data_of", lambda *_: exit(0))  # what follows
    args = ["--ckpt_id", general_run.name, "--project_name", str(general_run.parent), "--dataset_dir", learnable]
    out = call_main(train_device_specific.main, *args, "--lr", "0.004", "--freqm", "2").succeeded().out
    assert f"from the general model {general_run.name}: its augmentation, with Freq-MixStyle and device" in out
    assert "--freqm 4" in out and "--batch_size 16" in out and "--lr 0.001;" in out
    assert "given instead: --freqm 2 --lr 0.004" in out
    shown = call_main(train_device_specific.main, *args, "--help").succeeded().out
    for flag, default in {"lr": 0.001, "mixstyle_p": 0.0, "freqm": 4, "timem": 4, "batch_size": 16}.items():
        assert f"--{flag}" in shown and f"(default: {default})" in shown.partition(f"--{flag} ")[2][:400], flag


def test_what_imitates_other_devices_is_off():
    augment = dataclasses.replace(TrainConfig().augment, mixstyle_p=0.4, dir_path="/somewhere", mixup_alpha=0.3)
    general = dataclasses.replace(TrainConfig(), augment=augment)
    stage_2 = for_one_device(DeviceConfig(), general)
    assert (stage_2.augment.mixstyle_p, stage_2.augment.dir_path, stage_2.augment.mixup_alpha) == (0.0, None, 0.3)
    assert stage_2.fit.lr == 5e-5 and stage_2.fit.n_epochs == 50
    assert from_plain(DeviceConfig, to_plain(stage_2)) == stage_2
