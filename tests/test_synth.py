"""SynthTAU: TAU22's layout, the same bytes every time, and a default folder that survives what happens to folders."""

import hashlib
import multiprocessing
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import refusal

from dcase import synth as command
from dcase.data import synth
from dcase.data.labels import DEVICES, SCENES, TRAIN_DEVICES
from dcase.data.tau22 import load_clips

NAME = re.compile(r"audio/([a-z_]+)-([a-z]+)-(\d+)-(\d+)-(\d)-(\w+)\.wav")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "data"
    return synth.make(out, train_clips=40, test_clips_per_device=10, num_workers=2)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_is_tau22s(folder):
    meta = read(folder / "meta.csv")
    assert list(meta.columns) == ["filename", "scene_label", "identifier", "source_label"]
    assert meta.filename.is_unique
    assert set(meta.filename) == {f"audio/{path.name}" for path in (folder / "audio").iterdir()}
    for row in meta.itertuples():
        scene, city, location, _, _, device_id = NAME.fullmatch(row.filename).groups()
        assert (scene, f"{city}-{location}", device_id) == (row.scene_label, row.identifier, row.source_label)
    by_location = meta.groupby(meta.identifier.str.split("-").str[1])
    assert by_location.scene_label.nunique().max() == by_location.identifier.nunique().max() == 1
    text = (folder / "SYNTHETIC.md").read_text()
    assert "--train_clips 40" in text and "--seed 0" in text and "comparable with TAU22" in text


