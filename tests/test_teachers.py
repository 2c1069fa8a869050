"""Teachers from files: what is read, what is refused, and what a run learns and remembers of them."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEVICE_FIT, FIT, QUIET, RATE, SMALL, assert_same_run, read_results, refusal
from data_folder import write_list
from forked import run_script
from test_scripts import copy_general, kill_and_resume

from dcase.data.dataset import TAU22, Sound
from dcase.data.labels import SCENES
from dcase.data.tau22 import Clips, load_clips
from dcase.machine import MachineConfig
from dcase.runs.checkpoints import load_checkpoint
from dcase.submission.package import Submission, write_package
from dcase.training.logits_files import ClipLogits, read_logits
from dcase.training.packages import find_package
from dcase.training.teachers import LogitsFile, Package, Teachers, agreement, refuse_chance

HONEST = 0.8  # share of the clips that the teacher of these tests is right on


@pytest.fixture(scope="module")
def clips(learnable) -> Clips:
    return load_clips(learnable, "split25")


@pytest.fixture(scope="module")
def honest(clips) -> np.ndarray:
    """Logits (clips, scenes), right on four clips of five."""
    rng = np.random.default_rng(0)
    said = clips.scene.copy()
    wrong = np.arange(len(clips)) % 5 == 4
    said[wrong] = (said[wrong] + 1) % len(SCENES)
    return (rng.normal(0, 1, (len(clips), len(SCENES))) + 8 * np.eye(len(SCENES))[said]).astype(np.float32)


@pytest.fixture
def names(clips) -> np.ndarray:
    return np.char.decode(clips.filenames)


def as_csv(path: Path, names, logits, separator: str = ",", columns=SCENES) -> Path:
    table = pd.DataFrame({"filename": names} | dict(zip(columns, np.asarray(logits).T, strict=True)))
    table.to_csv(path, index=False, sep=separator)
    return path


def found(path: Path | str, clips: Clips) -> np.ndarray:
    return read_logits(str(path), clips.folder, 25).of(clips).numpy()


# What is read


def test_every_kind_of_file_gives_a_clip_its_own_logits(clips, names, honest, tmp_path):
    order = np.random.default_rng(1).permutation(len(clips))
    path = tmp_path / "x.npz"
    np.savez(path, filename=names[order], logits=-honest[order], mine=honest[order])
    assert np.array_equal(found(path, clips), -honest)
    assert np.array_equal(found(f"{path}:mine", clips), honest)
    np.savez(path, filename=names[order].astype(bytes), logits=honest[order][:, ::-1], scenes=SCENES[::-1])
    assert np.array_equal(found(path, clips), honest)
    for separator, suffix in ((",", "csv"), ("\t", "csv"), ("\t", "tsv")):
        path = as_csv(tmp_path / f"x.{suffix}", names[order], honest[order][:, ::-1], separator, SCENES[::-1])
        np.testing.assert_allclose(found(path, clips), honest, rtol=1e-6)
    torch.save(torch.from_numpy(honest).half(), tmp_path / "x.pt")
    np.testing.assert_allclose(found(tmp_path / "x.pt", clips), honest, rtol=1e-3)


def test_a_runs_predictions_are_such_a_file(general_run, learnable):
    test = load_clips(learnable, "test")
    logits = found(general_run / "predictions.csv", test)
    right = (logits.argmax(1) == test.scene).mean()
    assert right == pytest.approx(read_results(general_run)["acc"])


def test_names_may_lack_the_folder_and_more_clips_do_no_harm(clips, names, honest, tmp_path):
    bare = [name.removeprefix("audio/") for name in names] + ["other.wav"]
    path = as_csv(tmp_path / "x.csv", bare, np.concatenate([honest, honest[:1]]))
    np.testing.assert_allclose(found(path, clips), honest, rtol=1e-6)


def test_probabilities_become_logits(clips, names, honest, tmp_path):
    p = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    p[0] = np.eye(len(SCENES))[clips.scene[0]]
    logits = torch.from_numpy(found(as_csv(tmp_path / "x.csv", names, p), clips))
    np.testing.assert_allclose(torch.softmax(logits, 1).numpy(), p, atol=1e-6)


# What is refused


def test_unusable_files_are_refused_with_what_is_wrong(clips, names, honest, tmp_path):
    def said(path: Path | str) -> str:
        return refusal(found, path, clips)

    path = tmp_path / "x.npz"
    assert said(path) == "does not exist"
    path.write_bytes(b"no archive")
    assert said(path).startswith("cannot be read (")
    np.savez(path, logits=honest)
    assert "no array filename" in said(path)
    np.savez(path, filename=names, fold_1=honest)
    assert "x.npz:fold_1" in said(path)
    assert "no array fold_2" in said(f"{path}:fold_2")
    np.savez(path, filename=names, logits=honest[:-1])
    assert "72 rows, and logits has 71" in said(path)
    np.savez(path, filename=names, logits=honest[:, :9])
    assert "9 columns" in said(path)
    np.savez(path, filename=names, logits=honest, scenes=["zoo", *SCENES[1:]])
    assert "no column airport" in said(path)
    np.savez(path, filename=names.astype(object), logits=honest)
    assert "cannot be read" in said(path)  # it could run code
    assert "no column tram" in said(as_csv(tmp_path / "x.csv", names, honest[:, :9], columns=SCENES[:9]))
    assert "more than one row for" in said(as_csv(tmp_path / "x.csv", [names[0], *names[:-1]], honest))
    path = tmp_path / "x.pt"
    torch.save({"logits": torch.zeros(2)}, path)
    assert "no tensor" in said(path)
    torch.save(torch.from_numpy(honest)[:-1], path)
    assert "71 rows" in said(path) and "split25.csv 72" in said(path)
    path.write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    assert "could run code" in said(path)


def test_two_lists_of_one_length_leave_the_order_open(clips, names, honest, tmp_path, learnable):
    folder = Path(shutil.copytree(learnable, tmp_path / "data"))
    rows = [(name, SCENES[scene]) for name, scene in zip(names, clips.scene, strict=True)]
    path = tmp_path / "x.pt"
    torch.save(torch.from_numpy(honest), path)
    other = folder / "split_setup" / "split50.csv"
    write_list(other, ("filename", "scene_label"), rows)
    assert len(read_logits(str(path), folder, 25).filenames) == 72
    write_list(other, ("filename", "scene_label"), rows[::-1])
    assert "split25 and split50 have as many" in refusal(read_logits, str(path), folder, 25)


@pytest.mark.parametrize("hole", [np.nan, np.inf, None])
def test_clips_without_logits_are_counted_and_named(clips, names, honest, hole):
    logits, filenames = honest.copy(), names.copy()
    if hole is None:
        filenames[[3, 5]] = "elsewhere.wav", "nowhere.wav"
    else:
        logits[[3, 5], 2] = hole
    said = refusal(ClipLogits(filenames, logits).of, clips)
    assert "2 of the 72 training clips" in said and names[3] in said and names[5] in said


def test_permuted_rows_and_columns_are_refused_with_the_figure(clips, honest):
    logits = torch.from_numpy(honest)
    refuse_chance(logits, clips)
    for seed in range(20):
        permuted = logits[torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed))]
        right = 100 * (permuted.argmax(1).numpy() == clips.scene).mean()
        assert f"right on {right:.1f} %" in refusal(refuse_chance, permuted, clips)
    assert "in another order" in refusal(refuse_chance, logits.roll(1, 1), clips)


def test_a_teacher_that_knows_the_clips_by_heart_draws_a_warning(clips, honest):
    assert agreement("x", torch.from_numpy(honest), clips) == "teacher x: right on 80.6 % of the 72 training clips"
    assert "WARNING: teacher x" in agreement("x", torch.eye(len(SCENES))[clips.scene], clips)


# What is learnt


class Fixed:
    """A teacher with these logits."""

    name, sha256, made_here = "fixed", "", True

    def __init__(self, logits: torch.Tensor):
        self.found = logits

    def logits(self, clips, machine) -> torch.Tensor:
        return self.found


def test_each_teacher_has_an_equal_share_however_large_its_logits_are(clips):
    unsure, sure = torch.zeros(len(clips), 10), 100 * torch.eye(10)[clips.scene]
    teachers = Teachers([Fixed(unsure), Fixed(sure)], temperature=2.0)
    teachers.hear(SimpleNamespace(clips=clips), None)
    some = clips.select([5, 2, 60])
    teachers.keep(some)
    batch = SimpleNamespace(index=torch.tensor([2, 0]))
    targets = teachers.targets(batch, torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(targets, 0.05 + 0.5 * torch.eye(10)[some.scene[[2, 0]]])


@pytest.fixture(scope="module")
def teacher_file(clips, honest, tmp_path_factory) -> Path:
    return as_csv(tmp_path_factory.mktemp("teacher") / "x.csv", np.char.decode(clips.filenames), honest)


@pytest.fixture(scope="module")
def taught(learnable, teacher_file) -> list:
    return ["--dataset_dir", learnable, *SMALL, *FIT, "--teacher", teacher_file]


@pytest.fixture(scope="module")
def student(taught, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("student")
    out = run_script("train_base.py", *taught, "--project_name", "P", "--run_id", "s", cwd=cwd).succeeded().out
    assert "x.csv: right on 8" in out and " of the 48 training clips" in out
    return cwd / "P" / "s"


def test_a_run_with_a_file_killed_and_resumed_equals_undisturbed(student, taught, general_run, tmp_path):
    assert read_results(student)["loss"] != read_results(general_run)["loss"]
    assert_same_run(kill_and_resume("train_base.py", taught, tmp_path / "P", "checkpoints/last.ckpt", 0.2), student)


def test_every_device_of_stage_2_learns_from_its_own_clips_of_the_file(general_run, learnable, teacher_file, tmp_path):
    ckpt_id = copy_general(general_run, tmp_path / "P")
    args = ["--ckpt_id", ckpt_id, "--dataset_dir", learnable, "--project_name", "P", *QUIET, *DEVICE_FIT]
    losses = []
    for name, more in (("alone", []), ("taught", ["--teacher", teacher_file, "--teacher_weight", 1])):
        out = run_script("train_device_specific.py", *args, *more, "--run_id", name, cwd=tmp_path).succeeded().out
        metrics = pd.read_csv(tmp_path / "P" / name / "metrics.csv")
        losses.append(metrics[metrics["name"].str.endswith("train/loss")].groupby("name")["value"].first())
    assert out.count("x.csv: right on 8") == 1 and " of the 48 training clips" in out
    assert list(losses[1].index) == ["a/train/loss", "b/train/loss", "s1/train/loss"]
    assert (losses[0] != losses[1]).all()


def test_another_array_of_a_file_is_another_teacher(clips, names, honest, tmp_path):
    path, data = tmp_path / "x.npz", SimpleNamespace(clips=clips)
    np.savez(path, filename=names, logits=honest, other=2 * honest)
    assert LogitsFile(str(path), data, 25).sha256 != LogitsFile(f"{path}:other", data, 25).sha256


def test_a_resumed_run_refuses_another_teacher_and_takes_the_same_from_another_place(student, teacher_file, tmp_path):
    recorded = json.loads((student / "config.json").read_text())["teachers"]
    assert recorded[0]["teacher"] == str(teacher_file) and len(recorded[0]["sha256"]) == 64
    project = Path(shutil.copytree(student.parent, tmp_path / "P"))
    moved = tmp_path / "moved.csv"
    resume = ["--resume", "s", "--project_name", project.name, "--accelerator", "cpu", "--teacher"]
    shutil.copy(teacher_file, moved)
    run_script("train_base.py", *resume, "moved.csv", cwd=tmp_path).succeeded()
    moved.write_text(moved.read_text() + "\n")
    run_script("train_base.py", *resume, "moved.csv", cwd=tmp_path).refused("moved.csv", "began with other contents")
    run_script("train_base.py", *resume, "", cwd=tmp_path).refused("--teacher (none)", str(teacher_file))


def test_a_file_that_does_not_fit_is_refused_before_the_run_begins(student, taught, honest, names, tmp_path):
    path = as_csv(tmp_path / "bad.csv", names, honest[::-1])
    said = run_script("train_base.py", *taught[:-1], path, "--project_name", "P", cwd=tmp_path)
    said.refused("--teacher", "bad.csv", "right on", "in another order")
    run_script("train_base.py", *taught, "--teacher_input", "live", "--project_name", "P", cwd=tmp_path).refused("live")
    assert not (tmp_path / "P").exists()


# Runs and packages


PREDICT = """
import torch
from . import data
SCENES = {scenes}
def predict(file_paths, device_ids, model_file_path=None, batch_size=64):
    print("loading", device_ids)
    assert all(path.endswith(f"-{{device}}.wav") for path, device in zip(file_paths, device_ids))
    return [torch.eye(10)[SCENES.index(path.split("/")[-1].split("-")[0])] for path in file_paths], SCENES
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """The module of a package whose predict() is right, with the scenes in an order of its own."""
    folder = tmp_path / "Doe_Uni" / "Doe_Uni_task1"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "data.py"):
        (folder / name).touch()
    path = folder / "Doe_Uni_task1_1.py"
    path.write_text(PREDICT.format(scenes=list(SCENES[::-1])))
    return path


