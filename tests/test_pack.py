"""Packing: what is in a pack, how a killed packing goes on, and what a pack that does not fit ends in."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import refusal
from data_folder import SAMPLE_RATE, noise, write_data_folder
from hypothesis import example, given
from hypothesis import strategies as st

from dcase import prepare
from dcase.data import packing
from dcase.data.dataset import TAU22, Sound
from dcase.data.loading import open_sound, with_sound
from dcase.data.pack import Pack, Packing, Rates, quantise
from dcase.data.sound import read_wav
from dcase.data.tau22 import DataConfig, load_clips
from dcase.prepare import PrepareConfig
from dcase.runs.config import TrainConfig

CONFIG = PrepareConfig(pack=True, num_workers=2)


@pytest.fixture
def folder(tmp_path):
    write_data_folder(tmp_path)
    return tmp_path


def pack(folder: Path, **options) -> Pack:
    packing.pack_clips(folder, PrepareConfig(pack=True, num_workers=1, **options))
    return Pack(folder / "pack")


def sound_of(folder: Path, **options) -> Sound:
    return open_sound(TrainConfig(data=DataConfig(**options)), folder)[1]


@example([0.9330630898475647, 0.8958311080932617], 1.0)  # half a step and float32's rounding
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.sampled_from([1.0, 1e-3, 1e-6, 1e-30, 1e-40]))
def test_quantising_is_off_by_half_a_step_at_most(samples, level):
    waveform = (np.array([samples], np.float32) * np.float32(level)).astype(np.float32)
    ints, scale = quantise(waveform)
    assert ints.dtype == np.int16
    error = np.abs(ints[0] * scale.astype(np.float64) - waveform[0]).max()
    assert error <= max(np.abs(waveform).max() / 65000, np.finfo(np.float32).tiny)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_holds_every_clip_resampled(folder, workers, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 5)
    packing.pack_clips(folder, PrepareConfig(pack=True, num_workers=workers))
    found, resample = Pack(folder / "pack"), torchaudio.transforms.Resample(SAMPLE_RATE, 32000)
    assert len(found) == 18 and found.rates == Rates(SAMPLE_RATE, 32000) and found.damaged_blocks() == []
    for split in ("split25", "test"):
        clips = load_clips(folder, split)
        dataset = TAU22(clips, Sound(32000, pack=found))
        for i in range(len(clips)):
            expected = resample(read_wav(clips.path(i), SAMPLE_RATE))
            assert (dataset[i].waveform - expected).abs().max() <= expected.abs().max() / 65000 + 1e-7
    assert {path.name.partition("-")[0] for path in (folder / "pack").iterdir()} == {
        ".lock", "manifest.json", "index", "samples",
    }  # fmt: skip


def test_a_quiet_recording_keeps_sixteen_bits(folder):
    clips = load_clips(folder, "test")
    quiet = noise(3) * 2e-5  # its peak is 2 to 3 steps of a 16-bit file
    soundfile.write(clips.path(0), quiet, SAMPLE_RATE, subtype="PCM_24")
    dataset = TAU22(clips, Sound(SAMPLE_RATE, pack=pack(folder, sample_rate=SAMPLE_RATE)))
    written = soundfile.read(clips.path(0))[0]
    assert np.abs(dataset[0].waveform[0].numpy() - written).max() <= np.abs(written).max() / 65000


def test_batches_of_a_pack_are_those_of_the_files(folder):
    clips = load_clips(folder, "split25")
    sound = Sound(SAMPLE_RATE, pack=pack(folder, sample_rate=SAMPLE_RATE))
    rows = [7, 0, 15, 3]
    packed, read = TAU22(clips, sound).__getitems__(rows), TAU22(clips, Sound(SAMPLE_RATE)).__getitems__(rows)
    assert packed.waveform.dtype == torch.int16
    torch.testing.assert_close(packed.waveform * packed.scale.view(-1, 1, 1), read.waveform, rtol=0, atol=1e-5)
    for field in ("length", "scene", "device", "index"):
        assert torch.equal(getattr(packed, field), getattr(read, field))


def test_clips_of_any_length_are_padded_and_cut(folder):
    clips = load_clips(folder, "split25")
    soundfile.write(clips.path(2), noise(2, 3000), SAMPLE_RATE)
    found = pack(folder, sample_rate=SAMPLE_RATE)
    assert "--target_length" in refusal(TAU22, clips, Sound(SAMPLE_RATE, pack=found))
    batch = TAU22(clips, Sound(SAMPLE_RATE, 4000, found)).__getitems__([1, 2])
    assert batch.waveform.shape == (2, 1, 4000) and batch.length.tolist() == [4000, 3000]
    assert (batch.waveform[1, :, 3000:] == 0).all()


def test_data_set_of_a_pack_is_small_and_opens_its_file_for_itself(folder):
    clips = load_clips(folder, "split25")
    dataset = TAU22(clips, Sound(32000, pack=pack(folder)))
    first = dataset[3].waveform
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3].waveform, first)
    many = TAU22(clips.select(np.zeros(10000, int)), dataset.sound)
    assert len(pickle.dumps(many)) < 150 * 10000
    child = os.fork()
    if child == 0:  # its reading must not move the parent's place in the file
        os._exit(0 if torch.equal(dataset[3].waveform, first) else 1)
    assert os.waitpid(child, 0)[1] == 0 and torch.equal(dataset[3].waveform, first)


# Going on


class Killed(Exception):
    pass


def test_a_killed_packing_goes_on_where_it_was(folder, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 3)
    add = Packing.add

    def add_two(self, block):
        if len(self.blocks) == 2:  # the third is written, and not noted
            raise Killed
        add(self, block)

    monkeypatch.setattr(Packing, "add", add_two)
    with pytest.raises(Killed):
        packing.pack_clips(folder, CONFIG)
    assert not (folder / "pack" / "manifest.json").exists()
    read = []
    monkeypatch.setattr(Packing, "add", lambda self, block: read.extend(block.filename) or add(self, block))
    found = pack(folder)
    assert len(read) == 12 and found.damaged_blocks() == []  # of 18: those of two blocks are there
    whole = shutil.copytree(folder, folder.parent / "whole", ignore=shutil.ignore_patterns("pack"))
    assert_same(found, pack(whole))


def assert_same(one: Pack, other: Pack) -> None:
    """Clip by clip; the clips need not lie in the same order in the file."""
    assert one.filename.tolist() == other.filename.tolist()
    assert one.scale.tolist() == other.scale.tolist() and one.length.tolist() == other.length.tolist()
    for row in range(len(one)):
        samples = [np.empty(p.length[row], np.int16) for p in (one, other)]
        one.read(row, samples[0])
        other.read(row, samples[1])
        assert (samples[0] == samples[1]).all()


@pytest.mark.parametrize("harm", ["flip", "cut", "no samples", "cut journal"])
def test_harmed_remains_of_a_killed_packing_are_packed_again(folder, monkeypatch, harm):
    monkeypatch.setattr(packing, "_CHUNK", 3)
    finish = Packing.finish
    monkeypatch.setattr(Packing, "finish", lambda self, names: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        packing.pack_clips(folder, CONFIG)
    monkeypatch.setattr(Packing, "finish", finish)
    (samples,), (journal,) = (folder / "pack").glob("samples-*"), (folder / "pack").glob("journal-*")
    content = bytearray(samples.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        samples.write_bytes(content)
    elif harm == "cut":
        samples.write_bytes(content[:-7])
    elif harm == "no samples":
        samples.unlink()
    else:
        journal.write_bytes(journal.read_bytes()[:-30])
    found = pack(folder)
    assert len(found) == 18 and found.damaged_blocks() == []


def test_an_old_pack_serves_until_the_new_one_is_whole(folder, monkeypatch):
    old = pack(folder, sample_rate=16000)
    monkeypatch.setattr(Packing, "finish", lambda self, names: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        packing.pack_clips(folder, CONFIG)
    again = Pack(folder / "pack")
    assert again.path == old.path and again.damaged_blocks() == []
    monkeypatch.undo()
    assert pack(folder).rates.sample_rate == 32000 and not old.path.exists()


def test_a_whole_pack_is_left_alone_and_a_changed_recording_makes_it_anew(folder, capsys):
    first = pack(folder)
    assert pack(folder).path == first.path and "is whole: 18 clips" in capsys.readouterr().out
    soundfile.write(folder / first.filename[4].decode(), noise(99), SAMPLE_RATE, subtype="PCM_24")
    assert pack(folder).path != first.path and "1 recordings have changed" in capsys.readouterr().out


def test_a_damaged_pack_is_found_and_made_anew(folder, capsys):
    first = pack(folder)
    content = bytearray(first.path.read_bytes())
    content[1000] ^= 4
    first.path.write_bytes(content)
    assert pack(folder).damaged_blocks() == [] and "blocks of" in capsys.readouterr().out


# What does not fit


def test_the_pack_is_read_where_there_is_one(folder, capsys):
    assert sound_of(folder).pack is None and "WAV files" in capsys.readouterr().out
    pack(folder)
    assert sound_of(folder).pack is not None and "the pack" in capsys.readouterr().out
    assert sound_of(folder, read_from="wav").pack is None
    os.rename(folder / "pack", folder / "elsewhere")
    assert sound_of(folder, pack_dir=str(folder / "elsewhere")).pack is not None


def test_a_pack_of_another_rate_or_version(folder):
    found = pack(folder, sample_rate=16000)
    message = refusal(sound_of, folder)
    assert "16000 Hz" in message and "32000" in message and "--read_from wav" in message
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    (folder / "pack" / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    assert "version 2" in refusal(sound_of, folder) and len(found) == 18


@pytest.mark.parametrize("harm", ["no manifest's json", "no index", "no samples", "short samples", "index changed"])
def test_a_pack_that_is_not_whole(folder, harm):
    found = pack(folder)
    index = next((folder / "pack").glob("index-*"))
    if harm == "no manifest's json":
        (folder / "pack" / "manifest.json").write_text("{")
    elif harm == "no index":
        index.unlink()
    elif harm == "no samples":
        found.path.unlink()
    elif harm == "short samples":
        found.path.write_bytes(found.path.read_bytes()[:-2])
    else:
        index.write_bytes(index.read_bytes()[:-1] + b"x")
    message = refusal(sound_of, folder)
    assert str(folder / "pack") in message and "dcase.prepare --pack" in message


def test_a_pack_cut_short_while_it_is_read(folder):
    clips = load_clips(folder, "split25")
    dataset = TAU22(clips, Sound(32000, pack=pack(folder)))
    os.truncate(dataset.sound.pack.path, 5000)
    assert str(dataset.sound.pack.path) in refusal(lambda: dataset.__getitems__(range(16)))


def test_recordings_that_are_missing_or_changed(folder):
    clips = load_clips(folder, "split25")
    pack(folder)
    sound = sound_of(folder)
    clips.path(3).unlink()
    os.utime(clips.path(5), ns=(0, 0))
    message = refusal(with_sound, clips, sound)
    assert "2 of these 16 recordings" in message and clips.name(3) in message and "dcase.prepare --pack" in message
    shutil.rmtree(folder / "audio")  # a pack may be taken along without the recordings
    assert len(with_sound(clips, sound)) == 16


def test_a_clip_that_is_not_in_the_pack(folder):
    pack(folder)
    lists = folder / "split_setup" / "split25.csv"
    text, meta = lists.read_text(), (folder / "meta.csv").read_text()
    for path, content, row in (
        (lists, text, "audio/new.wav\ttram\n"),
        (folder / "meta.csv", meta, "audio/new.wav\ttram\tlisbon-1\ta\n"),
    ):
        path.write_text(content + row)
    shutil.copy(folder / load_clips(folder, "test").name(0), folder / "audio" / "new.wav")
    assert "lacks 1 of these 17 clips (audio/new.wav)" in refusal(
        with_sound, load_clips(folder, "split25"), sound_of(folder)
    )


def test_recordings_at_fault_stop_packing_with_their_name(folder):
    path = load_clips(folder, "split25").path(4)
    path.write_bytes(path.read_bytes()[:3000])
    assert str(path) in refusal(packing.pack_clips, folder, CONFIG)
    path.unlink()
    assert "1 of these 16 clips" in refusal(packing.pack_clips, folder, CONFIG)


def test_two_at_once(folder):
    from dcase.data.pack import only_one

    with only_one(folder / "pack"):
        assert "another process is packing" in refusal(packing.pack_clips, folder, CONFIG)


def test_a_full_disk_is_told_before_and_while(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    message = refusal(packing.pack_clips, folder, CONFIG)
    assert "GB free" in message and "--pack_dir" in message
    monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # in the processes that are forked
    message = refusal(packing.pack_clips, folder, CONFIG)
    assert "No space left" in message and "goes on behind it" in message
    monkeypatch.undo()
    assert len(pack(folder)) == 18


def test_flags(folder, monkeypatch, capsys):
    assert "--sample_rate" in refusal(lambda: PrepareConfig(sample_rate=0))
    assert "--subset" in refusal(lambda: PrepareConfig(subset=7))
    argv = ["prepare", "--dataset_dir", str(folder), "--pack", "--pack_dir", str(folder / "p"), "--num_workers", "1"]
    monkeypatch.setattr("sys.argv", argv)
    prepare.main()
    assert len(Pack(folder / "p")) == 18
