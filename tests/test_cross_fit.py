"""--cross_fit: no teacher has heard a clip that it judges; what is left behind; an interruption."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import FIT, RATE, SMALL, assert_same_run, refusal, weights
from forked import run_script
from test_scripts import kill_and_resume

from dcase.data.dataset import TAU22, Sound
from dcase.data.labels import DEVICES, SCENES
from dcase.data.logmel import frames_of
from dcase.data.tau22 import Clips, DataConfig, load_clips, location_folds, split_by_location
from dcase.machine import MachineConfig
from dcase.model.distillation import DistillConfig
from dcase.model.named import ModelConfig
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import BaseConfig
from dcase.runs.stored import save_stored
from dcase.training.lit import SceneClassifier
from dcase.training.pace import Plan, TimeLeft
from dcase.training.teachers import outputs


def made_up(locations_per_scene: int, seed: int = 0) -> Clips:
    """Clips of locations of very different sizes; device a everywhere, the others at some."""
    rng = np.random.default_rng(seed)
    rows = [
        (scene, device, f"city-{scene}-{place}")
        for scene in range(len(SCENES))
        for place in range(locations_per_scene)
        for device in [0] * rng.integers(3, 60) + [rng.integers(1, 6)] * rng.integers(0, 9)
    ]
    scene, device, location = zip(*rows, strict=True)
    names = np.array([f"audio/{i}.wav".encode() for i in range(len(rows))])
    return Clips(Path("."), names, np.array(scene), np.array(device), np.array([x.encode() for x in location]))


def test_folds_have_whole_locations_and_a_share_of_every_scene_and_device():
    clips = made_up(30)
    folds = location_folds(clips, 5)
    assert all(len(set(folds[clips.location == place])) == 1 for place in set(clips.location.tolist()))
    for column, names in ((clips.scene, SCENES), (clips.device, DEVICES[:6])):
        for i in range(len(names)):
            counts = np.bincount(folds[column == i], minlength=5)
            assert counts.min() > 0.15 * counts.sum() and counts.max() < 0.25 * counts.sum(), (names[i], counts)
    order = np.random.default_rng(1).permutation(len(clips))
    assert np.array_equal(location_folds(clips.select(order), 5), folds[order])


def test_a_scene_of_one_place_cannot_be_cross_fitted():
    said = refusal(location_folds, made_up(1), 3)
    assert SCENES[0] in said and "too few recording locations" in said
    assert "--cross_fit 25" in refusal(location_folds, made_up(2), 25)


@pytest.mark.parametrize(
    "wrong", [{"cross_fit": 1}, {"cross_fit": -1}, {"cross_fit": 3, "init_from": "x"}, "live"], ids=str
)
def test_what_cannot_be_cross_fitted_names_the_flag(wrong):
    wrong = {"cross_fit": 2, "distill": DistillConfig(teacher_input="live")} if wrong == "live" else wrong
    assert "--cross_fit" in refusal(lambda: BaseConfig(**wrong))


def test_the_time_left_knows_of_the_teachers_before_and_after(monkeypatch):
    monkeypatch.setenv("DCASE_FURTHER_RUNS", "2")
    teacher, student = Plan(10, 100), Plan(10, 200)
    left = TimeLeft(teacher, later=[student], earlier=[teacher])
    left._first.extend([1.0] * 20)
    left._others.extend([1.0] * 20)
    assert left.of_run(1, 0) == pytest.approx(3000)
    assert "50 min left, 3.1 h with the seeds after it" in left.in_words(1, 0)  # 3000 s + 2 x 4000 s


# The script


def run(data: Path, cwd: Path, *more) -> Path:
    args = ["--dataset_dir", data, *SMALL, *FIT, "--cross_fit", 2, *more]
    out = run_script("train_base.py", *args, "--project_name", "P", "--run_id", "s", cwd=cwd).succeeded().out
    assert "teacher 1 of 2: training on 24 clips from 4 locations" in out and "logits.npz: right on " in out
    return cwd / "P" / "s"


@pytest.fixture(scope="module")
def student(learnable, tmp_path_factory) -> Path:
    return run(learnable, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def parts(learnable) -> tuple[Clips, Clips, np.ndarray]:
    """(training clips, validation clips, fold of each training clip)"""
    train, val = split_by_location(load_clips(learnable, "split25"), 0.34)
    return train, val, location_folds(train, 2)


def test_every_logit_is_of_the_teacher_that_has_not_heard_the_location(student, parts):
    train, val, folds = parts
    found = np.load(student / "cross_fit" / "logits.npz")
    rows = {name: row for row, name in enumerate(found["filename"].tolist())}
    assert len(rows) == len(train) + len(val) and found["scenes"].tolist() == list(SCENES)
    of_val = []
    for fold in range(2):
        checkpoint = load_checkpoint(student / "cross_fit" / f"fold_{fold + 1}" / "last.ckpt")
        heard, unheard = train.select(folds != fold), train.select(folds == fold)
        assert not set(heard.location.tolist()) & set([*unheard.location.tolist(), *val.location.tolist()])
        assert checkpoint["clips_id"] == f"{heard.fingerprint()}-none"
        teacher = SceneClassifier.from_checkpoint(checkpoint).eval()
        for clips in (unheard, val):
            logits = outputs(teacher, TAU22(clips, Sound(RATE)), MachineConfig(accelerator="cpu", num_workers=0), "")
            place = [rows[clips.name(i)] for i in range(len(clips))]
            if clips is unheard:
                np.testing.assert_allclose(found["logits"][place], logits.numpy(), atol=1e-4)
                assert (found["fold"][place] == fold + 1).all()
            else:
                of_val.append(logits.softmax(1).numpy())
                assert (found["fold"][place] == 0).all()
    np.testing.assert_allclose(np.exp(found["logits"][place]), np.mean(of_val, 0), atol=1e-4)


def test_the_sound_of_a_location_does_not_reach_the_teacher_that_judges_it(student, learnable, parts, tmp_path):
    """Whatever is heard there, that teacher's weights stay the same, bit for bit, its normalisation too."""
    train, val, folds = parts
    data = Path(shutil.copytree(learnable, tmp_path / "data"))
    changed = [train.name(i) for i in np.flatnonzero(folds == 0)] + [val.name(i) for i in range(len(val))]
    for name in changed:
        samples, rate = soundfile.read(data / name)
        soundfile.write(data / name, 0.5 * samples[::-1], rate, subtype="PCM_16")
    other = run(data, tmp_path, "--n_epochs", 4)
    first, second = (
        [weights(folder / "cross_fit" / f"fold_{k}" / "last.ckpt") for folder in (student, other)] for k in (1, 2)
    )
    assert first[0].keys() == first[1].keys()
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())
    assert not all(torch.equal(value, second[1][name]) for name, value in second[0].items())


