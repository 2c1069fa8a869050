"""Recordings of one's own: from folders of scenes to a published model, and what a data folder says of its labels."""

import csv
import json
import os
import shutil
from itertools import product

import numpy as np
import pytest
import soundfile
from conftest import FIT, QUIET, RATE, SMALL, only_run, read_results, refusal
from data_folder import write_data_folder

import test_only
import train_base
import train_device_specific
from dcase import adopt, compare, predict, publish, submit
from dcase.adopt import of_folder, split, with_places
from dcase.data.labels import SCENES, TAU22_LABELS, Labels
from dcase.data.tau22 import load_clips, load_splits
from dcase.deployment.prediction import load_module as load_prediction
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
    assert "passed over 1 file that is not <scene>/*.wav, .flac, .mp3 ...: notes.txt" in done.out
    assert f"next: python train_base.py --dataset_dir {tmp_path / 'data'} --model aum_nano" in done.out
    return tmp_path / "data"


def test_from_recordings_to_a_published_model_without_editing_source(data, call_main, tmp_path, monkeypatch):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    given = ["--dataset_dir", data, "--project_name", "P"]
    done = call_main(train_base.main, *given, *SMALL, *FIT, "--report_audio", "False", "--run_id", "own").succeeded()
    best = tmp_path / "P" / "own" / "checkpoints" / "best.ckpt"
    assert "one recording device: stage 2, a model per device, has nothing to add\n" in done.out
    assert done.out.endswith("next: python -m dcase.predict RECORDINGS --ckpt_path P/own/checkpoints/best.ckpt\n")
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


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """Two scenes at four places on two devices, four times each, and a list of them."""
    folder = tmp_path_factory.mktemp("listed")
    rows = ["filename,scene_label,identifier,source_label"]
    for number, scene in enumerate(("quiet hall", "street")):
        for place, device, piece in product("ABCD", ("zoom", "phone"), range(4)):
            name = f"{scene}/{place} {device} {piece}.wav"
            sound(folder / name, 2 * number, len(rows))
            rows.append(f"{name},{scene},{place},{device}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder


def test_a_list_with_two_devices_goes_through_stage_2(two_devices, call_main, tmp_path):
    call_main(adopt.main, two_devices / "list.csv", "--out", "data").succeeded()
    labels = json.loads((tmp_path / "data" / "labels.json").read_text())
    assert labels["devices"] == ["phone", "zoom"] and labels["device_groups"] == {"seen": ["phone", "zoom"]}
    data = ["--dataset_dir", "data", "--project_name", "P"]
    fit = [*FIT, "--n_epochs", "1", "--report_audio", "False"]
    done = call_main(train_base.main, *data, *SMALL, *fit, "--run_id", "own").succeeded()
    assert "next: python train_device_specific.py --ckpt_id own" in done.out
    given = ["--ckpt_id", "own", *data, *ON_CPU, "--n_epochs", "1", "--run_id"]
    call_main(train_device_specific.main, *given, "x", "--only_devices", "a").refused("known devices are phone,zoom")
    call_main(train_device_specific.main, *given, "tuned", "--keep", "all").succeeded()
    best = tmp_path / "P" / "tuned" / "checkpoints" / "best.ckpt"
    assert list(load_prediction(best).device_models) == ["phone", "zoom"]
    assert "Quiet Hall" in (tmp_path / "P" / "tuned" / "report" / "index.html").read_text()

    labels["scenes"].reverse()
    (tmp_path / "data" / "labels.json").write_text(json.dumps(labels))
    said = "the model was trained on the scenes quiet hall, street; these data have street, quiet hall"
    call_main(test_only.main, "--ckpt_path", best, *data, *ON_CPU).refused(said)
    call_main(train_base.main, *data, "--resume", "own").refused("the run --resume own was trained on the scenes quiet")


def test_places_stay_whole_and_a_device_may_be_new_in_the_test(two_devices, recordings, tmp_path):
    table = with_places(of_folder(recordings, ["own"]))
    assert set(table["identifier"]) == {f"{scene}-{scene}-{i}" for scene in OWN for i in range(4)}
    training, test = split(table, 0.25, "recordings")
    assert len(test) == 20 and not set(test.location) & set(training.location) and set(test.scene) == set(range(5))
    each = table.assign(source_label="d-" + table["identifier"])
    training, test = split(each, 0.25, "x")
    groups = {name: set(devices) for name, devices in training.labels.device_groups.items()}
    heard, new = ({f"d-{place.decode()}" for place in part.location} for part in (training, test))
    assert groups == {"seen": heard, "unseen": new} and training.labels == test.labels

    phones = of_folder(two_devices, ["zoom", "phone"])
    assert phones["source_label"].value_counts().to_dict() == {"zoom": 32, "phone": 32}
    assert set(with_places(phones)["identifier"]) == {f"{s}-{p}" for s in ("quiet hall", "street") for p in "ABCD"}
    assert "which of --devices zoom,camera is it?" in refusal(of_folder, two_devices, ["zoom", "camera"])
    one = table[table["identifier"].str.endswith(("-0", "street-1"))]
    assert "record at one more place" in refusal(split, one, 0.25, "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"scenes": ["x", "y"]}', "it lacks 'devices'"),
        ({"scenes": ["airport", "tram"], "devices": ["a"], "size": 3}, "'size' is not one of scenes, devices"),
        ({"scenes": "airport", "devices": ["a"]}, "scenes are no list of names"),
        ({"scenes": ["airport", "airport"], "devices": ["a"]}, "'airport' is in its scenes twice"),
        ({"scenes": ["airport", "-tram"], "devices": ["a"]}, "'-tram' in its scenes is no name"),
        ({"scenes": ["airport", "tram"], "devices": ["../a"]}, "'../a' in its devices is no name"),
        ({"scenes": ["airport", "tram"], "devices": ["general"]}, "'general' in its devices has a meaning of its own"),
        ({"scenes": [f"x{i}" for i in range(601)], "devices": ["a"]}, "it has 601 scenes, and 600 are the most"),
        ({"scenes": ["airport"], "devices": ["a"]}, "two scenes and one device at least"),
        ({"scenes": ["airport", "a"], "devices": ["a"]}, "'a' is a scene and a device"),
        ({"scenes": ["x", "y"], "devices": ["a"], "device_groups": {"loud": ["a"]}}, "real, seen, unseen"),
        ({"scenes": ["x", "y"], "devices": ["a"], "device_groups": {"seen": ["b"]}}, "the device 'a' must be"),
    ],
)
def test_a_labels_file_that_cannot_be_is_refused(content, said, tmp_path):
    write_data_folder(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "labels.json").write_text(text)
    message = refusal(load_clips, tmp_path, "test")
    assert message.startswith(f"{tmp_path / 'labels.json'}") and said in message


