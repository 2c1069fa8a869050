"""Bad input ends a script with one clear line, exit code 2 and no traceback, and loses nothing that was written."""

import hashlib
import json
import os
import pickle
import re
import shutil
from functools import reduce
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import FIT, SMALL, refusal
from stored_files import file_sizes

import aum
import test_only
import train_base
import train_device_specific
from dcase import cli, compare, export, predict, prepare, publish, submit
from dcase.data.labels import SCENES, TAU22_LABELS
from dcase.doctor import data as doctors_data
from dcase.doctor.data import DoctorConfig
from dcase.report import __main__ as report
from dcase.runs.checkpoints import load_checkpoint, save_checkpoint
from dcase.runs.stored import save_stored
from dcase.runs.trained import load_trained
from dcase.training import lit
from dcase.training.lit import SceneClassifier

MAINS = {script.__name__: script.main for script in (train_base, train_device_specific, test_only)}


@pytest.fixture
def call(call_main):
    """Run a script in this process, in a folder of its own: call("train_base", "--lr", "1")."""
    return lambda name, *args: call_main(MAINS[name], *args)


@pytest.fixture
def project(general_run, tmp_path) -> Path:
    """A project folder "P" with one run, "general"."""
    shutil.copytree(general_run, tmp_path / "P" / "general")
    return tmp_path / "P"


@pytest.fixture
def data(learnable, tmp_path) -> Path:
    """A copy of the learnable folder, to be damaged."""
    return Path(shutil.copytree(learnable, tmp_path / "data"))


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


TRAIN = ["--project_name", "P", *SMALL, *FIT]
BEST = "P/general/checkpoints/best.ckpt"


def test_unknown_flag_suggests_the_right_one(call, learnable):
    done = call("train_base", "--embd_dim", "3")
    assert done.code == 2 and "--embed_dim" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--patch_size", "0,16"], ["--patch_size", "(0, 16)"]),
        (["--patch_size", "64,4"], ["patch_size", "32 mel bins"]),
        (["--model", "aum_smal"], ["--model", "aum_small"]),
        (["--n_classes", "11"], ["--n_classes", "10"]),
        (["--subset", "30"], ["--subset", "30"]),
        (["--val_fraction", "1.5"], ["--val_fraction"]),
        (["--n_epochs", "0"], ["--n_epochs"]),
        (["--lr", "-1"], ["--lr"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--mixstyle_p", "2"], ["--mixstyle_p"]),
        (["--f_max", "9000"], ["--f_max", "4000"]),
        (["--dropout", "1.5"], ["--dropout"]),
        (["--paired_layers", "True"], ["--paired_layers", "even depth"]),
        (["--wandb_mode", "sometimes"], ["--wandb_mode"]),
        (["--accelerator", "tpux"], ["--accelerator"]),
        (["--devices", "0"], ["--devices"]),
        (["--read_from", "pack"], ["pack", "--read_from wav", "dcase.prepare --pack"]),
        (["--seed", "5000000000"], ["--seed"]),
        (["--lr", "nan"], ["--lr"]),
        (["--target_length", "3"], ["patch_size", "3 frames"]),
        (["--mixstyle_alpha", "nan"], ["--mixstyle_alpha must be", "nan"]),
        (["--lr", "1e38"], ["--lr must be at least 0 and at most 100"]),
        (["--roll_sec", "inf"], ["--roll_sec"]),
        (["--temperature", "1e-300"], ["--temperature"]),
        (["--warmup_steps", "9" * 400], ["--warmup_steps"]),
        (["--project_name=-rf"], ["--project_name -rf begins with -"]),
        (["--experiment_name", "a\x1b[2J\nb"], ["--experiment_name has a control character", "a\\x1b[2J b"]),
        (["--experiment_name", "x" * 300], ["--experiment_name: xxx", "300 characters"]),
        (["--project_name", "Q/" + "x" * 300], ["--project_name: xxx", "300 characters"]),
        # Sizes that would take all memory, or minutes, before anything else stops them
        (["--depth", "1000000000"], ["--depth", "from 1 to 256"]),
        (["--embed_dim", "1000000000"], ["--embed_dim", "from 1 to 8192"]),
        (["--embed_dim", "8192", "--depth", "256"], ["--embed_dim 8192, depth 256", "weights: at most"]),
        (["--d_state", "1000000"], ["--d_state", "from 1 to 1024"]),
        (["--n_mels", "10000000"], ["--n_mels", "at least 1 and at most 2048"]),
        (["--n_fft", "1000000000"], ["--n_fft", "at most 65536"]),
        (["--target_length", "1000000000"], ["--target_length", "at most 65536"]),
        (["--sample_rate", "7999"], ["--orig_sample_rate 8000 and --sample_rate 7999", "odd a ratio"]),
        (["--cross_fit", "1000000000"], ["--cross_fit", "at most 100"]),
    ],
)
def test_flags_that_make_no_sense(call, learnable, project, args, parts):
    before = sorted(project.parent.rglob("*"))
    call("train_base", "--dataset_dir", learnable, *TRAIN, *args).refused(*parts)
    assert sorted(project.parent.rglob("*")) == before  # not even a folder of the run that never began


