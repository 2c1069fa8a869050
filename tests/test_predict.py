"""Recordings of any length, rate and format: what the model reads of them, what comes out, what is skipped."""

import csv
import itertools
import json
import math
import os
import shutil
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import RATE, SCENES, refusal, tone
from hypothesis import given
from hypothesis import strategies as st
from stored_files import with_device_models
from torch import Tensor

from dcase import predict
from dcase.data import recordings
from dcase.data.logmel import LogMelConfig, frames_of
from dcase.data.recordings import Span, pieces, span_of, windows
from dcase.data.sound import read_wav
from dcase.data.tau22 import DEVICES
from dcase.data.tau22 import SCENES as ALL_SCENES
from dcase.deployment.prediction import Recording, Skipped, load_module, span_of_module
from dcase.deployment.prediction import predict as predictions_of
from dcase.model.named import ModelConfig
from dcase.predict import PredictConfig, find_recordings
from dcase.runs.checkpoints import load_checkpoint, save_checkpoint
from dcase.runs.config import DataConfig, EvalConfig
from dcase.training.lit import SceneClassifier


@pytest.fixture
def call(call_main):
    return partial(call_main, predict.main)


@pytest.fixture(scope="module")
def ckpt(general_run) -> Path:
    return general_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def module(ckpt):
    return load_module(ckpt)


@pytest.fixture(scope="module")
def by_device(ckpt, tmp_path_factory) -> Path:
    """A checkpoint in which device a has a model of its own, with other weights."""
    path = tmp_path_factory.mktemp("by_device") / "best.ckpt"
    save_checkpoint(with_device_models(ckpt, {"a": 1.5}), path)
    return path


@pytest.fixture(scope="module")
def of_any_length(ckpt, tmp_path_factory) -> Path:
    """The same model, with --target_length."""
    checkpoint = load_checkpoint(ckpt)
    checkpoint["config"]["logmel"]["target_length"] = checkpoint["frames"]
    path = tmp_path_factory.mktemp("of_any_length") / "best.ckpt"
    save_checkpoint(checkpoint, path)
    return path


def clip(learnable: Path, device: str = "a") -> Path:
    return sorted((learnable / "audio").glob(f"tram-paris-*-{device}.wav"))[0]


def scene(seconds: float, rate: int = RATE, name: str = "tram") -> np.ndarray:
    rng = np.random.default_rng(3)
    time = np.arange(round(seconds * rate)) / rate
    hertz = {"airport": 300, "bus": 700, "park": 1500, "tram": 3000}[name]
    return 0.3 * np.sin(2 * np.pi * hertz * time) + rng.normal(0, 0.05, len(time))


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def expected_of(module, waveform: Tensor, device: int = -1) -> Tensor:
    """Return the probabilities of a waveform (1, samples), read as a whole."""
    with torch.no_grad():
        return module(waveform[None], torch.tensor([device])).double().softmax(1)[0]


def probabilities_of(module, path: Path, **options) -> Tensor:
    (one,) = predictions_of(module, [Recording(path)], **options)
    return torch.tensor(one.probabilities, dtype=torch.float64)


# Lengths


@given(
    hop=st.integers(50, 700),
    n_fft=st.sampled_from([256, 1024, 4096]),
    rates=st.sampled_from([(44100, 32000), (8000, 8000), (16000, 32000), (48000, 44100), (22050, 16000)]),
    samples=st.integers(5000, 90000),
)
def test_a_span_is_the_clips_that_made_these_frames(hop, n_fft, rates, samples):
    orig_sample_rate, sample_rate = rates
    config = LogMelConfig(sample_rate=sample_rate, hop_length=hop, n_fft=n_fft, window_length=256)
    frames = frames_of(config, samples, orig_sample_rate)
    span = span_of(config, frames, orig_sample_rate)
    for n in (span.window, span.least, span.most):
        assert frames_of(config, n, orig_sample_rate) == frames
    assert samples <= span.most and frames_of(config, span.most + 1, orig_sample_rate) == frames + 1


def test_one_second_is_one_second():
    assert span_of(LogMelConfig(), 65, 44100).window == 44100  # not the 44,099 that make 65 frames too
    assert span_of(LogMelConfig(), 641, 44100).window == 441000


