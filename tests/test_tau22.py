"""Lists, splits and sound files of a data folder: what is read, and the one line that each mistake ends in."""

import dataclasses
import hashlib
import io
import os
import shutil
import tempfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from data_folder import META_COLUMNS, write_data_folder, write_list

from dcase.data import tau22
from dcase.data.loading import find_source
from dcase.data.tau22 import DEVICES, SCENES, Clips, DataConfig, SplitConfig, check_files, load_clips, split_by_location


@pytest.fixture
def folder(tmp_path):
    write_data_folder(tmp_path)
    return tmp_path


@pytest.fixture
def clips(folder):
    return load_clips(folder, "split25")


def arrays(clips: Clips) -> list[list]:
    return [getattr(clips, name).tolist() for name in ("filenames", "scene", "device", "location")]


def edit(path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count), newline="")


# Lists that are right


def test_clips_follow_the_split_list(clips, folder):
    assert len(clips) == 16 and clips.name(1) == "audio/airport-lisbon-101-1010-0-s1.wav"
    assert clips.path(1) == folder / clips.name(1)
    assert [SCENES[i] for i in clips.scene] == ["airport"] * 8 + ["tram"] * 8
    assert [DEVICES[i] for i in clips.device] == ["a", "s1"] * 8
    assert clips.location[[0, 4, 8]].tolist() == [b"lisbon-101", b"lisbon-102", b"lisbon-201"]
    assert clips.scene.dtype == clips.device.dtype == np.int64 and clips.filenames.dtype.kind == "S"
    path = folder / "split_setup" / "split25.csv"  # its order counts, not meta.csv's
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    assert load_clips(folder, "split25").name(0) == rows[-1].split("\t")[0]


@pytest.mark.parametrize(
    "old, new", [(b"\n", b"\r\n"), (b"filename", b"\xef\xbb\xbffilename"), (b"", b"\n\n"), (b"\n", b"")]
)
def test_line_ends_and_a_byte_order_mark_do_not_matter(folder, clips, old, new):
    for path in (folder / "meta.csv", folder / "split_setup" / "split25.csv"):
        data = path.read_bytes()
        if new in (b"", b"\n\n"):  # no line end, or blank lines, at the end
            path.write_bytes(data.removesuffix(old) + new)
        else:
            path.write_bytes(data.replace(old, new))
    assert arrays(load_clips(folder, "split25")) == arrays(clips)


def test_select_and_of_device(clips):
    assert arrays(clips.select([2, 0]))[0] == [clips.filenames[2], clips.filenames[0]]
    assert len(clips.select(clips.scene == 0)) == 8 and len(clips.select([])) == 0
    on_s1 = clips.of_device("s1")
    assert len(on_s1) == 8 and set(on_s1.device) == {DEVICES.index("s1")} and len(clips.of_device("b")) == 0


def test_is_tau22_knows_the_test_list_and_the_stand_in(folder, monkeypatch):
    test_list = folder / "split_setup" / "test.csv"
    assert not tau22.is_tau22(folder)
    monkeypatch.setattr(tau22, "_TEST_SHA256", hashlib.sha256(test_list.read_bytes()).hexdigest())
    assert tau22.is_tau22(folder)
    test_list.write_bytes(test_list.read_bytes().replace(b"\n", b"\r\n"))
    assert tau22.is_tau22(folder)
    (folder / "SYNTHETIC.md").touch()
    assert not tau22.is_tau22(folder)
    assert not tau22.is_tau22(folder / "nowhere")


# meta_clean.csv


def keep_in_meta_clean(folder, leave_out: str) -> None:
    lines = (folder / "meta.csv").read_text().splitlines(keepends=True)
    (folder / "meta_clean.csv").write_text("".join(line for line in lines if leave_out not in line))


