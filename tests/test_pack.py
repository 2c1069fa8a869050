"""Packing: what is in a pack, how a killed packing goes on, and what a pack that does not fit ends in."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, refusal
from data_folder import SAMPLE_RATE, noise, write_data_folder
from hypothesis import example, given
from hypothesis import strategies as st

from dcase import prepare
from dcase.data import packing
from dcase.data.dataset import TAU22, Sound
from dcase.data.loading import open_sound, with_sound
from dcase.data.pack import Pack, Rates, checksum, read_manifest
from dcase.data.packing import pack_clips, quantise
from dcase.data.sound import read_wav
from dcase.data.tau22 import DataConfig, load_clips
from dcase.prepare import PrepareConfig
from dcase.runs.config import TrainConfig

CONFIG = PrepareConfig(pack=True, num_workers=0)


@pytest.fixture
def folder(tmp_path):
    write_data_folder(tmp_path)
    return tmp_path


@pytest.fixture
def clips(folder):
    return load_clips(folder, "split25")


def pack(folder: Path, **options) -> Pack:
    pack_clips(folder, PrepareConfig(**{"pack": True, "num_workers": 0, **options}))
    return Pack(folder / "pack")


def sound_of(folder: Path, **options) -> Sound:
    return open_sound(TrainConfig(data=DataConfig(**options)), folder)[1]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@example([0.9330630898475647, 0.8958311080932617], 1.0)  # half a step and float32's rounding
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.sampled_from([1.0, 1e-3, 1e-6, 1e-30, 1e-40]))
def test_quantising_is_off_by_half_a_step_at_most(samples, level):
    waveform = (np.array(samples, np.float32) * np.float32(level)).astype(np.float32)
    ints, scale = quantise(waveform)
    assert ints.dtype == np.int16 and scale == np.float32(scale)
    error = np.abs(ints * scale - waveform).max()
    assert error <= max(np.abs(waveform).max() / 65000, np.finfo(np.float32).tiny)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_holds_every_clip_resampled(folder, workers, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 5)
    found, resample = pack(folder, num_workers=workers), torchaudio.transforms.Resample(SAMPLE_RATE, 32000)
    assert len(found) == 18 and found.rates == Rates(SAMPLE_RATE, 32000) and found.damaged_blocks() == 0
    for split in ("split25", "test"):
        clips = load_clips(folder, split)
        dataset = TAU22(clips, Sound(32000, pack=found))
        for i in range(len(clips)):
            expected = resample(read_wav(clips.path(i), SAMPLE_RATE))
            assert (dataset[i].waveform - expected).abs().max() <= expected.abs().max() / 65000 + 1e-7
    assert {path.name.partition("-")[0] for path in (folder / "pack").iterdir()} == {
        ".lock", "manifest.json", "index", "samples",
    }  # fmt: skip


def test_a_quiet_recording_keeps_sixteen_bits(folder, clips):
    quiet = noise(3) * 2e-5  # its peak is 2 to 3 steps of a 16-bit file
    soundfile.write(clips.path(0), quiet, SAMPLE_RATE, subtype="PCM_24")
    dataset = TAU22(clips, Sound(SAMPLE_RATE, pack=pack(folder, sample_rate=SAMPLE_RATE)))
    written = soundfile.read(clips.path(0))[0]
    assert np.abs(dataset[0].waveform[0].numpy() - written).max() <= np.abs(written).max() / 65000


def test_batches_of_a_pack_are_those_of_the_files(folder, clips):
    sound = Sound(SAMPLE_RATE, pack=pack(folder, sample_rate=SAMPLE_RATE))
    rows = [7, 0, 15, 3]
    packed, read = TAU22(clips, sound).__getitems__(rows), TAU22(clips, Sound(SAMPLE_RATE)).__getitems__(rows)
    assert packed.waveform.dtype == torch.int16
    torch.testing.assert_close(packed.waveform * packed.scale.view(-1, 1, 1), read.waveform, rtol=0, atol=1e-5)
    for field in ("length", "scene", "device", "index"):
        assert torch.equal(getattr(packed, field), getattr(read, field))


def test_clips_of_any_length_are_padded_and_cut(folder, clips):
    soundfile.write(clips.path(2), noise(2, 3000), SAMPLE_RATE)
    found = pack(folder, sample_rate=SAMPLE_RATE)
    assert "--target_length" in refusal(TAU22, clips, Sound(SAMPLE_RATE, pack=found))
    batch = TAU22(clips, Sound(SAMPLE_RATE, 4000, found)).__getitems__([1, 2])
    assert batch.waveform.shape == (2, 1, 4000) and batch.length.tolist() == [4000, 3000]
    assert (batch.waveform[1, :, 3000:] == 0).all()


def test_data_set_of_a_pack_is_small_and_opens_its_file_for_itself(folder, clips):
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


def pack_until_killed(folder: Path, monkeypatch, n_blocks: int) -> None:
    """Pack in blocks of 3 clips, and end as if killed when so many of the 6 are written."""
    work = packing.over_all_cores

    def some(*args):
        yield from islice(work(*args), n_blocks)
        raise Killed

    monkeypatch.setattr(packing, "_CHUNK", 3)
    monkeypatch.setattr(packing, "over_all_cores", some)
    with pytest.raises(Killed):
        pack_clips(folder, CONFIG)
    monkeypatch.setattr(packing, "over_all_cores", work)


def assert_same(one: Pack, other: Pack) -> None:
    """Clip by clip; the clips need not lie in the same order in the file."""
    assert one.damaged_blocks() == other.damaged_blocks() == 0
    assert one.filename.tolist() == other.filename.tolist()
    assert one.scale.tolist() == other.scale.tolist() and one.length.tolist() == other.length.tolist()
    for row in range(len(one)):
        samples = [np.empty(p.length[row], np.int16) for p in (one, other)]
        one.read(row, samples[0])
        other.read(row, samples[1])
        assert (samples[0] == samples[1]).all()


@pytest.mark.parametrize(
    "harm, kept",
    [("none", 15), ("not noted", 15), ("flip", 6), ("cut", 12), ("no samples", 0), ("cut journal", 12), ("changed", 0)],
)
def test_a_killed_packing_goes_on_behind_what_is_whole(folder, clips, monkeypatch, capsys, harm, kept):
    pack_until_killed(folder, monkeypatch, 5)
    assert not (folder / "pack" / "manifest.json").exists()
    (samples,), (journal,) = (folder / "pack").glob("samples-*"), (folder / "pack").glob("journal-*")
    if harm == "not noted":
        samples.write_bytes(samples.read_bytes() + b"half a block")
    elif harm == "flip":
        flip_a_bit(samples)
    elif harm == "cut":
        os.truncate(samples, samples.stat().st_size - 7)
    elif harm == "no samples":
        samples.unlink()
    elif harm == "cut journal":
        os.truncate(journal, journal.stat().st_size - 30)
    elif harm == "changed":
        os.utime(clips.path(0), ns=(0, 0))
    found = pack(folder)
    said = capsys.readouterr().out
    assert f"{kept} of 18 clips are packed already" in said if kept else "already" not in said
    assert_same(found, pack(shutil.copytree(folder, folder / "whole", ignore=shutil.ignore_patterns("pack"))))


def test_a_killed_packing_of_other_clips_or_rates(folder, monkeypatch, capsys):
    pack_until_killed(folder, monkeypatch, 5)
    shutil.copy(folder / "split_setup" / "test.csv", folder / "split_setup" / "split5.csv")  # 2 of the 18 clips
    assert len(pack(folder, subset=5)) == 2 and "already" not in capsys.readouterr().out
    pack_until_killed(folder, monkeypatch, 5)
    assert pack(folder, sample_rate=16000).rates.sample_rate == 16000 and "already" not in capsys.readouterr().out


def test_an_old_pack_serves_until_the_new_one_is_whole(folder, monkeypatch):
    old = pack(folder, sample_rate=16000)
    pack_until_killed(folder, monkeypatch, 6)
    again = Pack(folder / "pack")
    assert again.path == old.path and again.damaged_blocks() == 0
    assert pack(folder).rates.sample_rate == 32000 and not old.path.exists()


def test_a_whole_pack_stays_and_a_changed_recording_or_a_damaged_block_makes_it_anew(folder, capsys):
    first = pack(folder)
    (folder / "pack" / first.path.name.replace("samples", "journal").replace("i16", "jsonl")).touch()
    assert pack(folder).path == first.path and "is whole: 18 clips" in capsys.readouterr().out
    assert not list((folder / "pack").glob("journal-*"))
    soundfile.write(folder / first.filename[4].decode(), noise(99), SAMPLE_RATE, subtype="PCM_24")
    second = pack(folder)
    assert second.path != first.path and "1 of these 16 recordings" in capsys.readouterr().out
    flip_a_bit(second.path)
    assert pack(folder).damaged_blocks() == 0 and "1 blocks of" in capsys.readouterr().out


# What does not fit


def test_the_pack_is_read_where_there_is_one(folder, capsys):
    assert sound_of(folder).pack is None and "WAV files" in capsys.readouterr().out
    pack(folder)
    assert sound_of(folder).pack is not None and "the pack" in capsys.readouterr().out
    assert sound_of(folder, read_from="wav").pack is None
    os.rename(folder / "pack", folder / "elsewhere")
    assert sound_of(folder, pack_dir=str(folder / "elsewhere")).pack is not None


def test_recordings_say_their_rate_to_the_pack_and_to_training(folder, capsys):
    for i, path in enumerate(sorted((folder / "audio").iterdir())):
        soundfile.write(path, noise(i, 1600), 16000)
    config, sound = open_sound(TrainConfig(), folder)
    assert config.data.orig_sample_rate == sound.sample_rate == 16000
    assert pack(folder).rates == Rates(16000, 32000)
    config, sound = open_sound(TrainConfig(), folder)
    assert config.data.orig_sample_rate == 16000 and sound.pack
    assert (
        open_sound(TrainConfig(data=DataConfig(orig_sample_rate=44100, read_from="wav")), folder)[1].sample_rate
        == 44100
    )
    capsys.readouterr()
    pack(folder, orig_sample_rate=44100)  # as one made before files said their rate
    message = refusal(sound_of, folder)
    assert f"make it again with `python -m dcase.prepare --dataset_dir {folder} --pack`," in message
    message = refusal(partial(sound_of, orig_sample_rate=22050, pack_dir=f"{folder}/pack"), folder)
    assert f"--pack --pack_dir {folder}/pack --orig_sample_rate 22050`" in message
    capsys.readouterr()
    assert pack(folder).rates == Rates(16000, 32000) and "making it anew" in capsys.readouterr().out
    shutil.rmtree(folder / "audio")
    assert open_sound(TrainConfig(), folder)[0].data.orig_sample_rate == 16000  # the pack tells it


def test_mixed_rates_are_resampled_to_the_most_frequent_one(folder, capsys):
    rates = [16000] * 9 + [48000] * 8 + [1]  # a header of 1 Hz says nothing
    for path, rate in zip(sorted((folder / "audio").iterdir()), rates, strict=True):
        soundfile.write(path, noise(0, max(1, rate // 10)), rate)
    assert sound_of(folder).sample_rate == 16000
    assert "recordings of 48000 Hz are resampled to 16000 Hz" in capsys.readouterr().out
    assert sound_of(folder, orig_sample_rate=8000).sample_rate == 8000


def test_a_manifest_with_other_rates_is_refused_though_its_checksum_is_right(folder):
    pack(folder)
    path = folder / "pack" / "manifest.json"
    for rates in ({"orig_sample_rate": 1}, {"sample_rate": 16000}):
        manifest = read_manifest(path.parent) | rates
        path.write_text(json.dumps({**manifest, "manifest_sha256": checksum(manifest)}))
        assert "was resampled from" in refusal(sound_of, folder)
        pack(folder)


def test_a_pack_of_another_rate_or_version(folder):
    pack(folder, sample_rate=16000)
    message = refusal(sound_of, folder)
    assert "16000 Hz" in message and "32000" in message and "--read_from wav" in message
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    (folder / "pack" / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    assert "version 2" in refusal(sound_of, folder)


@pytest.mark.parametrize("harm", ["no json", "other manifest", "no index", "no samples", "short samples", "index"])
def test_a_pack_that_is_not_whole(folder, harm):
    found = pack(folder)
    manifest, (index,) = folder / "pack" / "manifest.json", (folder / "pack").glob("index-*")
    if harm == "no json":
        manifest.write_text("{")
    elif harm == "other manifest":
        manifest.write_text(manifest.read_text().replace("32000", "16000"))
    elif harm == "no index":
        index.unlink()
    elif harm == "no samples":
        found.path.unlink()
    elif harm == "short samples":
        found.path.write_bytes(found.path.read_bytes()[:-2])
    else:
        flip_a_bit(index)
    message = refusal(sound_of, folder)
    assert str(folder / "pack") in message and " --pack`, or read the WAV files" in message


def test_a_pack_cut_short_while_it_is_read(folder, clips):
    dataset = TAU22(clips, Sound(32000, pack=pack(folder)))
    os.truncate(dataset.sound.pack.path, 5000)
    assert str(dataset.sound.pack.path) in refusal(lambda: dataset.__getitems__(range(16)))


def test_recordings_that_are_missing_or_changed(folder, clips):
    pack(folder)
    sound = sound_of(folder)
    clips.path(3).unlink()
    os.utime(clips.path(5), ns=(0, 0))
    message = refusal(with_sound, clips, sound)
    assert "2 of these 16 recordings" in message and clips.name(3) in message and " --pack`" in message
    shutil.rmtree(folder / "audio")  # a pack may be taken along without the recordings
    assert len(with_sound(clips, sound)) == 16


def test_a_clip_that_is_not_in_the_pack(folder, clips):
    pack(folder)
    clips.filenames[3] = b"audio/new.wav"
    message = refusal(with_sound, clips, sound_of(folder))
    assert "lacks 1 of these 16 clips (audio/new.wav)" in message
    assert f"make it again with `python -m dcase.prepare --dataset_dir {folder} --pack`" in message


def test_recordings_at_fault_stop_packing_with_their_name(folder, clips):
    path = clips.path(4)
    path.write_bytes(path.read_bytes()[:3000])
    assert str(path) in refusal(pack, folder)
    path.unlink()
    assert "1 of these 16 clips" in refusal(pack, folder)


def test_two_at_once(folder):
    (folder / "pack").mkdir()
    hold = "import pathlib, sys\nfrom dcase.files import only_one\n"
    hold += "with only_one(pathlib.Path(sys.argv[1]), ''): print(flush=True); input()"
    command = [sys.executable, "-c", hold, folder / "pack"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert f"{folder / 'pack'} is in use by process {other.pid} on " in refusal(pack, folder)
        other.stdin.close()


def test_an_id_that_leads_out_of_the_folder_is_refused(folder, tmp_path):
    pack(folder)
    path = folder / "pack" / "manifest.json"
    manifest = json.loads(path.read_text())
    for kind, end in (("samples", "i16"), ("index", "npz")):
        (folder / "pack" / f"{kind}-x").mkdir()
        (folder / "pack" / f"{kind}-{manifest['id']}.{end}").rename(folder / f"evil.{end}")
    manifest["id"] = "x/../../evil"
    del manifest["manifest_sha256"]
    path.write_text(json.dumps({**manifest, "manifest_sha256": checksum(manifest)}))
    assert f"{path} cannot be read (id: String should match pattern" in refusal(Pack, folder / "pack")


def test_a_full_disk_is_told_before_and_while(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        message = refusal(pack, folder)
    assert "GB free" in message and "--pack_dir" in message
    monkeypatch.setattr(packing, "_CHUNK", 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as it does on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # 2 of 6 blocks, and a part of the third
        message = refusal(pack, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert f"{folder / 'pack'} cannot be written (File too large)" in message and "goes on behind it" in message
    assert len(pack(folder)) == 18 and "6 of 18 clips are packed already" in capsys.readouterr().out


def test_flags(folder, monkeypatch):
    assert "--sample_rate" in refusal(lambda: PrepareConfig(sample_rate=0))
    assert "--subset" in refusal(lambda: PrepareConfig(subset=7))
    argv = ["prepare", "--dataset_dir", str(folder), "--pack", "--pack_dir", str(folder / "p"), "--num_workers", "1"]
    monkeypatch.setattr("sys.argv", argv)
    prepare.main()
    assert len(Pack(folder / "p")) == 18