def test_with_a_target_length_a_clip_only_fills_one_fft():
    config = LogMelConfig(target_length=1024)
    span = span_of(config, 1024, 44100)
    assert span.window == math.ceil(1023 * 500 * 44100 / 32000)
    assert frames_of(config, span.least, 44100) == 1024
    assert "too short" in refusal(frames_of, config, span.least - 1, 44100)


def cut(n: int, span: Span, hop: int, piece: int) -> list[list[int]]:
    sound = torch.arange(n, dtype=torch.float32)[None]
    return [window[0].int().tolist() for window in windows(sound.split(piece, 1), span, hop)]


@given(
    n=st.integers(1, 200),
    window=st.integers(1, 40),
    more=st.integers(0, 20),
    hop=st.integers(1, 40),
    piece=st.integers(1, 90),
)
def test_windows_hold_every_sample(n, window, more, hop, piece):
    span, hop = Span(window, window, window + more), min(hop, window)
    got = cut(n, span, hop, piece)
    if n <= span.most:
        assert got == [(list(range(n)) * window)[: max(n, window)]]  # whole; repeated where it is shorter
        return
    starts = [one[0] for one in got]
    assert all(one == list(range(start, start + window)) for one, start in zip(got, starts, strict=True))
    assert {sample for one in got for sample in one} == set(range(n)) and got[-1][-1] == n - 1
    assert starts[:-1] == [hop * i for i in range(len(starts) - 1)] and starts[-1] <= hop * (len(starts) - 1)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_pieces_are_the_whole_file(rate, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "PIECE_SECONDS", 1)
    sound = np.random.default_rng(0).normal(0, 0.1, (int(3.37 * rate), channels))
    path = write(tmp_path / "x.wav", sound, rate, subtype="FLOAT")
    got = list(pieces(path, 22050))
    assert len(got) >= 3
    torch.testing.assert_close(torch.cat(got, 1), read_wav(path, 22050), rtol=0, atol=1e-6)


# Predictions


def test_a_clip_of_the_training_length_is_what_a_test_reads(module, learnable):
    path = clip(learnable)
    assert torch.equal(probabilities_of(module, path), expected_of(module, read_wav(path, RATE)))


def test_test_clips_get_the_runs_accuracy(module, learnable, general_run):
    names = [line.split("\t")[0] for line in (learnable / "split_setup" / "test.csv").read_text().splitlines()[1:]]
    found = predictions_of(module, [Recording(learnable / name) for name in names], batch_size=5)
    right = [one.best(1)[0][0] == one.recording.path.name.split("-")[0] for one in found]
    results = json.loads((general_run / "results.json").read_text())
    assert len(right) == results["n_clips"] and sum(right) / len(right) == pytest.approx(results["acc"])