@pytest.mark.parametrize("meta", [True, False])
def test_meta_clean_leaves_clips_out_and_says_so(meta, folder, clips, capsys):
    keep_in_meta_clean(folder, "tram-lisbon-201")
    (folder / "audio" / "tram-lisbon-201-2010-0-a.wav").unlink()  # what is left out may be missing
    if not meta:
        (folder / "meta.csv").unlink()
    left = load_clips(folder, "split25")
    assert arrays(left) == arrays(clips.select(clips.location != b"lisbon-201"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "meta_clean.csv leaves out 4 of the 16 clips of split25" in said
    assert "WARNING" not in said


def test_meta_clean_is_loud_only_about_test_clips_that_are_left_out(folder, capsys):
    keep_in_meta_clean(folder, "nothing")
    assert len(load_clips(folder, "test")) == 2 and capsys.readouterr().out == ""
    keep_in_meta_clean(folder, "tram-lyon")
    assert len(load_clips(folder, "test")) == 1
    said = capsys.readouterr().out
    assert said.startswith("WARNING") and "1 of the 2 clips of test" in said and "NOT COMPARABLE" in said


def test_meta_clean_does_not_hide_what_meta_never_had(folder):
    keep_in_meta_clean(folder, "tram-lisbon-201")
    edit(folder / "split_setup" / "split25.csv", "airport-lisbon-101-1010-0-a.wav", "airport-lisbon-101-1010-9-a.wav")
    message = refusal(load_clips, folder, "split25")
    assert "split25.csv, line 2" in message and "1010-9-a.wav' is not in meta.csv" in message and "1 of 16" in message


def test_meta_clean_that_leaves_nothing(folder):
    keep_in_meta_clean(folder, "lyon")
    message = refusal(load_clips, folder, "test")
    assert "meta_clean.csv" in message and "every clip of test" in message and "dcase.prepare" in message


# Lists that are wrong

FIRST = "audio/airport-lisbon-101-1010-0-a.wav"


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("meta.csv", "\t", ",", ["meta.csv is comma-separated", "tab"]),
        ("split_setup/split25.csv", "\t", ",", ["split25.csv is comma-separated", "tab"]),
        ("meta.csv", "source_label", "device", ["meta.csv lacks the column 'source_label'"]),
        ("meta.csv", "filename", "file", ["meta.csv lacks the column 'filename'"]),
        ("split_setup/split25.csv", "scene_label", "scene", ["split25.csv lacks the column 'scene_label'"]),
        ("meta.csv", "0-s1.wav\tairport", "0-s1.wav\tairprot", ["meta.csv, line 3", "unknown scene 'airprot'", "tram"]),
        ("split_setup/split25.csv", "s1.wav\tairport", "s1.wav\tAirport", ["split25.csv, line 3", "scene 'Airport'"]),
        ("meta.csv", "lisbon-101\ts1", "lisbon-101\tS1", ["meta.csv, line 3", "unknown device 'S1'", "s6"]),
        ("meta.csv", "lisbon-101\ts1", "\ts1", ["meta.csv, line 3", "identifier is empty"]),
        ("meta.csv", "lisbon-101\ts1", "lisbon-101", ["meta.csv, line 3", "source_label is empty"]),
        ("meta.csv", "101-1010-0-s1", "101-1010-0-a", ["meta.csv, line 3", FIRST, "second time"]),
        ("split_setup/split25.csv", "101-1010-0-s1", "101-1010-0-a", ["split25.csv, line 3", FIRST, "second time"]),
        ("split_setup/split25.csv", "0-s1.wav\tairport", "0-s1.wav\ttram", ["split25.csv, line 3", "another scene"]),
        ("split_setup/split25.csv", "0-s1.wav\tairport", "0-s1.wav\tairport\tx\ty", ["split25.csv", "line 3"]),
        ("split_setup/split25.csv", "0-a.wav\tairport", "0-a.wav\tairport\tx", ["split25.csv", "tab-separated"]),
        ("split_setup/split25.csv", "\naudio", "\n\n\n../audio", ["split25.csv, line 4", "leaves the data folder"]),
    ],
)
def test_mistake_in_a_list(folder, file, old, new, expected):
    edit(folder / file, old, new, count=-1 if new == "," else 1)
    message = refusal(load_clips, folder, "split25")
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    "name",
    "/etc/passwd ../a.wav audio/../../a.wav audio/.. C:/a.wav C:a.wav audio\\a.wav audio/a\0.wav".split(" "),
)
@pytest.mark.parametrize("file", ["meta.csv", "split_setup/split25.csv"])
def test_name_that_leaves_the_folder(folder, file, name):
    edit(folder / file, FIRST, name)
    message = refusal(load_clips, folder, "split25")
    assert f"{folder / file}, line 2" in message and "leaves the data folder" in message