def test_labels_are_the_files_else_tau22s_else_those_of_the_lists(tmp_path):
    write_data_folder(tmp_path)
    assert load_clips(tmp_path, "test").labels is TAU22_LABELS
    labels = {"scenes": ["tram", "airport"], "devices": ["s4", "s1", "a"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    clips = load_clips(tmp_path, "test")
    assert clips.labels == Labels(("tram", "airport"), ("s4", "s1", "a"), {"seen": ("s4", "s1", "a")})
    assert clips.scene.tolist() == [1, 0] and clips.device.tolist() == [0, 0]
    (tmp_path / "labels.json").write_text(json.dumps(labels | {"scenes": ["tram", "{bus}"]}))
    message = refusal(load_clips, tmp_path, "test")
    assert "meta.csv, line 2: unknown scene 'airport' (scene_label), not one of tram, {bus}" in message
    labels = {"scenes": ["tram", "airport"], "devices": ["A", "a"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    assert "is in its devices twice" in refusal(load_clips, tmp_path, "test")
    (tmp_path / "labels.json").unlink()
    for path in (tmp_path / "meta.csv", *(tmp_path / "split_setup").iterdir()):
        path.write_text(path.read_text().replace("\tairport", "\toffice").replace("\ttram", "\tkitchen"))
    for clips in load_splits(tmp_path, "split25", "test"):
        assert clips.labels == Labels(
            ("kitchen", "office"), ("a", "s1", "s4"), {"seen": ("a", "s1"), "unseen": ("s4",)}
        )
        assert {clips.labels.scenes[i] for i in clips.scene} == {"kitchen", "office"}
    assert "split5.csv is missing (there is split25.csv, test.csv)" in refusal(load_clips, tmp_path, "split5")


def test_a_number_means_the_same_device_where_files_are_left_out(tmp_path):
    (tmp_path / "split_setup").mkdir()
    rows = [f"audio/{scene}-{device}.wav\t{scene}\tx\t{device}\n" for scene in SCENES for device in ("alpha", "beta")]
    head = "filename\tscene_label\tidentifier\tsource_label\n"
    (tmp_path / "meta.csv").write_text(head + "".join(rows))
    (tmp_path / "meta_clean.csv").write_text(head + "".join(row for row in rows if "beta" in row))
    (tmp_path / "split_setup" / "test.csv").write_text("filename\tscene_label\naudio/bus-beta.wav\tbus\n")
    clips = load_clips(tmp_path, "test")
    assert clips.labels.devices == ("alpha", "beta") and clips.device.tolist() == [1]


def test_a_strange_scene_among_tau22s_is_a_mistake_until_it_is_declared(tmp_path):
    (tmp_path / "split_setup").mkdir()
    names = [*SCENES[:9], "tran"]
    rows = [f"audio/{i}.wav\t{scene}" for i, scene in enumerate(names)]
    (tmp_path / "meta.csv").write_text(
        "filename\tscene_label\tidentifier\tsource_label\n" + "".join(f"{row}\tx\ta\n" for row in rows)
    )
    (tmp_path / "split_setup" / "test.csv").write_text("\n".join(["filename\tscene_label", *rows]))
    message = refusal(load_clips, tmp_path, "test")
    assert "meta.csv, line 11: unknown scene 'tran'" in message and "labels.json" in message
    (tmp_path / "labels.json").write_text(json.dumps({"scenes": names, "devices": ["a"]}))
    assert load_clips(tmp_path, "test").labels.scenes == tuple(names)


def test_several_lengths_are_left_to_the_doctor(recordings, call_main, tmp_path):
    shutil.copytree(recordings, tmp_path / "more")
    soundfile.write(tmp_path / "more" / "yard" / "yard-0-9.wav", np.full(RATE, 0.1), RATE)
    done = call_main(adopt.main, "more", "--out", "d").succeeded()
    assert "several lengths" in done.out and "check: python -m dcase.doctor" in done.out and "next:" not in done.out


def test_adopt_refuses_what_it_cannot_do(recordings, two_devices, call_main, tmp_path):
    call_main(adopt.main, recordings).refused("--out DIR")
    call_main(adopt.main, tmp_path / "nowhere", "--out", "x").refused(
        "nowhere is no list of filename, scene_label", "No such file"
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "meta.csv").touch()
    call_main(adopt.main, recordings, "--out", "there").refused("there exists already")
    (tmp_path / "list.csv").write_text("filename,scene\na.wav,street\n")
    call_main(adopt.main, "list.csv", "--out", "x").refused("list.csv is no list of filename, scene_label")
    (tmp_path / "list.csv").write_text(f"filename,scene_label\n{'x' * 300}.wav,street\n")
    call_main(adopt.main, "list.csv", "--out", "x").refused("list.csv is no list of", "name too long")
    os.mkfifo(tmp_path / "fifo.csv")
    call_main(adopt.main, "fifo.csv", "--out", "x").refused("fifo.csv", "FIFO")
    (tmp_path / "list.csv").write_text("filename,scene_label\n../a.wav,street\n")
    call_main(adopt.main, "list.csv", "--out", "x").refused("1 of its 1 files are not in .")
    assert not (tmp_path / "x").exists() and [path.name for path in (tmp_path / "there").iterdir()] == ["meta.csv"]