def test_a_long_file_is_the_mean_of_its_windows(module, tmp_path):
    sound = np.concatenate([scene(0.7), scene(0.6, name="bus")])
    path = write(tmp_path / "long.wav", sound, subtype="FLOAT")
    waveform, n = read_wav(path, RATE), span_of_module(module).window
    starts = [0, n, waveform.shape[1] - n]
    parts = torch.stack([expected_of(module, waveform[:, start : start + n]) for start in starts])
    torch.testing.assert_close(probabilities_of(module, path), parts.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(probabilities_of(module, path, batch_size=1), parts.mean(0), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(probabilities_of(module, path, overlap=0.5), parts.mean(0), rtol=1e-5)


def test_a_short_file_is_repeated(module, tmp_path):
    path = write(tmp_path / "short.wav", scene(0.2), subtype="FLOAT")
    repeated = read_wav(path, RATE).repeat(1, 3)[:, : span_of_module(module).window]
    torch.testing.assert_close(probabilities_of(module, path), expected_of(module, repeated))


@pytest.mark.parametrize("samples", [200, 1600, 3900, 4000, 4090])
def test_with_a_target_length_a_test_clip_is_what_a_test_reads(samples, of_any_length, tmp_path):
    """A test reads it in a batch with longer ones, its log-mel padded."""
    module, path = load_module(of_any_length), write(tmp_path / "x.wav", scene(samples / RATE), subtype="FLOAT")
    waveform = torch.zeros(2, 1, 4500)
    waveform[0, :, :samples] = read_wav(path, RATE)
    with torch.no_grad():
        tested = module(waveform, torch.tensor([-1, -1]), torch.tensor([samples, 4500])).double().softmax(1)[0]
    torch.testing.assert_close(probabilities_of(module, path), tested, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "ending, rate, channels", [("flac", 16000, 1), ("wav", 44100, 2), ("ogg", 22050, 2), ("mp3", 16000, 1)]
)
def test_other_formats_and_rates_are_read_alike(ending, rate, channels, module, tmp_path):
    sound = scene(1.3)
    want = probabilities_of(module, write(tmp_path / "as_trained.wav", sound, subtype="FLOAT"))
    higher = torchaudio.functional.resample(torch.from_numpy(sound), RATE, rate).numpy()
    sides = [higher] if channels == 1 else [0.5 * higher, 1.5 * higher]  # to mono, these are the same
    got = probabilities_of(module, write(tmp_path / f"x.{ending}", 0.6 * np.stack(sides, 1), rate))
    quieter = probabilities_of(module, write(tmp_path / "quieter.wav", 0.6 * sound, subtype="FLOAT"))
    torch.testing.assert_close(got, quieter, rtol=0, atol=0.01)  # the filters take a little of the highest band
    assert not torch.allclose(quieter, want, rtol=0, atol=0.01)


def test_mixed_lengths_and_devices_do_not_disturb_one_another(by_device, learnable, tmp_path):
    module = load_module(by_device)
    files = [write(tmp_path / f"{i}.wav", scene(0.1 + 0.3 * i), subtype="FLOAT") for i in range(6)]
    given = [Recording(path, device) for path in files for device in ("a", "b", "unknown", "x9")]
    together = list(predictions_of(module, given, batch_size=7))
    assert [one.recording for one in together] == given
    for one in together:
        (alone,) = predictions_of(module, [one.recording])
        assert one.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
        assert (one.n_windows, one.seconds, one.is_repeated) == (alone.n_windows, alone.seconds, alone.is_repeated)
    a, b, unknown, other = (torch.tensor(one.probabilities) for one in together[-4:])
    assert torch.equal(b, unknown) and torch.equal(b, other) and not torch.allclose(a, b)


def test_weights_are_those_that_are_stored(ckpt, tmp_path, learnable):
    save_checkpoint(with_device_models(ckpt, {}, 8), tmp_path / "8.ckpt")
    rounded, plain = load_module(tmp_path / "8.ckpt"), load_module(ckpt)
    assert not torch.equal(rounded.model.layers[0].mixer.in_proj.weight, plain.model.layers[0].mixer.in_proj.weight)
    assert not torch.equal(probabilities_of(rounded, clip(learnable)), probabilities_of(plain, clip(learnable)))


def test_a_file_that_goes_bad_at_its_end_is_skipped_whole(module, tmp_path, learnable):
    sound = scene(3.0)
    sound[-5] = np.nan
    bad = write(tmp_path / "bad.wav", sound, subtype="FLOAT")
    good = clip(learnable)
    first, skipped, last = predictions_of(module, [Recording(good), Recording(bad), Recording(good)], batch_size=2)
    assert isinstance(skipped, Skipped) and skipped.reason == f"{bad} is no recording, NaN or infinite"
    assert first.probabilities == pytest.approx(last.probabilities, abs=1e-6)


# The command

FLAGS = {"npz": "--embeddings"}  # by a file's ending; the others are of --out


@pytest.fixture
def folder(tmp_path, learnable) -> Path:
    """Good files in several formats and levels, and files that are not to be read."""
    folder = tmp_path / "sounds"
    (folder / "more" / "deep").mkdir(parents=True)
    shutil.copy(clip(learnable, "a"), folder / "airport-lisbon-1000-40000-0-a.wav")
    write(folder / "more" / "B.FLAC", np.stack([scene(1.3, 16000)] * 2, 1), 16000)
    write(folder / "more" / "deep" / "c.ogg", scene(0.3))
    (folder / "notes.txt").write_text("no sound")
    (folder / "._hidden.wav").write_text("of a Mac")
    return folder


def test_a_folder_as_table_csv_and_json(call, ckpt, folder, module):
    done = call(folder, "--ckpt_path", ckpt, "--out", "out.json")
    assert done.code == 0, done.err
    content = json.loads((folder.parent / "out.json").read_text())
    assert content["skipped"] == []
    files = [Path(one["file"]).name for one in content["predictions"]]
    assert files == ["airport-lisbon-1000-40000-0-a.wav", "B.FLAC", "c.ogg"]
    for one in content["predictions"]:
        want = probabilities_of(module, Path(one["file"]))
        assert list(one["probabilities"]) == list(ALL_SCENES)
        assert list(one["probabilities"].values()) == pytest.approx(want.tolist(), abs=1e-6)
        ordered = sorted(one["probabilities"].items(), key=lambda pair: -pair[1])[:3]
        assert [(top["scene"], top["probability"]) for top in one["top"]] == ordered
    first, second, third = content["predictions"]
    assert (first["seconds"], first["windows"], first["device_id"]) == (0.5, 1, "a")
    assert (second["seconds"], second["windows"], second["device_id"]) == (1.3, 3, "unknown")
    assert (third["seconds"], third["windows"]) == (0.3, 1)
    rows = [line.split("|")[1:-1] for line in done.out.splitlines() if line.startswith("|")][2:]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        [one["file"], one["top"][0]["scene"], f"{100 * one['top'][0]['probability']:.1f}"]
        for one in content["predictions"]
    ]
    assert "shorter than the 0.50 s" in done.err and "c.ogg (recordings: 1)" in done.err

    assert call(folder, "--ckpt_path", ckpt, "--out", "out.csv").code == 0
    with open(folder.parent / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, one in zip(table, content["predictions"], strict=True):
        assert row["file"] == one["file"] and row["scene_1"] == one["top"][0]["scene"]
        assert float(row["probability_3"]) == one["top"][2]["probability"]
        assert {name: float(row[name]) for name in ALL_SCENES} == one["probabilities"]
        assert (float(row["seconds"]), row["device_id"], int(row["windows"])) == (
            one["seconds"], one["device_id"], one["windows"],
        )  # fmt: skip


def features_of(module, waveform: Tensor, device_id: str = "") -> Tensor:
    """Return the features of a waveform (1, samples), read as a whole by its device's model."""
    model = module.device_models[device_id] if device_id else module.model
    with torch.no_grad():
        x = module.logmel(*module.logmel.resampled(waveform[None], torch.tensor([waveform.shape[1]])))
        return model.forward_features(x)[0]


def test_embeddings_are_the_features_and_the_rest_is_what_out_has(call, by_device, folder):
    module = load_module(by_device)
    done = call(folder, "--ckpt_path", by_device, "--embeddings", "deep/v.npz")
    assert done.code == 0 and "3 recordings: deep/v.npz" in done.out, done.err
    with np.load(folder.parent / "deep" / "v.npz") as file:
        found = dict(file)
    assert [Path(name).name for name in found["files"]] == ["airport-lisbon-1000-40000-0-a.wav", "B.FLAC", "c.ogg"]
    assert found["device_ids"].tolist() == ["a", "unknown", "unknown"] and found["scenes"].tolist() == [*ALL_SCENES]
    first, second = (read_wav(Path(name), RATE) for name in found["files"][:2])
    n = span_of_module(module).window
    parts = [second[:, start : start + n] for start in (0, n, second.shape[1] - n)]
    want = [features_of(module, first, "a"), torch.stack([features_of(module, part) for part in parts]).mean(0)]
    assert found["embeddings"].shape == (3, module.model.config.embed_dim) and found["embeddings"].dtype == np.float32
    np.testing.assert_allclose(found["embeddings"][:2], torch.stack(want), rtol=1e-5, atol=1e-6)
    assert call(folder, "--ckpt_path", by_device, "--out", "o.json").code == 0
    content = json.loads((folder.parent / "o.json").read_text())["predictions"]
    probabilities = [list(one["probabilities"].values()) for one in content]
    np.testing.assert_allclose(found["probabilities"], probabilities, atol=1e-6)


@pytest.mark.parametrize("name, width", [("aum_nano", 48), ("cp_mobile", 104)])
def test_models_that_classify_before_they_pool_have_embeddings(name, width, learnable):
    module = SceneClassifier(EvalConfig(model=ModelConfig(name), data=DataConfig(orig_sample_rate=RATE)), 33).eval()
    given = [Recording(clip(learnable))]
    (one,), (plain,) = predictions_of(module, given, embed=True), predictions_of(module, given)
    assert len(one.embedding) == width and np.std(one.embedding) > 0 and plain.embedding == ()
    assert one.probabilities == pytest.approx(plain.probabilities, abs=1e-6)


def test_embeddings_of_no_file_that_can_be_read_are_none(call, ckpt, tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound")
    assert call("text.wav", "--ckpt_path", ckpt, "--embeddings", "v.npz").code == 2
    assert np.load(tmp_path / "v.npz")["embeddings"].shape == (0, 0)


def test_with_batch_lengths_short_files_are_read_at_their_own_length(call, general_run, tmp_path):
    checkpoint = load_checkpoint(general_run / "checkpoints" / "best.ckpt")
    config, state = checkpoint["config"], checkpoint["state_dict"]
    config["logmel"] |= {"target_length": checkpoint["frames"], "batch_lengths": True}
    config["model"]["pos_embed"] = False
    checkpoint["state_dict"] = {name: x for name, x in state.items() if "pos_embed" not in name}
    save_checkpoint(checkpoint, tmp_path / "own.ckpt")
    write(tmp_path / "short.wav", scene(0.2))
    module, given = load_module(tmp_path / "own.ckpt"), [Recording(tmp_path / "short.wav")]
    (one,), (plain,) = predictions_of(module, given, embed=True), predictions_of(module, given)
    assert one.probabilities == pytest.approx(plain.probabilities, abs=1e-6)
    done = call("short.wav", "--ckpt_path", "own.ckpt")
    assert done.out.endswith(
        "shorter than 0.50 s, and read at their own length, as by --batch_lengths in training: 1 recordings\n"
    )


def test_with_a_target_length_short_files_are_said_to_be_padded(call, ckpt, of_any_length, tmp_path):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for name, seconds in (("tiny", 0.01), ("short", 0.3), ("whole", 0.5), ("long", 1.3)):
        write(sounds / f"{name}.wav", scene(seconds))
    done = call(sounds, "--ckpt_path", of_any_length)
    assert "windows of 0.50 s" in done.out
    assert done.out.endswith("shorter than 0.50 s, and padded, as by --target_length in training: 1 recordings\n")
    assert "shorter than the 0.02 s that the model needs, and repeated to fill them" in done.err
    assert "tiny.wav (recordings: 1)" in done.err and "short.wav" not in done.err
    done = call(sounds, "--ckpt_path", ckpt)
    assert "padded" not in done.out and "short.wav, " in done.err and "tiny.wav (recordings: 2)" in done.err


def test_all_that_libsndfile_reads_is_taken_from_a_folder_and_the_rest_is_counted(tmp_path, capsys):
    names = ["a.wav", "b.FLAC", "c.ogg", "d.mp3", "deeper/e.aiff", "f.au"]
    (tmp_path / "deeper").mkdir()
    for name in [*names, ".hidden.wav", "deeper/notes.txt", "g.m4a", "h.raw"]:
        (tmp_path / name).touch()
    found = find_recordings(PredictConfig(paths=(str(tmp_path),)))
    assert sorted(str(one.path.relative_to(tmp_path)) for one in found) == sorted(names)
    assert capsys.readouterr().out == "passed over 4 files that are not sound: .hidden.wav, g.m4a, h.raw, ...\n"


def test_bad_files_are_reported_and_skipped(call, ckpt, learnable, tmp_path):
    good = tmp_path / "good.wav"
    shutil.copy(clip(learnable), good)
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "cut.wav").write_bytes(good.read_bytes()[:3000])
    write(tmp_path / "empty.wav", np.zeros(0))
    write(tmp_path / "whole.flac", scene(2.0))
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:9000])
    write(tmp_path / "whole.mp3", scene(2.0))
    (tmp_path / "cut.mp3").write_bytes((tmp_path / "whole.mp3").read_bytes()[:3000])
    names = "text.wav good.wav cut.wav empty.wav cut.flac cut.mp3 nowhere.wav whole.flac".split()
    done = call(*(tmp_path / name for name in names), "--ckpt_path", ckpt, "--out", "out.json", "--batch_size", 2)
    assert done.code == 2 and done.error == "error: 6 of 8 files were skipped; the lines above say why"
    assert "Traceback" not in done.err
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
    assert [Path(line.split()[1]).name for line in skipped] == [*names[:1], *names[2:-1]]
    assert "Format not recognised" in skipped[0] and "truncated" in skipped[1] and "empty" in skipped[2]
    assert "cannot be read" in skipped[3] and "truncated" in skipped[4] and "No such file" in skipped[5]
    content = json.loads((tmp_path / "out.json").read_text())
    assert [Path(one["file"]).name for one in content["predictions"]] == ["good.wav", "whole.flac"]
    assert [f"skipped: {one['reason']}" for one in content["skipped"]] == skipped