def teacher_of(module: Path, folder: Path) -> Package:
    return Package(str(module), module, folder)


def test_a_package_is_called_once_and_kept(package, clips, tmp_path):
    data = TAU22(clips, Sound(RATE))
    logits = teacher_of(package, tmp_path / "kept").logits(data, MachineConfig())
    assert torch.equal(logits.argmax(1), torch.from_numpy(clips.scene))
    text = package.read_text()
    package.write_text(text.replace("return [", "raise OSError; return ["))
    assert "failed" in refusal(teacher_of(package, tmp_path / "kept").logits, data, MachineConfig())
    package.write_text(text)
    teacher_of(package, tmp_path / "kept").logits(data, MachineConfig())
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_package_is_found_by_file_folder_and_module(package, tmp_path, monkeypatch):
    assert {find_package(str(place)) for place in (package, package.parent, package.parent.parent)} == {package}
    monkeypatch.syspath_prepend(package.parent.parent)
    assert find_package("Doe_Uni_task1.Doe_Uni_task1_1") == package and "Doe_Uni_task1" not in sys.modules
    assert find_package("x7k2m9ab") is None and find_package(str(tmp_path / "kept")) is None
    assert "no installed module" in refusal(find_package, "Roe_Uni_task1.Roe_Uni_task1_1")
    package.with_name("Doe_Uni_task1_2.py").touch()
    assert "holds 2 systems" in refusal(find_package, str(package.parent))