def test_dots_inside_a_name_are_fine(folder):
    for file in ("meta.csv", "split_setup/split25.csv"):
        edit(folder / file, FIRST, "audio/a..b...wav")
    os.rename(folder / FIRST, folder / "audio/a..b...wav")
    assert load_clips(folder, "split25").name(0) == "audio/a..b...wav"


@pytest.mark.parametrize("content", [b"", b"\n", b"filename\tscene_label\n", b"filename\tscene_label\r\n\r\n"])
def test_empty_split(folder, content):
    (folder / "split_setup" / "split25.csv").write_bytes(content)
    assert f"{folder / 'split_setup' / 'split25.csv'} is empty" in refusal(load_clips, folder, "split25")


def test_list_with_very_many_columns(folder):
    path = folder / "split_setup" / "split25.csv"
    path.write_bytes(path.read_bytes().replace(b"scene_label", b"scene_label" + b"\ty" * 300_000, 1))
    assert f"{path} is no list of clips: its first line has 300,002 columns" in refusal(load_clips, folder, "split25")


@pytest.mark.parametrize("content", [bytes(range(256)), "filename\tscene_label\nä\ttram\n".encode("latin1")])
@pytest.mark.parametrize("file", ["meta.csv", "split_setup/split25.csv"])
def test_list_that_is_no_text(folder, file, content):
    (folder / file).write_bytes(content)
    message = refusal(load_clips, folder, "split25")
    assert str(folder / file) in message and "no tab-separated text" in message


def test_a_scene_that_no_training_clip_is_of(folder, capsys):
    find_source(DataConfig(dataset_dir=str(folder)), 25)
    assert "no training clip" not in capsys.readouterr().out
    path = folder / "split_setup" / "split25.csv"
    path.write_text("".join(row for row in path.read_text().splitlines(keepends=True) if "\ttram" not in row))
    find_source(DataConfig(dataset_dir=str(folder)), 25)
    said = capsys.readouterr().out.splitlines()
    assert said == ["WARNING: no training clip of the scene(s) tram: the test has 1, which cannot be learnt"]
    find_source(DataConfig(dataset_dir=str(folder)))  # a test alone does not know what was trained on
    assert capsys.readouterr().out == ""


def test_split_of_another_data_set(folder):
    rows = [("audio/bus-lyon-1-1-0-a.wav", "bus"), ("audio/bus-lyon-1-1-1-a.wav", "bus")]
    write_list(folder / "split_setup" / "split5.csv", META_COLUMNS[:2], rows)
    message = refusal(load_clips, folder, "split5")
    assert "split5.csv, line 2" in message and "not in meta.csv (as 2 of 2 are)" in message


def test_files_missing_on_disk(folder, clips):
    for path in map(clips.path, (0, 1, 2, 3)):
        path.unlink()
    message = refusal(check_files, clips)
    assert "4 of these 16 clips are not in" in message and FIRST in message
    assert clips.name(3) not in message  # the first three only
    assert "audio.*.zip" in message and f"dcase.prepare --dataset_dir {folder}" in message
    check_files(load_clips(folder, "test"))  # other clips may be missing
    os.rename(folder / "audio", folder / "elsewhere")
    hostile = dataclasses.replace(clips, folder=folder / "a b;rm -rf x")
    assert f"dcase.prepare --dataset_dir '{folder}/a b;rm -rf x'`" in refusal(check_files, hostile)
    assert "16 of these 16 clips" in refusal(check_files, clips)


# The folder


def test_folder_that_is_none_or_has_no_meta(folder, tmp_path):
    message = refusal(load_clips, tmp_path / "nowhere", "test")
    assert str(tmp_path / "nowhere") in message and "--dataset_dir" in message and "TAU22_DIR" in message
    assert "is no folder" in refusal(load_clips, folder / "meta.csv", "test")
    (folder / "meta.csv").unlink()
    message = refusal(load_clips, folder, "test")
    assert f"{folder / 'meta.csv'} is missing" in message and "meta.zip" in message and "dcase.adopt" in message