def hostile(folder: Path, good: Path) -> dict[str | bytes, str]:
    """Make sound files that cannot be read, and return what is said of each."""
    loud = np.full(4000, 3e38, np.float32) * np.resize([1, -1], 4000)
    write(folder / "empty.wav", np.zeros(0), 44100)
    write(folder / "loud.wav", loud, subtype="FLOAT")
    write(folder / "loud_too.wav", loud, 44100, subtype="FLOAT")
    shutil.copy(good, os.fsencode(folder) + b"/caf\xe9.wav")
    os.mkfifo(folder / "fifo.wav")
    (folder / "folder.wav").mkdir()
    (folder / "zero.wav").symlink_to("/dev/zero")
    (folder / "gone.wav").symlink_to("/nowhere")
    too_loud = "is no recording, too loud (samples of up to 3.0e+38, full scale is 1)"
    return {
        "empty.wav": "is no recording, empty",
        "loud.wav": too_loud,
        "loud_too.wav": too_loud,
        r"caf\udce9.wav": "cannot be read (its name is not UTF-8: rename it)",
        "fifo.wav": "cannot be read (it is a FIFO, no regular file)",
        "folder.wav": "cannot be read (it is a folder)",
        "zero.wav": "cannot be read (it is a device or socket, no regular file)",
        "gone.wav": "cannot be read (No such file or directory)",
    }