def test_a_run_of_another_project_and_its_package_teach_alike(general_run, learnable, tmp_path):
    checkpoint = load_checkpoint(general_run / "checkpoints" / "best.ckpt")
    checkpoint["config"]["storage"]["weight_bits"] = 16
    submission = Submission(tmp_path / "Doe_Uni", "Doe_Uni", 1)
    write_package(submission, checkpoint, learnable / "split_setup" / "test.csv")
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--n_epochs", 1, "--project_name", "P", "--teacher"]
    names = [general_run / "checkpoints" / "best.ckpt", general_run, submission.folder]
    out = run_script("train_base.py", *args, ",".join(map(str, names)), cwd=tmp_path).succeeded().out
    said = [out.partition(f"teacher {name}: right on ")[2].partition("\n")[0] for name in names]
    assert said[0].endswith("of the 48 training clips") and said[0] == said[1] == said[2]
    files = {path.suffix: path for path in (tmp_path / "P" / "teacher_outputs").iterdir()}
    assert set(files) == {".pt", ".npz"}  # the run's two names are one model
    ours, theirs = torch.load(files[".pt"], weights_only=True), torch.from_numpy(np.load(files[".npz"])["logits"])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)  # 16 bit against 32


def test_a_package_that_fails_leaves_no_run_behind(package, learnable, tmp_path):
    package.write_text(package.read_text().replace("return [", "raise OSError; return ["))
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--project_name", "P", "--teacher", package]
    done = run_script("train_base.py", *args, cwd=tmp_path)  # which shows the package's own traceback
    assert done.code == 2 and "predict() of" in done.error and not list((tmp_path / "P").iterdir())


def test_what_is_no_teacher_is_refused(learnable, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--project_name", "P", "--teacher"]
    for name, why in {
        "./": "neither a run nor a package",
        "a/b": "does not exist",
        "x.ckpt": "no such checkpoint",
    }.items():
        run_script("train_base.py", *args, name, cwd=tmp_path).refused("--teacher", why)