def test_wrong_ckpt_id_lists_the_runs_there_are(call, learnable, project):
    done = call("train_device_specific", "--ckpt_id", "nonsense", "--dataset_dir", learnable, "--project_name", "P")
    done.refused("--ckpt_id nonsense", "general")
    call("train_device_specific", "--dataset_dir", learnable).refused("--ckpt_id")
    call("train_base", "--resume", "nonsense", "--project_name", "P").refused("--resume nonsense", "general")
    call("train_device_specific", "--resume", "general", "--project_name", "P").refused(
        "made by train_base.py; go on with: python train_base.py --resume general --project_name P"
    )


def test_a_test_is_not_resumed(call, project):
    saved = json.loads((project / "general" / "config.json").read_text())
    saved["config"] = {name: saved["config"][name] for name in ("data", "model")} | {"ckpt_path": "x.ckpt"}
    (project / "general" / "config.json").write_text(json.dumps(saved))
    for name in ("train_base", "train_device_specific"):
        call(name, "--resume", "general", "--project_name", "P").refused("made by test_only.py: a test is not resumed")


def test_checkpoint_that_is_not_there(call):
    call("test_only", "--ckpt_path", "nowhere.ckpt").refused("nowhere.ckpt", "--ckpt_path")
    call("test_only").refused("--ckpt_path")


TAKE_CHECKPOINTS = {
    "test_only": (test_only.main, ["--project_name", "DCASE25_Task1"]),
    "predict": (predict.main, ["clip.wav"]),
    "export": (export.main, []),
    "publish": (publish.main, ["--out", "x"]),
    "submit": (submit.main, ["--label", "Doe_Uni"]),
}


@pytest.mark.parametrize("name", TAKE_CHECKPOINTS)
def test_a_run_where_a_model_of_it_is_asked_for(call_main, general_run, tmp_path, name):
    main, more = TAKE_CHECKPOINTS[name]
    run = Path("DCASE25_Task1/general")
    shutil.copytree(general_run, tmp_path / run)

    def refused(given) -> str:
        done = call_main(main, *more, "--ckpt_path", given)
        done.refused()
        return done.error

    take = f"--ckpt_path takes a file: {run}/checkpoints/best.ckpt"
    assert refused("general") == f"error: general is a run's id: {take}"
    assert refused(run) == f"error: {run} is a run's folder: {take}"
    make = f"python test_only.py --ckpt_path {run}/checkpoints/best.ckpt --weight_bits 16 makes one"
    none = f"error: --ckpt_path {run}/stored: there is no folder {run}/stored"
    assert refused(run / "stored") == f"{none}; {make}, in a new run"
    assert not (tmp_path / "x").exists() and not (tmp_path / "submissions").exists()