@pytest.mark.parametrize("ending", ["csv", "json", "npz"])
def test_no_file_takes_the_others_results_with_it(call, ckpt, learnable, tmp_path, ending, alarm):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name in ("a.wav", "z\x1b[31m\n<b>.wav"):
        shutil.copy(clip(learnable), folder / name)
    said = hostile(folder, clip(learnable))
    done = call(folder, "--ckpt_path", ckpt, FLAGS.get(ending, "--out"), f"out.{ending}")
    assert (
        done.code == 2
        and done.error == f"error: {len(said)} of {len(said) + 2} files were skipped; the lines above say why"
    )
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
    assert sorted(skipped) == sorted(f"skipped: {folder}/{name} {reason}" for name, reason in said.items())
    assert r"z\x1b[31m\n<b>.wav" in done.out and "\x1b" not in done.out + done.err
    if ending == "npz":
        names = np.load(tmp_path / "out.npz")["files"]  # numpy refuses pickled ones
    elif ending == "json":
        names = [one["file"] for one in json.loads((tmp_path / "out.json").read_text())["predictions"]]
    else:
        with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
            names = [row["file"] for row in csv.DictReader(file)]
    assert [Path(name).name for name in names] == ["a.wav", "z\x1b[31m\n<b>.wav"]
    assert {path.name for path in tmp_path.iterdir()} == {"sounds", f"out.{ending}"}


