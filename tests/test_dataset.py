"""Reading sound: one file, a data set's batches, from WAV files and from a pack."""

import pickle
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal
from data_folder import SAMPLE_RATE, clip_row, noise, write_data_folder, write_fault, write_lists
from torch.utils.data import DataLoader

from dcase.data.dataset import TAU22, Batch, Sound
from dcase.data.sound import read_wav
from dcase.data.tau22 import DEVICES, SCENES, load_clips

WAV = Sound(SAMPLE_RATE)


@pytest.fixture
def clips(tmp_path):
    write_data_folder(tmp_path)
    return load_clips(tmp_path, "split25")


@pytest.mark.parametrize(
    ("subtype", "step"), [("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-31), ("FLOAT", 0), ("DOUBLE", 0)]
)
def test_bit_depths(tmp_path, subtype, step):
    soundfile.write(tmp_path / "a.wav", noise(0), SAMPLE_RATE, subtype=subtype)
    waveform = read_wav(tmp_path / "a.wav", SAMPLE_RATE)
    assert waveform.shape == (1, 4410) and waveform.dtype == torch.float32
    np.testing.assert_allclose(waveform[0].numpy(), noise(0), rtol=1e-7, atol=step)


def test_stereo_is_mixed_down(tmp_path):
    both = np.stack([noise(0), noise(1)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_wav(tmp_path / "a.wav", SAMPLE_RATE).numpy(), both.mean(1)[None], atol=1e-7)


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_other_rate_is_resampled(tmp_path, rate):
    """A tone of 1 kHz stays one of 1 kHz, of the same level and phase, whatever the rate in the file."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate // 10) / rate)
    soundfile.write(tmp_path / "a.wav", 0.5 * tone, rate, subtype="PCM_24")
    waveform = read_wav(tmp_path / "a.wav", 32000)
    assert waveform.shape == (1, 3200)
    middle = slice(200, 3000)  # the edges see the silence around the file
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(3200) / 32000)
    np.testing.assert_allclose(waveform[0, middle].numpy(), expected[middle], atol=5e-3)


def test_rate_that_would_take_gigabytes_to_resample(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0), 44101)
    message = refusal(read_wav, tmp_path / "a.wav", 31999)
    assert str(tmp_path / "a.wav") in message and "44101 Hz" in message and "31999 Hz" in message


def test_a_header_of_1_hz_is_not_believed(tmp_path):
    """A second of sound would be resampled to 12 hours, 8 GB."""
    soundfile.write(tmp_path / "a.wav", noise(0), 1)
    assert "a.wav has 1 Hz, too odd a ratio" in refusal(read_wav, tmp_path / "a.wav", 44100)


def test_samples_that_no_recording_has_are_refused_with_the_files_name(tmp_path):
    """Their log-mel would not be finite, and the message would be about --lr."""
    soundfile.write(tmp_path / "a.wav", noise(0) * 3e38, SAMPLE_RATE, subtype="FLOAT")
    assert "a.wav is no recording, too loud" in refusal(read_wav, tmp_path / "a.wav", SAMPLE_RATE)
    soundfile.write(tmp_path / "b.wav", noise(0) * 32767, SAMPLE_RATE, subtype="FLOAT")  # unscaled integers
    assert read_wav(tmp_path / "b.wav", SAMPLE_RATE).abs().max() > 1000


@pytest.mark.parametrize(
    "fault", ["missing", "no bytes", "text", "truncated", "truncated header", "no samples", "nan", "inf"]
)
def test_bad_sound_is_named(tmp_path, fault):
    path = tmp_path / "clip.wav"
    write_fault(path, fault)
    message = refusal(read_wav, path, SAMPLE_RATE)
    assert str(path) in message and "python -m dcase.prepare" in message


def test_file_of_unknown_length_is_not_truncated(tmp_path):
    """Programs that write into a pipe leave all ones where the length belongs."""
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(0), SAMPLE_RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    length = content.index(b"data") + 4
    content[4:8] = content[length : length + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert read_wav(path, SAMPLE_RATE).shape == (1, 4410)


# The data set


def test_items_and_batches_are_clips(clips):
    dataset = TAU22(clips, WAV)
    assert len(dataset) == 16 and dataset.n_samples == 4410
    clip = dataset[9]
    assert (clip.scene, clip.device, clip.index) == (SCENES.index("tram"), DEVICES.index("s1"), 9)
    np.testing.assert_allclose(clip.waveform[0].numpy(), noise(9), atol=2**-23)
    loader = DataLoader(TAU22(clips, Sound(32000)), batch_size=3, num_workers=1, collate_fn=lambda batch: batch)
    batch = next(iter(loader))
    assert isinstance(batch, Batch) and batch.waveform.shape == (3, 1, 3200) and batch.device.tolist() == [0, 3, 0]
    assert batch.index.tolist() == [0, 1, 2] and batch.scene.dtype == torch.int64
    assert batch.sample_rate == 32000 and batch.scale.tolist() == [1, 1, 1] and batch.length.tolist() == [3200] * 3


def test_data_set_is_small_to_pickle(clips):
    dataset = pickle.loads(pickle.dumps(TAU22(clips, WAV)))
    assert torch.equal(dataset[3].waveform, TAU22(clips, WAV)[3].waveform)
    assert len(pickle.dumps(TAU22(clips.select(np.zeros(10000, int)), WAV))) < 100 * 10000


@pytest.mark.parametrize("n_samples", [4409, 4411, 44100])
def test_clip_of_another_length(clips, n_samples):
    soundfile.write(clips.path(5), noise(5, n_samples), SAMPLE_RATE)
    dataset = TAU22(clips, WAV)
    assert dataset[4].waveform.shape == (1, 4410)
    message = refusal(dataset.__getitem__, 5)
    assert str(clips.path(5)) in message and "--target_length" in message and str(n_samples) in message


def test_with_max_samples_any_length_will_do_and_longer_ones_are_cut(clips):
    soundfile.write(clips.path(5), noise(5, 3000), SAMPLE_RATE)
    dataset = TAU22(clips, Sound(SAMPLE_RATE, max_samples=4000))
    whole = read_wav(clips.path(2), SAMPLE_RATE)
    assert dataset.n_samples == 4000 and torch.equal(dataset[2].waveform, whole[:, :4000])
    batch = dataset.__getitems__([2, 5])
    assert batch.waveform.shape == (2, 1, 4000) and batch.length.tolist() == [4000, 3000]
    assert (batch.waveform[1, :, 3000:] == 0).all()


def test_like_sets_the_length_of_another_data_set(clips):
    train = TAU22(clips.select([0, 1]), WAV)
    for row in (2, 3):
        soundfile.write(clips.path(row), noise(row, 3000), SAMPLE_RATE)
    assert "--target_length" in refusal(lambda: TAU22(clips.select([2, 3]), WAV, like=train)[0])


def test_ten_second_clips(tmp_path):
    """TAU 2020 Mobile has the same layout with clips of 10 s."""
    rows = [clip_row("bus", "lyon", 1, 0, "a"), clip_row("bus", "lyon", 2, 0, "a")]
    write_lists(tmp_path, rows[:1], rows[1:])
    (tmp_path / "audio").mkdir()
    for name, *_ in rows:
        soundfile.write(tmp_path / name, noise(0, 441000), SAMPLE_RATE)
    dataset = TAU22(load_clips(tmp_path, "test"), Sound(32000))
    assert dataset.n_samples == 320000 and dataset[0].waveform.shape == (1, 320000)


def test_no_clip_left(clips):
    assert re.search("no clip of .* is left", refusal(TAU22, clips.select([]), WAV))
