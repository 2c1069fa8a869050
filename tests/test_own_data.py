"""Recordings of one's own: from folders of scenes to a published model, and what a data folder says of its labels."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
from conftest import FIT, QUIET, RATE, SMALL, only_run, read_results

import test_only
import train_base
from dcase import adopt, compare, predict, publish, submit
from dcase.report import __main__ as report
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.trained import load_trained

OWN = ("kitchen", "office", "street", "workshop", "yard")
ON_CPU = [*QUIET, "--report_audio", "False"]


def sound(path, scene: int, seed: int):
    rng, time = np.random.default_rng(seed), np.arange(RATE // 2) / RATE
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(2 * np.pi * (300 + 600 * scene) * time * rng.uniform(0.9, 1.1))
    soundfile.write(path, tone + rng.normal(0, 0.05, len(time)), RATE)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five scenes with four recordings each, of four pieces: kitchen/kitchen-2-3.wav."""
    folder = tmp_path_factory.mktemp("own") / "recordings"
    for number, scene in enumerate(OWN):
        for i in range(16):
            sound(folder / scene / f"{scene}-{i // 4}-{i % 4}.wav", number, 16 * number + i)
    (folder / "notes.txt").write_text("no sound")
    return folder


@pytest.fixture
def data(recordings, tmp_path, call_main):
    done = call_main(adopt.main, recordings, "--out", tmp_path / "data").succeeded()
    assert "left out, as no .wav, .flac, .ogg in a scene's folder: 1 files" in done.out
    assert f"next: python train_base.py --dataset_dir {tmp_path / 'data'} --model aum_nano" in done.out
    return tmp_path / "data"


def test_from_recordings_to_a_published_model_without_editing_source(data, call_main, tmp_path, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    given = ["--dataset_dir", data, "--project_name", "P"]
    done = call_main(train_base.main, *given, *SMALL, *FIT, "--report_audio", "False", "--run_id", "own").succeeded()
    best = tmp_path / "P" / "own" / "checkpoints" / "best.ckpt"
    end = "one recording device: stage 2, a model per device, has nothing to add\nnext: python -m dcase.predict RECORDINGS"
    assert f"{end} --ckpt_path P/own/checkpoints/best.ckpt" in done.out
    results = read_results(best.parents[1])
    assert list(results["scene_acc"]) == list(OWN) and results["macro_avg_acc"] > 0.4  # chance is 0.2
    assert results["device_acc"].keys() == {"own"} and results["device_group_acc"].keys() == {"seen"}
    assert load_checkpoint(best)["config"]["model"]["n_classes"] == 5

    call_main(test_only.main, "--ckpt_path", best, "--project_name", "T", "--weight_bits", 16, *ON_CPU).succeeded()
    tested = only_run(tmp_path / "T")
    assert read_results(tested)["scene_acc"].keys() == set(OWN)
    call_main(report.main, "own", "--project_name", "P", "--report_audio", "False").succeeded()
    page = (best.parents[1] / "report" / "index.html").read_text()
    assert "Workshop" in page and "Airport" not in page and "simulated" not in page and "in the training data" in page
    assert "kitchen" in call_main(compare.main, "own", "--project_name", "P").succeeded().out
    done = call_main(compare.main, "own", "other", "--project_name", "P")
    assert done.code == 1 and "kitchen" in done.out and "run other: no such run" in done.out
    call_main(submit.main, "--ckpt_path", best, "--label", "Doe_Uni").refused("TAU22's ten scenes")

    call_main(publish.main, "--ckpt_path", tested / "stored", "--out", "published").succeeded()
    street = shutil.copy(data / "audio" / "street" / "street-0-0.wav", tmp_path / "clip.wav")
    shutil.rmtree(data)
    shutil.rmtree(tmp_path / "P")
    shutil.rmtree(tmp_path / "T")
    assert load_trained("published")["scenes"] == list(OWN)
    call_main(predict.main, street, "--ckpt_path", "published", "--out", "s.csv", "--accelerator", "cpu").succeeded()
    (row,) = csv.DictReader(open(tmp_path / "s.csv"))
    assert row.keys() > set(OWN) and sum(float(row[scene]) for scene in OWN) == pytest.approx(1)
    call_main(predict.main, street, "--ckpt_path", "published", "--device_id", "a").refused("unknown, or one of own")