def test_only_regular_files_are_opened(call, ckpt, folder, tmp_path, alarm):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "x.safetensors").symlink_to("fifo")
    for args, part in [
        (["--ckpt_path", "fifo"], "checkpoint fifo does not exist, or is no regular file"),
        (["--ckpt_path", "x.safetensors"], "it is a FIFO, no regular file"),
        (["--ckpt_path", "/dev/zero"], "or is no regular file"),
        (["--ckpt_path", ckpt, "--list", "fifo"], "--list fifo cannot be read (it is a FIFO, no regular file)"),
    ]:
        call(folder, *args).refused(part)


@pytest.mark.parametrize("ending", ["csv", "json", "npz"])
def test_what_was_predicted_before_a_ctrl_c_is_kept(call, ckpt, learnable, tmp_path, monkeypatch, ending):
    shutil.copy(clip(learnable), tmp_path / "a.wav")
    (tmp_path / f"out.{ending}").write_text("earlier")

    def stopped(*args):
        yield from itertools.islice(predictions_of(*args), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", stopped)
    flag = FLAGS.get(ending, "--out")
    done = call(learnable / "audio", "--ckpt_path", ckpt, flag, f"out.{ending}", "--batch_size", 1)
    partial = tmp_path / f"out.partial.{ending}"
    assert done.code == 130 and done.err.endswith(f"what was predicted is in {partial.name}\n")
    if ending == "npz":
        found = np.load(partial)["embeddings"]
    else:
        found = (
            json.loads(partial.read_text())["predictions"] if ending == "json" else [*csv.DictReader(partial.open())]
        )
    assert len(found) == 2 and (tmp_path / f"out.{ending}").read_text() == "earlier"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_results_are_written_as_they_come_and_not_held(call, ckpt, learnable, tmp_path, monkeypatch, ending):
    shown, held = [], []

    def watched(*args):
        for one in predictions_of(*args):
            held.append(weakref.ref(one))
            shown.append((len(list(tmp_path.glob(".out.csv.*"))), sum(ref() is not None for ref in held)))
            yield one
            del one

    monkeypatch.setattr(predict, "predict", watched)
    assert call(learnable / "audio", "--ckpt_path", ckpt, FLAGS.get(ending, "--out"), f"out.{ending}").code == 0
    beside, alive = zip(*shown, strict=True)
    assert len(shown) == 104 and set(beside) == {int(ending == "csv")}  # .npz waits in a file without a name
    assert max(alive) <= predict.SHOWN + 3


def test_a_model_that_is_not_finite_is_refused_by_name(call, ckpt, learnable, tmp_path):
    shutil.copy(clip(learnable), tmp_path / "a.wav")
    for value, said in ((math.nan, "is NaN or infinite: the file is damaged"), (3e38, "a.wav is NaN or infinite")):
        checkpoint = load_checkpoint(ckpt)
        checkpoint["state_dict"]["model.layers.0.mixer.out_proj.weight"].fill_(value)
        save_checkpoint(checkpoint, tmp_path / "bad.ckpt")
        call("a.wav", "--ckpt_path", "bad.ckpt", "--out", "out.json").refused("--ckpt_path bad.ckpt: ", said)
        assert not (tmp_path / "out.json").exists()


def test_the_device_comes_from_the_flag_the_name_or_the_list(call, by_device, learnable, tmp_path):
    sound = clip(learnable)
    (tmp_path / "audio").mkdir()
    for name in ("airport-lisbon-1000-40000-0-a.wav", "airport-barcelona-0-0-b.wav", "note-a.wav"):
        shutil.copy(sound, tmp_path / "audio" / name)

    def predicted(*args) -> list[tuple[str, float]]:
        done = call(*args, "--ckpt_path", by_device, "--out", tmp_path / "out.json")
        assert done.code == 0, done.err
        found = json.loads((tmp_path / "out.json").read_text())["predictions"]
        return [(one["device_id"], round(one["top"][0]["probability"], 5)) for one in found]

    own, general = (
        round(expected_of(load_module(by_device), read_wav(sound, RATE), d).max().item(), 5) for d in (0, -1)
    )
    assert own != general and DEVICES[0] == "a"
    assert predicted("audio") == [("b", general), ("a", own), ("unknown", general)]
    assert predicted("audio", "--device_id", "a") == [("a", own)] * 3
    assert predicted("audio", "--device_id", "unknown") == [("unknown", general)] * 3
    (tmp_path / "list.csv").write_text(
        "filename\tdevice_id\naudio/note-a.wav\ta\naudio/airport-barcelona-0-0-b.wav\ts9\n"
    )
    assert predicted(tmp_path, "--list", "list.csv") == [("a", own), ("s9", general)]
    (tmp_path / "list.csv").write_text("filename\naudio/airport-lisbon-1000-40000-0-a.wav\n")
    assert predicted(tmp_path, "--list", "list.csv") == [("a", own)]
    for name in ("/etc/passwd", "../x.wav", "audio/../../x.wav"):
        (tmp_path / "list.csv").write_text(f"filename\n{name}\n")
        call(tmp_path, "--list", "list.csv", "--ckpt_path", by_device).refused(f"{name!r} leaves the folder")


def test_a_file_given_twice_is_predicted_once(call, ckpt, folder):
    done = call(folder, folder / "airport-lisbon-1000-40000-0-a.wav", "--ckpt_path", ckpt, "--out", "o.json")
    assert done.code == 0 and len(json.loads((folder.parent / "o.json").read_text())["predictions"]) == 3


def test_many_rows_are_left_to_the_file(call, ckpt, learnable, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "SHOWN", 3)
    done = call(learnable / "audio", "--ckpt_path", ckpt, "--out", "o.csv")
    assert done.code == 0 and "... and 101 more" in done.out and done.out.count(".wav") == 3
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 105
    assert call(learnable / "audio", "--ckpt_path", ckpt).out.count(".wav") == 104


def test_bad_input_is_one_line(call, ckpt, folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "list.csv").write_text("name\ta\n")
    for args, parts in [
        ([folder], ["--ckpt_path is missing"]),
        (["--ckpt_path", ckpt], ["which recordings?"]),
        ([tmp_path / "nothing", "--ckpt_path", ckpt], ["nothing holds no sound file"]),
        ([folder, "--ckpt_path", "no.ckpt"], ["no.ckpt does not exist"]),
        ([folder, "--ckpt_path", ckpt, "--device_id", "z"], ["--device_id is auto", "'z'"]),
        ([folder, "--ckpt_path", ckpt, "--overlap", "1"], ["--overlap", "at most 0.99", "1.0"]),
        ([folder, "--ckpt_path", ckpt, "--batch_size", "0"], ["--batch_size"]),
        ([folder, "--ckpt_path", ckpt, "--out", "x.txt"], ["--out ends in .csv or .json"]),
        ([folder, "--ckpt_path", ckpt, "--embeddings", "x.npy"], ["--embeddings ends in .npz; got x.npy"]),
        ([folder, "--ckpt_path", ckpt, "--embeddings", "x.npz", "--out", "x.csv"], ["give --out or --embeddings"]),
        ([folder, "--ckpt_path", ckpt, "--embeddings", "list.csv/x.npz"], ["list.csv/x.npz cannot be written"]),
        ([folder, "--ckpt_path", ckpt, "--list", "list.csv"], ["--list list.csv has no file"]),
        ([folder, "--ckpt_path", ckpt, "--list", "none.csv"], ["none.csv cannot be read"]),
        (["--ckpt_path", ckpt, "--list", "list.csv"], ["--list needs one folder"]),
        ([folder, "--ckpt_path", ckpt, "--out", "list.csv/x.csv"], ["list.csv/x.csv cannot be written"]),
    ]:
        call(*args).refused(*parts)


def test_the_tones_are_told_apart(module, tmp_path):
    """The figures above are of a model that has learnt something."""
    found = [probabilities_of(module, write(tmp_path / f"{n}.wav", tone(n, "a", 1))).argmax().item() for n in SCENES]
    assert sum(ALL_SCENES[i] == name for i, name in zip(found, SCENES, strict=True)) >= 2


@pytest.mark.parametrize("samples, starts", [(8, [0, 2, 4]), (9, [0, 2, 4, 5])])
def test_the_last_window_is_read_once(samples, starts):
    sound = torch.arange(float(samples))[None]
    assert [int(window[0, 0]) for window in windows([sound], Span(4, 4, 5), 2)] == starts