def test_what_a_run_has_is_what_it_says_to_give(call, project):
    run = project / "general"
    args = ["--project_name", "P", "--ckpt_path"]
    (run / "checkpoints" / "best.ckpt").unlink()
    takes = "--ckpt_path takes a file: P/general/checkpoints/last.ckpt"
    (run / "stored").mkdir()
    stored = "the folder of its stored models: P/general/stored"
    call("test_only", *args, "general").refused(f"general is a run's id: {takes}, or {stored}")
    call("test_only", *args, "P/general/checkpoints").refused("P/general/checkpoints is a run's folder: ", takes)
    (run / "stored").rmdir()
    gone = "P/general/stored/general.safetensors"
    call("test_only", *args, gone).refused(f"{gone}: there is no folder P/general/stored; python test_only.py", "last")
    (run / "checkpoints" / "last.ckpt").unlink()
    call("test_only", *args, "P/general").refused("no model in P/general/: give a run that was trained")
    call("test_only", *args, "P/general/stored").refused("nor is there a checkpoint in P/general/checkpoints/")
    call("test_only", *args, "P/nowhere/stored").refused("nor is there a checkpoint in P/nowhere/checkpoints/")
    call("test_only", *args, "nowhere").refused("--ckpt_path nowhere: there is no such file or folder", "<run_id>")


@pytest.mark.parametrize("content", [b".", b"\x80\x02.", b"RIFF1234WAVE", b"text"])
def test_file_that_is_no_checkpoint(call, tmp_path, content):
    (tmp_path / "some.ckpt").write_bytes(content)
    call("test_only", "--ckpt_path", "some.ckpt").refused("some.ckpt")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_checkpoint(call, learnable, project, keep):
    path = project.parent / BEST
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    before = fingerprint(project)
    for args in (["test_only", "--ckpt_path", BEST], ["train_device_specific", "--ckpt_id", "general"]):
        call(*args, "--dataset_dir", learnable, "--project_name", "P").refused(BEST)
    assert fingerprint(project) == before


class Runs:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return Path("it_ran").touch, ()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_checkpoint_that_carries_code_is_refused_and_does_not_run(call, tmp_path, how):
    if how == "torch":
        torch.save({"state_dict": {}, "config": Runs()}, tmp_path / "evil.ckpt")
    else:
        (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Runs()))
    call("test_only", "--ckpt_path", "evil.ckpt").refused("evil.ckpt", "refused")
    assert not (tmp_path / "it_ran").exists()