def test_killed_and_resumed_equals_undisturbed(student, learnable, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--cross_fit", 2]
    killed = kill_and_resume("train_base.py", args, tmp_path / "P", "cross_fit/fold_2/last.ckpt", 0.1)
    assert_same_run(killed, student)
    first, second = (np.load(folder / "cross_fit" / "logits.npz")["logits"] for folder in (killed, student))
    assert np.array_equal(first, second)


def test_teachers_do_not_start_from_a_run_which_may_have_heard_the_clips(student, learnable, tmp_path):
    checkpoint = student / "checkpoints/best.ckpt"
    save_stored(load_checkpoint(checkpoint), tmp_path / "stored", 16)
    for file in (checkpoint, tmp_path / "stored" / "general.safetensors"):
        args = ["--dataset_dir", learnable, *SMALL, *FIT, "--cross_fit", 2, "--pretrained", file]
        run_script("train_base.py", *args, "--project_name", "P", cwd=tmp_path).refused("--cross_fit and --pretrained")
    assert not (tmp_path / "P").is_dir()  # refused before the run begins


def test_other_clips_than_a_teacher_judged_are_refused(student, learnable, tmp_path):
    """Where the run was interrupted after its first teacher, and a clip is another one now."""
    interrupted = Path(shutil.copytree(student, tmp_path / "P" / "s"))
    for left in ("results.json", "cross_fit/logits.npz"):
        (interrupted / left).unlink()
    file = interrupted / "cross_fit" / "fold_1" / "outputs.pt"
    kept = torch.load(file, weights_only=True)
    torch.save(kept | {"clips": ["another", *kept["clips"][1:]]}, file)
    args = ["--resume", "s", "--project_name", "P", "--dataset_dir", learnable]
    run_script("train_base.py", *args, cwd=tmp_path).refused("judged other clips")


def test_a_teachers_logits_do_not_depend_on_the_clips_beside_them(learnable, parts):
    """BatchNorm and dropout are in evaluation mode, whatever mode training has left the model in."""
    shape = {"depth": 1, "embed_dim": 16, "head": "patch", "cls_position": "none"}
    config = BaseConfig(model=ModelConfig("aum_tiny", **shape), data=DataConfig(orig_sample_rate=RATE))
    clips = TAU22(parts[0], Sound(RATE))
    teacher = SceneClassifier(config, frames_of(config.logmel, clips.n_samples, RATE)).train()
    every, two = (
        outputs(teacher.train(), TAU22(parts[0].select(np.arange(n)), Sound(RATE)), MachineConfig(num_workers=0), "")
        for n in (len(clips), 2)
    )
    assert torch.allclose(every[:2], two, atol=1e-5)


def test_a_later_run_on_every_clip_takes_the_file(student, learnable, tmp_path):
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--val_fraction", 0, "--n_epochs", 1, "--project_name", "P"]
    file = student / "cross_fit" / "logits.npz"
    out = run_script("train_base.py", *args, "--teacher", file, cwd=tmp_path).succeeded().out
    assert " of the 72 training clips" in out