def test_folder_one_level_too_high(tmp_path):
    inner = tmp_path / "TAU-urban-acoustic-scenes-2022-mobile-development"
    inner.mkdir()
    write_data_folder(inner)
    assert f"--dataset_dir {inner}" in refusal(load_clips, tmp_path, "test")


@pytest.fixture
def open_folder():
    """A data folder that every user may read: pytest's own temporary folders are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        write_data_folder(Path(name))
        yield Path(name)


@pytest.mark.parametrize("locked", [".", "meta.csv", "split_setup/test.csv", "audio"])
def test_locked_path_as_an_ordinary_user(open_folder, locked):
    path = open_folder / locked
    mode = path.stat().st_mode
    os.chmod(path, 0)
    message = as_nobody(lambda: refusal(lambda: check_files(load_clips(open_folder, "test"))))
    os.chmod(path, mode)
    assert str(path) in message and "cannot be read (Permission denied)" in message


def as_nobody(call) -> str:
    """What ``call`` returns without root's rights, which are given up in a process of its own."""
    if os.geteuid() != 0:
        return call()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, call().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


# A split list that is not there


@pytest.fixture
def release(monkeypatch):
    """Answers of the DCASE baseline's release: set ``release.answer`` to bytes or to an error; calls are noted."""

    class Release:
        answer: bytes | Exception = b""
        asked: list = []

    def urlopen(address, timeout):
        Release.asked = [*Release.asked, (address, timeout)]
        if isinstance(Release.answer, Exception):
            raise Release.answer
        return io.BytesIO(Release.answer)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return Release


ADDRESS = "https://github.com/CPJKU/dcase2024_task1_baseline/releases/download/files/split10.csv"


def test_missing_split_is_fetched_once(folder, release, clips, capsys):
    release.answer = (folder / "split_setup" / "split25.csv").read_bytes().replace(b"\n", b"\r\n")
    shutil.rmtree(folder / "split_setup")
    for _ in range(2):
        assert arrays(load_clips(folder, "split10")) == arrays(clips)
    assert (folder / "split_setup" / "split10.csv").read_bytes() == release.answer
    assert capsys.readouterr().out.count(f"fetched from {ADDRESS}") == 1 and release.asked == [(ADDRESS, 20)]


@pytest.mark.parametrize(
    "answer", [urllib.error.URLError("no network"), TimeoutError("timed out"), b"<html>\nnot found\n</html>", b""]
)
def test_split_that_cannot_be_fetched(folder, release, answer):
    release.answer = answer
    message = refusal(load_clips, folder, "split10")
    assert str(folder / "split_setup" / "split10.csv") in message and ADDRESS in message and "by hand" in message
    assert sorted(os.listdir(folder / "split_setup")) == ["split25.csv", "test.csv"]