def test_checkpoint_of_something_else(call, tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    call("test_only", "--ckpt_path", "other.ckpt").refused("other.ckpt", "train_base.py")


@pytest.mark.parametrize("main", [test_only.main, export.main, submit.main])
def test_weights_that_are_not_finite_are_an_error_of_the_checkpoint(call_main, learnable, project, main):
    checkpoint = load_checkpoint(project / "general" / "checkpoints" / "best.ckpt")
    checkpoint["state_dict"]["model.layers.0.mixer.D"][0] = float("nan")
    save_checkpoint(checkpoint, project / "bad.ckpt")
    args = ["--label", "A_B"] if main == submit.main else []
    call_main(main, "--ckpt_path", "P/bad.ckpt", "--dataset_dir", learnable, *args).refused(
        "--ckpt_path P/bad.ckpt: model.layers.0.mixer.D is NaN or infinite"
    )
    assert not list(Path().glob("submissions/**/*.safetensors")) and not Path("DCASE25_Task1").exists()


def test_weights_that_do_not_fit_their_configuration(call, learnable, project):
    checkpoint = torch.load(project.parent / BEST, weights_only=True)
    del checkpoint["state_dict"]["model.cls_token"]
    torch.save(checkpoint, project.parent / BEST)
    call("test_only", "--ckpt_path", BEST, "--dataset_dir", learnable).refused("model.cls_token")


@pytest.mark.parametrize(
    "flag, given, has",
    [("embed_dim", "32", "16"), ("depth", "24", "1"), ("patch_size", "16,16", "8,4"), ("n_mels", "64", "32")],
)
def test_flags_that_contradict_the_checkpoint_show_both_values(call, learnable, project, flag, given, has):
    args = ["--dataset_dir", learnable, "--project_name", "P", f"--{flag}", given]
    call("test_only", "--ckpt_path", BEST, *args).refused(f"--{flag} {given}", has, BEST)
    call("train_device_specific", "--ckpt_id", "general", *args).refused(f"--{flag} {given}", has)


FOREIGN = ["forest", "kitchen", "office", "street"]
NAMED = "was trained on the scenes forest, kitchen, office, street; these data have airport, bus"


@pytest.fixture
def of_other_scenes(project) -> Path:
    """The project of a run that was trained on four other scenes."""
    for path in (project / "general" / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["scenes"] == list(SCENES)
        checkpoint["scenes"], checkpoint["config"]["model"]["n_classes"] = FOREIGN, 4
        torch.save(checkpoint, path)
    path = project / "general" / "config.json"
    saved = json.loads(path.read_text())
    assert saved["scenes"] == list(SCENES)
    saved["scenes"], saved["config"]["model"]["n_classes"] = FOREIGN, 4
    path.write_text(json.dumps(saved))
    return project


def test_a_model_of_other_scenes_is_refused_wherever_it_is_given(call, learnable, of_other_scenes):
    data = ["--dataset_dir", learnable, "--project_name", "P"]
    call("train_base", *data, "--resume", "general").refused(f"the run --resume general {NAMED}")
    for args in (["--teacher", "general"], ["--init_from", "general"]):
        call("train_base", *TRAIN, *data, *args).refused(NAMED)
    call("train_device_specific", *data, "--ckpt_id", "general").refused(f"the model {NAMED}")
    call("test_only", *data, "--ckpt_path", BEST).refused(f"the model {NAMED}")
    assert [path.name for path in of_other_scenes.iterdir()] == ["general"]


def test_the_same_scenes_in_another_order_are_other_scenes(project):
    path = project / "general" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"scenes": [*reversed(SCENES)]}, path)
    message = refusal(SceneClassifier.from_checkpoint, load_checkpoint(path), None, TAU22_LABELS)
    assert "was trained on the scenes tram, street_traffic," in message
    torch.save(checkpoint | {"scenes": 3}, path)
    assert f"checkpoint {path}: scenes are no list of names" in refusal(load_checkpoint, path)


def test_stored_models_keep_their_scenes_and_those_from_before_are_taken(project, tmp_path):
    checkpoint = load_checkpoint(project / "general" / "checkpoints" / "best.ckpt")
    for model in ("", "/general.safetensors"):
        given = f"{tmp_path}/stored{model}"
        save_stored(checkpoint, tmp_path / "stored", 16)
        tensors = file_sizes(tmp_path / "stored" / "general.safetensors")[1]
        assert load_trained(given)["scenes"] == list(SCENES)
        save_stored(checkpoint | {"scenes": FOREIGN}, tmp_path / "stored", 16)
        assert load_trained(given)["scenes"] == FOREIGN
        before = {name: value for name, value in checkpoint.items() if name not in TAU22_LABELS.plain()}
        save_stored(before, tmp_path / "stored", 16)
        assert "scenes" not in load_trained(given)
        assert file_sizes(tmp_path / "stored" / "general.safetensors")[1] == tensors  # what is counted


def test_a_checkpoint_from_before_scenes_were_written_is_taken(project):
    path = project / "general" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert TAU22_LABELS.plain().items() <= checkpoint.items()
    for name in TAU22_LABELS.plain():
        del checkpoint[name]
    torch.save(checkpoint, path)
    assert load_checkpoint(path).keys() == checkpoint.keys()
    assert SceneClassifier.from_checkpoint(load_checkpoint(path)).labels == TAU22_LABELS