def test_lists_are_nested_and_balanced(folder):
    lists = {path.stem: read(path) for path in (folder / "split_setup").iterdir()}
    lengths = {name: len(rows) for name, rows in lists.items()}
    assert lengths == {"split5": 8, "split10": 16, "split25": 40, "test": 90}
    assert set(lists["split5"].filename) < set(lists["split10"].filename) < set(lists["split25"].filename)
    assert not set(lists["test"].filename) & set(lists["split25"].filename)
    for name in ("split25", "test"):
        assert set(Counter(lists[name].scene_label).values()) == {lengths[name] // len(SCENES)}


def test_larger_subsets_and_the_same_bytes_whatever_else_is_made(tmp_path, folder):
    larger = synth.make(tmp_path / "d", train_clips=10, test_clips_per_device=10, largest_subset=100, num_workers=0)
    lengths = {path.stem: len(read(path)) for path in (larger / "split_setup").iterdir()}
    assert lengths == {"split5": 2, "split10": 4, "split25": 10, "split50": 20, "split100": 40, "test": 90}
    ours, theirs = digests(folder), digests(larger)
    clips = [name for name in ours if name.startswith("audio/")]
    assert len(clips) == 40 + 90 and all(ours[name] == theirs[name] for name in clips)  # by other processes, too


def test_devices_are_imbalanced_in_training_and_balanced_in_test(folder):
    devices = Counter(name.device_id for name in synth.names_for_train(1800))
    assert set(devices) == set(TRAIN_DEVICES)
    assert 0.70 < devices["a"] / 1800 < 0.76
    others = [devices[device_id] for device_id in TRAIN_DEVICES[1:]]
    assert max(others) < 1.2 * min(others)
    meta = read(folder / "meta.csv").set_index("filename")
    test = meta.loc[read(folder / "split_setup" / "test.csv").filename]
    assert set(Counter(zip(test.scene_label, test.source_label, strict=True)).values()) == {1}
    assert set(test.source_label) == set(DEVICES)
    assert set(meta.drop(test.index).source_label) == set(TRAIN_DEVICES)
    assert not set(test.identifier) & set(meta.drop(test.index).identifier)


def test_locations_and_segments_hold_several_clips():
    names = list(synth.names_for_train(1800))
    assert min(Counter((name.location, name.segment) for name in names).values()) == synth.TRAIN_PIECES > 1
    segments = Counter(location for location, _ in {(name.location, name.segment) for name in names})
    assert len(segments) == synth.TRAIN_LOCATIONS * len(SCENES) and min(segments.values()) > 1
    assert len({name.filename for name in names}) == 1800


def test_clips_are_sound(folder):
    for path in (folder / "audio").iterdir():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (44100, 1, 44100, "PCM_24")
        wave, _ = soundfile.read(path)
        assert np.isfinite(wave).all() and np.abs(wave).max() < 1
        assert wave.reshape(10, -1).std(axis=1).min() > 1e-5  # no silence, not for a tenth of a second
        assert path.stat().st_size == synth.WAV_BYTES


def test_clips_are_as_loud_as_tau22s():
    """About -26 dB full scale on average; a metro and a street with traffic are far louder than a park."""
    levels = {}
    for name in synth.names_on_a(60, 1, 6, 0, 0):
        wave = synth.record(synth.scene_spectrum(name, 0), name, 0)
        levels.setdefault(name.scene, []).append(20 * np.log10(wave.std()))
    scenes = {scene: np.mean(of_scene) for scene, of_scene in levels.items()}
    assert -29 < np.mean(list(scenes.values())) < -24, scenes
    assert min(scenes["metro"], scenes["street_traffic"]) > scenes["park"] + 8, scenes


def test_a_location_keeps_its_loudness_however_reverberant(monkeypatch):
    loudness, reverberation, _, layers = synth.SCENE_MIXES["metro_station"]
    levels = []
    for wet in (-40, 0, 20):
        monkeypatch.setitem(synth.SCENE_MIXES, "metro_station", (loudness, reverberation, (wet, wet), layers))
        synth.room.cache_clear()
        power = np.mean([np.abs(synth.room("metro_station", place, 0)[:2000]) ** 2 for place in range(40)])
        levels.append(10 * np.log10(power))
    synth.room.cache_clear()
    assert np.ptp(levels) < 1.5, levels  # dB
    assert np.mean(levels) == pytest.approx(loudness, abs=2)


def test_seed_changes_the_sound(folder):
    name = next(synth.names_for_train(1))
    waves = [synth.record(synth.scene_spectrum(name, seed), name, seed) for seed in (0, 1)]
    written = soundfile.read(folder / name.filename)[0]
    assert np.abs(waves[0] - written).max() < 2**-22 and np.abs(waves[1] - written).max() > 1e-3


def test_devices_differ_on_equal_content():
    names = next(synth.names_for_test(10))
    spectrum = synth.scene_spectrum(names[0], seed=0)
    waves = {name.device_id: synth.record(spectrum, name, seed=0) for name in names}
    octaves = np.array_split(np.arange(100, 12800), [100, 300, 700, 1500, 3100, 6300])
    powers = {
        device_id: [10 * np.log10(np.mean(np.abs(np.fft.rfft(wave)[band]) ** 2)) for band in octaves]
        for device_id, wave in waves.items()
    }
    for one in DEVICES:
        for other in DEVICES[: DEVICES.index(one)]:
            assert np.max(np.abs(np.subtract(powers[one], powers[other]))) > 0.5, (one, other)  # dB


def test_compression_reduces_level_differences():
    tone = np.sin(np.arange(synth.SAMPLE_RATE) / 7).astype(np.float32)
    loud, soft = (synth.compress(tone * gain, ratio=2.0).std() for gain in (0.5, 0.05))
    assert loud / soft == pytest.approx(10**0.5, rel=0.05)  # 20 dB in, 10 dB out


def test_every_scene_names_layers_that_exist():
    assert set(synth.SCENE_MIXES) == set(SCENES) and set(synth.RECORDERS) == set(DEVICES)
    for *_, layers in synth.SCENE_MIXES.values():
        assert set(layers) <= set(synth.LAYERS)


def test_every_sound_has_unit_power():
    for kind, (sound, ranges) in synth.LAYERS.items():
        middle = {name: sum(limits) / 2 for name, limits in ranges.items()}
        waves = [sound(synth.generator(kind, k), **middle) for k in range(8)]
        assert {wave.shape for wave in waves} == {(synth.SAMPLE_RATE,)}, kind
        assert 0.4 < np.mean(np.square(waves)) < 2.5, kind


def test_loads_through_tau22(folder):
    train, test = load_clips(folder, "split25"), load_clips(folder, "test")
    assert (len(train), len(test)) == (40, 90)
    assert not set(train.location.tolist()) & set(test.location.tolist())


@pytest.mark.parametrize("flag, value", [("train_clips", 9), ("test_clips_per_device", 0), ("num_workers", -1)])
def test_bad_sizes_name_the_flag(tmp_path, flag, value):
    assert f"--{flag}" in refusal(lambda: synth.make(tmp_path / "d", **{flag: value}))


MAKERS = {
    "--out": lambda out: synth.make(out, train_clips=10, test_clips_per_device=10, num_workers=0),
    "--responses": synth.make_responses,
}


@pytest.mark.parametrize("flag", MAKERS)
def test_a_folder_with_something_in_it_is_left_alone(flag, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert flag in refusal(MAKERS[flag], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flag", MAKERS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), soundfile.LibsndfileError(2)])
def test_a_failure_leaves_nothing_behind(flag, error, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise error

    monkeypatch.setattr(soundfile, "write", full)
    message = refusal(MAKERS[flag], tmp_path / "d")
    assert str(error) in message and flag in message and len(set(MAKERS) & set(message.split())) <= 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def silent(monkeypatch):
    """Clips without the sound, which takes the time."""
    monkeypatch.setattr(synth, "scene_spectrum", lambda *_: None)
    monkeypatch.setattr(synth, "record", lambda *_: np.zeros(synth.SAMPLE_RATE))


def test_command_line(tmp_path, call_main, silent):
    sizes = ("--train_clips", 10, "--test_clips_per_device", 10, "--num_workers", 0)
    done = call_main(command.main, "--out", "d", "--responses", "r", *sizes)
    assert done.code == 0 and done.out.count("synthetic") == 2, done.err
    assert synth.is_whole(tmp_path / "d") and len(list((tmp_path / "r").iterdir())) == synth.N_RESPONSES
    call_main(command.main).refused("--out", "--responses")


@pytest.fixture
def small_default(tmp_path, monkeypatch, silent) -> Path:
    """A cache of its own, and a default SynthTAU of the smallest size."""
    whole = synth.make
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(synth, "make", lambda out: whole(out, train_clips=10, test_clips_per_device=10, num_workers=0))
    return synth.default_folder()


def test_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("AUDIO_MAMBA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert synth.default_folder() == Path("/x/audio_mamba/synth_tau_v2")
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", "/y")
    assert synth.default_folder() == Path("/y/audio_mamba/synth_tau_v2")


def test_default_is_made_once_and_again_where_it_is_not_whole(small_default, capsys):
    wreck = small_default.with_name(f".{small_default.name}.0123.partial")
    for remains in (small_default, wreck):
        (remains / "audio").mkdir(parents=True)
        (remains / "audio" / "bus-lyon-1-1-0-a.wav").write_bytes(b"RIFF")
    assert synth.ensure_default() == small_default
    assert synth.is_whole(small_default) and not wreck.exists()
    intact, made = digests(small_default), small_default.stat().st_ctime_ns
    capsys.readouterr()
    assert synth.ensure_default() == small_default and small_default.stat().st_ctime_ns == made
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "synthetic" in said and str(small_default) in said
    next((small_default / "audio").iterdir()).write_bytes(b"RIFF")  # cut short
    synth.ensure_default()
    (small_default / "SYNTHETIC.md").unlink()
    synth.ensure_default()
    assert digests(small_default) == intact


def test_concurrent_callers_share_one_folder(small_default):
    context = multiprocessing.get_context("fork")  # children keep the patched size
    callers = [context.Process(target=synth.ensure_default) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [caller.exitcode for caller in callers] == [0, 0, 0]
    assert synth.is_whole(small_default)
    assert not list(small_default.parent.glob(".*.partial"))


def test_default_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", str(tmp_path / "file"))
    assert "AUDIO_MAMBA_CACHE" in refusal(synth.ensure_default)


@pytest.mark.parametrize("ratio", [1.5, 3])
def test_a_compressor_lets_1_db_out_for_ratio_db_in(ratio):
    wave = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(synth.SAMPLE_RATE) / synth.SAMPLE_RATE).astype(np.float32)

    def level(x):
        return 10 * np.log10(np.mean(x**2))

    over = level(wave) - synth.THRESHOLD
    assert level(synth.compress(wave, ratio)) - synth.THRESHOLD == pytest.approx(over / ratio, abs=0.1)