def test_split_that_cannot_be_kept(folder, release, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    release.answer = (folder / "split_setup" / "test.csv").read_bytes()
    monkeypatch.setattr(os, "replace", no_space)
    message = refusal(load_clips, folder, "split10")
    assert "split10.csv cannot be written (No space left on device)" in message
    assert sorted(os.listdir(folder / "split_setup")) == ["split25.csv", "test.csv"]


# Validation part


def many_clips(n_places: int = 30) -> Clips:
    """Places of 20 to 80 clips, most on device a, the others here and there: TAU22's proportions, all scenes."""
    rng = np.random.default_rng(5)
    scene, device, location = [], [], []
    for number, name in enumerate(SCENES):
        for place in range(n_places):
            devices = [0] * int(rng.integers(2, 7)) + [int(d) for d in range(1, 6) if rng.random() < 0.4]
            scene += [number] * 10 * len(devices)
            device += [d for d in devices for _ in range(10)]
            location += [f"{name}-{place}".encode()] * 10 * len(devices)
    names = [b"%d.wav" % i for i in range(len(scene))]
    return Clips("", np.array(names), np.array(scene), np.array(device), np.array(location))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_split_is_by_location_and_takes_its_share_of_every_scene_and_device(fraction):
    clips = many_clips()
    train, val = split_by_location(clips, fraction)
    assert not set(train.location) & set(val.location)
    assert sorted([*train.filenames, *val.filenames]) == sorted(clips.filenames)
    shares = [(val.scene == i).sum() / (clips.scene == i).sum() for i in range(len(SCENES))]
    assert min(shares) > fraction - 0.02 and max(shares) < fraction + 0.02  # a place is 0.6 to 4 % of a scene
    shares = [(val.device == i).sum() / (clips.device == i).sum() for i in range(6)]
    assert min(shares) > fraction - 0.03 and max(shares) < fraction + 0.03


def test_split_ignores_the_order_of_clips_and_any_seed():
    clips = many_clips(10)
    _, val = split_by_location(clips, 0.1)
    assert val.fingerprint() == "ba50f2a6e8f51acb"  # of the very clips that runs made before were validated on
    np.random.seed(1)
    order = np.random.default_rng(0).permutation(len(clips))
    _, again = split_by_location(clips.select(order), 0.1)
    assert set(again.filenames) == set(val.filenames)


def test_split_favours_no_city():
    """In alphabetical order, the held-out places would all be Barcelona's."""
    places = [f"{city}-{number}".encode() for city in ("barcelona", "lisbon", "vienna") for number in range(20)]
    location = np.repeat(places, 10)
    zeros = np.zeros(len(location), dtype=int)
    _, val = split_by_location(Clips("", location, zeros, zeros, location), 0.2)
    assert {place.split(b"-")[0] for place in val.location} == {b"barcelona", b"lisbon", b"vienna"}


@pytest.mark.parametrize("fraction, smaller", [(0.01, 1), (0.99, 0)])
def test_split_leaves_a_place_of_each_scene_on_both_sides(clips, fraction, smaller):
    parts = split_by_location(clips, fraction)
    assert len(set(parts[smaller].location)) == 2
    assert all(set(part.scene) == set(clips.scene) for part in parts)


def test_place_of_two_scenes_stays_whole():
    """A location heard in two scenes (a station's hall and its shops) must not be in both parts."""
    clips = many_clips(8)
    location = np.char.replace(clips.location, b"metro_station", b"shopping_mall")
    clips = Clips("", clips.filenames, clips.scene, clips.device, location)
    train, val = split_by_location(clips, 0.2)
    assert not set(train.location) & set(val.location)
    assert set(train.scene) == set(val.scene) == set(range(len(SCENES)))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_split_fraction_out_of_range(clips, fraction):
    assert "--val_fraction" in refusal(split_by_location, clips, fraction)


def test_split_of_a_scene_with_one_place(clips):
    message = refusal(split_by_location, clips.select(clips.location != b"lisbon-201"), 0.1)
    assert "tram has too few recording locations" in message and "clips of one more (meta.csv's identifier)" in message
    assert "--val_fraction 0" in message


def test_split_that_no_choice_of_places_allows():
    """Three scenes that share three places in pairs: one place held out for each would leave one scene without any."""
    location = np.array([b"x", b"y", b"y", b"z", b"z", b"x"])
    clips = Clips("", np.array([b"%d" % i for i in range(6)]), np.array([0, 0, 1, 1, 2, 2]), np.zeros(6, int), location)
    assert "--val_fraction 0" in refusal(split_by_location, clips, 0.5)


# Configuration


@pytest.mark.parametrize(
    "config, flag, value, expected",
    [
        (SplitConfig, "subset", 30, "is 5, 10, 25, 50 or 100 (percent); got 30"),
        (SplitConfig, "val_fraction", 1.0, "is at least 0 and less than 1; got 1.0"),
        (SplitConfig, "val_fraction", -0.1, "is at least 0"),
        (SplitConfig, "val_fraction", float("nan"), "is at least 0"),
        (DataConfig, "orig_sample_rate", 0, "must be at least 1"),
    ],
)
def test_configuration_refused(config, flag, value, expected):
    assert f"--{flag} {expected}" in refusal(lambda: config(**{flag: value}))


def test_defaults_of_the_users_document():
    assert (DataConfig().orig_sample_rate, SplitConfig().subset, SplitConfig().val_fraction) == (None, 25, 0.1)


def test_fingerprint_tells_sets_of_clips_apart(clips):
    assert clips.fingerprint() == clips.select(range(len(clips))).fingerprint()
    assert len({clips.select(rows).fingerprint() for rows in ([0], [1], [0, 1], [1, 0])}) == 4