TYPED_WRONG = {  # place in a checkpoint: what is there, what the error names
    "config model depth": ("12", "model.depth: Input should be a valid integer"),
    "config model embed_dim": (10**9, "--embed_dim is a whole number from 1 to 8192"),
    "config logmel": (None, "config.logmel: Input should be a valid dictionary"),
    "config logmel n_mels": (10**7, "--n_mels must be at least 1 and at most 2048"),
    "config data orig_sample_rate": (float("nan"), "Out of range float values are not JSON compliant"),
    "frames": ("65", "frames: Input should be a valid integer"),
    "device_ids": (None, "device_ids: Input should be a valid list"),
    "device_ids ": (["a", "a"], "device_ids has a device twice"),
    "state_dict": (None, "state_dict: Input should be a valid dictionary"),
    "state_dict more": (torch.zeros(()).expand(2**30), "more claims more values than the file holds"),
    "clips_id": ([[[]]], "clips_id: Input should be a valid string"),
    "average": ({"steps": 3, "average": [1]}, "average.average: Input should be a valid dictionary"),
}


@pytest.mark.parametrize("place", TYPED_WRONG)
def test_a_value_of_a_wrong_type_in_a_checkpoint_is_named(call, call_main, learnable, project, place):
    value, said = TYPED_WRONG[place]
    path = project / "general" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    *parts, name = place.split()
    reduce(dict.get, parts, checkpoint)[name] = value
    torch.save(checkpoint, path)
    call("test_only", "--ckpt_path", BEST, "--dataset_dir", learnable).refused(said)
    call_main(predict.main, "clip.wav", "--ckpt_path", BEST).refused(said)
    call("train_device_specific", "--ckpt_id", "general", "--dataset_dir", learnable, "--project_name", "P").refused(
        said
    )


def test_what_lightning_cannot_restore_is_named(call, learnable, project):
    last = project / "general" / "checkpoints" / "last.ckpt"
    (project / "general" / "results.json").unlink()
    checkpoint = torch.load(last, weights_only=True)
    torch.save(checkpoint | {"optimizer_states": [{"state": 3}], "lr_schedulers": "x"}, last)
    call("train_base", "--resume", "general", "--project_name", "P").refused("last.ckpt cannot be resumed (")
    assert last.is_file()


DEEP = "[" * 200_000
RUN_FILES = {  # file of a run: its content, or what changes it; what the error names
    "results.json": (lambda r: r.pop("confusion"), "results.json cannot be read (confusion: Field required)"),
    "results.json ": (
        lambda r: r["device_group_acc"].update(odd=0.5),
        "results.json cannot be read (device_group_acc of",
    ),
    "results.json   ": (lambda r: r.update(device_avg_acc={"x": 1}), "results.json cannot be read (device_avg_acc: "),
    "results.json  ": (DEEP, "results.json cannot be read (maximum recursion depth"),
    "config.json": (DEEP, "config.json cannot be read (maximum recursion depth"),
    "config.json ": (lambda c: c.update(config=[]), "config.json cannot be read (config: Input should be"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_run_file_is_named(call_main, project, name):
    change, said = RUN_FILES[name]
    path = project / "general" / name.strip()
    content = json.loads(path.read_text())
    path.write_text(change if change is DEEP else (change(content), json.dumps(content))[1])
    done = call_main(compare.main, "general", "--project_name", "P")
    assert said in done.out and "Traceback" not in done.err and done.code == 2
    if path.name == "results.json":
        call_main(report.main, "general", "--project_name", "P").refused(said)


def test_metrics_that_are_not_finite_are_left_out_of_the_page(call_main, project):
    with open(project / "general" / "metrics.csv", "a") as file:
        file.write("3,train/loss,inf\n4,train/loss,nan\n-1,train/loss,1\n5,train/loss,1e400\n")
    call_main(report.main, "general", "--project_name", "P", "--report_audio", "False").succeeded()


def test_stage_2_may_not_move_the_validation_part(call, learnable, project):
    args = ["--ckpt_id", "general", "--dataset_dir", learnable, "--project_name", "P", "--val_fraction", "0.5"]
    call("train_device_specific", *args).refused("--val_fraction 0.5", "0.34")


def test_clips_of_another_length_than_the_model_was_trained_on(call, data, project):
    for path in (data / "audio").glob("*-paris-*"):
        soundfile.write(path, torch.rand(8000).numpy(), 8000)
    call("test_only", "--ckpt_path", BEST, "--dataset_dir", data).refused("63 frames", "32", "--target_length")


def test_resuming_with_other_flags(call, learnable, project):
    done = call("train_base", "--resume", "general", "--project_name", "P", "--lr", "0.5", "--wandb_mode", "disabled")
    done.refused("--lr 0.5", "0.01", "--resume general")


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


DATA_FAULTS = {
    "empty split": (
        lambda data: (data / "split_setup" / "split25.csv").write_text("filename\tscene_label\n"),
        ("split25.csv", "empty"),
    ),
    "mistake in the test list": (
        lambda data: replace_text(data / "split_setup" / "test.csv", "\tbus", "\tbuss"),
        ("test.csv", "buss"),
    ),
    "missing recordings": (
        lambda data: [path.unlink() for path in sorted((data / "audio").glob("bus-*"))[:3]],
        ("3 of the", "dcase.prepare"),
    ),
}


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_faults_of_the_data_folder_are_found_before_training(call, data, name):
    damage, parts = DATA_FAULTS[name]
    damage(data)
    call("train_base", "--dataset_dir", data, *TRAIN).refused(*parts)
    assert not (data.parent / "P").exists()


def test_data_folder_that_is_not_there(call):
    call("train_base", "--dataset_dir", "nowhere", *TRAIN).refused("nowhere", "--dataset_dir")


def test_data_folder_without_read_rights(call, learnable, monkeypatch):
    def locked(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", locked)  # root, as CI is, may read anything
    call("train_base", "--dataset_dir", learnable, *TRAIN).refused(str(learnable), "rights")


def test_backend_that_does_not_exist(call, learnable, monkeypatch):
    monkeypatch.setenv("AUM_SCAN_BACKEND", "nonsense")
    call("train_base", "--dataset_dir", learnable, *TRAIN).refused("AUM_SCAN_BACKEND", "torch")


@pytest.mark.parametrize(
    "args, parts",
    [
        (["train_device_specific", "--ckpt_id", "general"], ("--ckpt_id general", "--dataset_dir")),
        (["train_base", "--resume", "general"], ("the run that is resumed",)),
    ],
)
def test_other_clips_than_those_of_the_run(call, data, project, args, parts):
    path = data / "split_setup" / "split25.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-6]))
    more = [] if "--resume" in args else ["--wandb_mode", "disabled"]
    call(*args, "--dataset_dir", data, "--project_name", "P", *more).refused(*parts)


def test_test_clip_of_another_length_names_the_file(call, data, project):
    path = sorted((data / "audio").glob("*-paris-*"))[-1]
    soundfile.write(path, torch.zeros(1234).numpy() + 0.1, 8000)
    done = call("train_base", "--dataset_dir", data, *TRAIN, "--n_epochs", "1")
    done.refused(path.name, "--target_length")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_recording_of_another_length_names_the_file_from_any_process(call, data, workers):
    path = sorted((data / "audio").glob("tram-lyon-*-b.wav"))[-1]
    soundfile.write(path, torch.zeros(1234).numpy() + 0.1, 8000)
    done = call("train_base", "--dataset_dir", data, *TRAIN, "--val_fraction", "0", "--num_workers", workers)
    done.refused(path.name, "--target_length")


def keeps_good_checkpoint(folder: Path, epoch: int) -> None:
    """The only run of the project in ``folder`` has a last.ckpt of this epoch, with finite weights."""
    (last,) = (folder / "P").glob("*/checkpoints/last.ckpt")
    state = torch.load(last, weights_only=True)
    assert state["epoch"] == epoch and all(value.isfinite().all() for value in state["state_dict"].values())


def test_recording_cut_short(call, data):
    path = sorted((data / "audio").glob("bus-paris-*"))[0]  # in the test split: found after training
    path.write_bytes(path.read_bytes()[:900])
    done = call("train_base", "--dataset_dir", data, *TRAIN, "--n_epochs", "1")
    done.refused(path.name, "dcase.prepare")
    keeps_good_checkpoint(data.parent, epoch=0)  # the training is not lost


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_a_fifo_or_a_device_among_the_files_does_not_make_a_command_wait(call, call_main, data, project, alarm):
    cut, lists = "--orig_sample_rate 8000 --num_workers 0".split(), ["--dataset_dir", data]
    clips = sorted((data / "audio").iterdir())
    fifo(clips[0])
    clips[1].unlink()
    clips[1].symlink_to("/dev/zero")
    config = cli.parse(DoctorConfig, "", args=["--dataset_dir", str(data), "--orig_sample_rate", "8000"])
    assert "2 unreadable" in " ".join(one.found for one in doctors_data.data_folder(config))
    call("train_base", *lists, *TRAIN).refused(f"{clips[0].parent}/", "cannot be read")
    call_main(prepare.main, *lists, *cut, "--pack").refused(f"{clips[0]} cannot be read", "FIFO")
    done = call_main(prepare.main, *lists, *cut)
    assert done.code == 0 and re.search(r"2 +unreadable", done.out), done.err
    (data / "meta_clean.csv").unlink()
    fifo(data / "meta.csv")
    assert "FIFO" in " ".join(one.found for one in doctors_data.data_folder(config))
    for main in (prepare.main, train_base.main):
        call_main(main, *lists).refused("meta.csv cannot be read (it is a FIFO, no regular file)")
    fifo(project / "general" / "metrics.csv")
    assert call_main(report.main, "general", "--project_name", "P").code == 0


def test_a_fifo_in_a_published_model_does_not_make_a_command_wait(tmp_path, alarm):
    aum.create_model("aum_nano", n_mels=32, target_length=32, embed_dim=16).save_pretrained(tmp_path)
    fifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is no regular file"):
        aum.AudioMamba.from_pretrained(tmp_path)


def test_a_test_that_fails_is_to_be_given_again_not_resumed(call, call_main, data, project):
    path = sorted((data / "audio").glob("bus-paris-*"))[0]
    path.write_bytes(path.read_bytes()[:900])
    args = ["--dataset_dir", data, "--project_name", "P", "--run_id", "failed", "--wandb_mode", "disabled"]
    call("test_only", "--ckpt_path", BEST, *args, "--num_workers", "0").refused(path.name, "dcase.prepare")
    done = call_main(compare.main, "--all", "--project_name", "P")
    assert done.code == 0 and f"run test_only.py --ckpt_path {BEST} again" in done.out and "--resume" not in done.out


def test_loss_that_turns_nan_names_the_batch_and_keeps_the_last_good_checkpoint(call, learnable, tmp_path, monkeypatch):
    step = SceneClassifier.training_step

    def poisoned(self, batch, batch_idx):
        if self.current_epoch == 2:
            with torch.no_grad():
                self.model.norm_f.weight.fill_(float("nan"))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SceneClassifier, "training_step", poisoned)
    done = call("train_base", "--dataset_dir", learnable, *TRAIN)
    done.refused("loss is not finite", "--lr", "audio/")
    keeps_good_checkpoint(tmp_path, epoch=1)


def test_where_the_host_runs_ahead_the_same_clips_are_named_later(call, learnable, tmp_path, monkeypatch):
    """As on a GPU: nobody looks at the loss in the step, and everybody before a checkpoint is saved."""
    step, looked, poisoned = SceneClassifier.training_step, [], []

    def poisoning(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 1:
            poisoned.extend(self.trainer.train_dataloader.names(batch.index))
            with torch.no_grad():
                self.model.norm_f.weight.fill_(float("nan"))
        return step(self, batch, batch_idx)

    def look(self):
        looked.append(len(self._unchecked))
        refuse(self)

    refuse = SceneClassifier.refuse_non_finite
    monkeypatch.setattr(lit, "HOST_RUNS_AHEAD", ("cpu",))
    monkeypatch.setattr(SceneClassifier, "training_step", poisoning)
    monkeypatch.setattr(SceneClassifier, "refuse_non_finite", look)
    done = call("train_base", "--dataset_dir", learnable, *TRAIN)
    done.refused("loss is not finite in epoch 3, step", f"clips: {', '.join(poisoned)}")
    assert done.error.endswith(poisoned[-1])
    assert max(looked) > 1  # batches at a time
    keeps_good_checkpoint(tmp_path, epoch=1)


def test_one_clip_that_turns_nan_is_named_alone(call, learnable, tmp_path, monkeypatch):
    sound, poisoned = SceneClassifier.sound, []

    def poisoning(self, batch):
        waveform, length = sound(self, batch)
        if self.training and self.current_epoch == 1:
            poisoned.append(self.trainer.train_dataloader.names(batch.index[2:3])[0])
            waveform = waveform.index_fill(0, torch.tensor([2]), float("nan"))
        return waveform, length

    monkeypatch.setattr(SceneClassifier, "sound", poisoning)
    done = call("train_base", "--dataset_dir", learnable, *TRAIN, "--mixstyle_p", "0")  # it mixes clips
    done.refused("loss is not finite in epoch 2")
    assert done.error.endswith(f"look at these clips: {poisoned[0]}")


def test_explosion_in_the_last_step_of_an_epoch_does_not_overwrite_the_checkpoint(
    call, learnable, tmp_path, monkeypatch
):
    def poison(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.model.norm_f.weight.fill_(float("inf"))

    monkeypatch.setattr(SceneClassifier, "on_train_epoch_end", poison)
    done = call("train_base", "--dataset_dir", learnable, *TRAIN, "--val_fraction", "0")
    done.refused("norm_f.weight is not finite after epoch 2", "--lr")
    keeps_good_checkpoint(tmp_path, epoch=0)


def test_a_learning_rate_that_explodes_leaves_nothing_behind(call, learnable, tmp_path):
    args = ["--n_epochs", "1", "--lr", "100", "--warmup_steps", "0", "--gradient_clip_val", "0", "--run_id", "mine"]
    call("train_base", "--dataset_dir", learnable, *TRAIN, *args).refused("not finite")
    assert not list((tmp_path / "P").iterdir())
    (tmp_path / "P" / "mine").mkdir()
    (tmp_path / "P" / "mine" / "notes.txt").touch()
    call("train_base", "--dataset_dir", learnable, *TRAIN, *args).refused("not finite")
    assert (tmp_path / "P" / "mine" / "notes.txt").exists()


def test_project_folder_that_cannot_be_made(call, learnable, tmp_path):
    (tmp_path / "P").write_text("a file")
    call("train_base", "--dataset_dir", learnable, *TRAIN).refused("--project_name P")


def test_wandb_that_cannot_start_does_not_stop_training(call, learnable, monkeypatch):
    import wandb

    def broken(**kwargs):
        raise RuntimeError("no room for W&B")

    monkeypatch.setattr(wandb, "init", broken)
    done = call("train_base", "--dataset_dir", learnable, *TRAIN, "--n_epochs", "1", "--wandb_mode", "offline")
    assert done.code == 0 and "no room for W&B" in done.out
