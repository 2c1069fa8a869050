"""Log-mel and augmentation."""

import math
from dataclasses import replace

import pytest
import torch
import torchaudio

from dcase.data.augment import Augment, AugmentConfig, Masking, freq_mixstyle, roll
from dcase.data.logmel import LogMel, LogMelConfig, empty_bins, fitting, frames_of, samples_for
from dcase.errors import UserError
from dcase.runs.config import parse_base


def noise(b=2, samples=44100, seed=0):
    return torch.randn(b, 1, samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def logmel(module, x, length=None):
    """The log-mel of sound at the recordings' rate."""
    length = torch.full((len(x),), x.shape[-1]) if length is None else length
    return module(*module.resampled(x, length))


def test_logmel_is_resample_mel_log_in_float64():
    """Against the definition: windowed DFT of reflected frames, triangular mel filters, log of the power + 1e-5."""
    config = LogMelConfig(sample_rate=8000, window_length=200, hop_length=100, n_fft=256, n_mels=20)
    x = noise(1, 1000)
    got = LogMel(config, 8000)(x)[0, 0]
    window = torch.zeros(256, dtype=torch.float64)
    window[28:228] = torch.hann_window(200, dtype=torch.float64)
    padded = torch.nn.functional.pad(x.double(), (128, 128), mode="reflect")[0, 0]
    frames = padded.unfold(0, 256, 100) * window
    power = torch.fft.rfft(frames).abs().square()  # (frames, 129)

    def mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    edges = [700 * (10 ** (m / 2595) - 1) for m in torch.linspace(mel(0), mel(4000), 22, dtype=torch.float64).tolist()]
    hz = torch.arange(129, dtype=torch.float64) * 8000 / 256
    filters = torch.stack(
        [
            torch.minimum((hz - lo) / (mid - lo), (hi - hz) / (hi - mid)).clamp(min=0)
            for lo, mid, hi in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    expected = torch.log(filters @ power.T + 1e-5)
    assert got.shape == expected.shape == (20, 11)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_default_shape_is_256_by_65_for_a_second():
    config = LogMelConfig()
    module = LogMel(config, 44100)
    assert logmel(module, noise()).shape == (2, 1, 256, 65)
    assert frames_of(config, 44100, 44100) == 65 and samples_for(config, 44100) is None
    assert frames_of(config, 441000, 44100) == logmel(module, noise(1, 441000)).shape[-1] == 641


@pytest.mark.parametrize(
    "samples, rate", [(44100, 44100), (16000, 16000), (48000, 48000), (44099, 44100), (12345, 22050)]
)
def test_frames_are_counted_as_they_come(samples, rate):
    config = LogMelConfig()
    assert frames_of(config, samples, rate) == logmel(LogMel(config, rate), noise(1, samples)).shape[-1]


@pytest.mark.parametrize("rate, f_max", [(16000, None), (16000, 12000.0), (22050, None), (8000, None)])
def test_mel_bins_above_the_recordings_are_told_with_flags_that_fit(rate, f_max):
    """The number of bins is that of the filters that lie above half the rate."""
    config = LogMelConfig(f_max=f_max)
    hz = torch.arange(config.n_fft // 2 + 1) * config.sample_rate / config.n_fft
    empty = (LogMel(config, rate).filters[hz < rate / 2].sum(0) == 0).sum()
    assert f"end at {rate / 2:g} Hz: the highest {empty} of the 256 mel bins" in empty_bins(config, rate)
    fits = fitting(config, rate)
    assert not empty_bins(fits, rate) and frames_of(fits, rate, rate) == 65 and fitting(fits, rate) == fits
    low = LogMelConfig(f_min=9000.0)
    assert "every mel bin is empty" in empty_bins(low, 16000) and fitting(low, 16000) == low


def test_the_flags_that_fit_16_khz_are_those_of_the_measured_runs():
    measured = LogMelConfig(sample_rate=16000, n_fft=2048, window_length=1536, hop_length=250)
    assert fitting(LogMelConfig(), 16000) == measured
    assert not empty_bins(LogMelConfig(), 44100) and not empty_bins(LogMelConfig(f_max=8000.0), 16000)


def test_target_length_crops_and_pads_with_the_log_of_silence():
    x = noise(1)
    full = logmel(LogMel(LogMelConfig(), 44100), x)
    assert torch.equal(logmel(LogMel(LogMelConfig(target_length=40), 44100), x), full[..., :40])
    padded = logmel(LogMel(LogMelConfig(target_length=100), 44100), x)
    assert torch.equal(padded[..., :65], full)
    torch.testing.assert_close(padded[..., 65:], torch.full((1, 1, 256, 35), math.log(1e-5)))
    silence = logmel(LogMel(LogMelConfig(), 44100), torch.zeros(1, 1, 44100))
    torch.testing.assert_close(silence, torch.full((1, 1, 256, 65), math.log(1e-5)))


@pytest.mark.parametrize("target_length, rate, hop", [(20, 44100, 500), (40, 16000, 501), (60, 32000, 512)])
def test_what_is_not_read_for_a_target_length_does_not_matter(target_length, rate, hop):
    config = LogMelConfig(target_length=target_length, hop_length=hop)
    x = noise(1, 2 * rate)
    samples = samples_for(config, rate)
    assert samples < x.shape[-1]
    module = LogMel(config, rate)
    torch.testing.assert_close(logmel(module, x[..., :samples]), logmel(module, x), rtol=1e-4, atol=1e-4)


def test_clips_of_several_lengths_in_one_batch_are_each_taken_at_their_own():
    module = LogMel(LogMelConfig(target_length=80), 44100)
    clips = [noise(1, samples, seed) for seed, samples in enumerate((44100, 30000, 60000, 30000))]
    length = torch.tensor([clip.shape[-1] for clip in clips])
    batch = torch.cat([torch.nn.functional.pad(clip, (0, 60000 - clip.shape[-1])) for clip in clips])
    torch.testing.assert_close(logmel(module, batch, length), torch.cat([logmel(module, clip) for clip in clips]))


def test_clips_too_short_for_a_window():
    with pytest.raises(UserError, match="too short for --n_fft 4096"):
        frames_of(LogMelConfig(target_length=65), 2000, 32000)


def test_normalisation_gives_mean_0_and_deviation_1_and_is_all_that_is_stored():
    module = LogMel(LogMelConfig(), 44100)
    batches = [noise(3, seed=1), noise(2, seed=2)]
    module.fit((batch, None) for batch in batches)
    x = torch.cat([module(batch) for batch in batches]).double()
    assert abs(x.mean().item()) < 1e-4 and abs(x.std(correction=0).item() - 1) < 1e-4
    assert set(module.state_dict()) == {"mean", "std"}


def test_autocast_does_not_touch_the_front_end():
    module, x = LogMel(LogMelConfig(), 44100), noise(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), module(x.clone())) and module(x).dtype == torch.float32
        inside = module(x)
    assert torch.equal(inside, module(x))


@pytest.mark.parametrize(
    "field, value",
    [("n_mels", 0), ("hop_length", -5), ("f_max", 20000.0), ("window_length", 5000), ("target_length", 0)],
)
def test_impossible_front_ends_name_the_flag(field, value):
    with pytest.raises(UserError, match=f"--{field}"):
        LogMelConfig(**{field: value})


def test_roll_moves_each_clip_by_its_own_shift_and_wraps_around():
    torch.manual_seed(0)
    x = torch.arange(50.0).expand(200, 1, 50)
    whole = torch.full((200,), 50)
    y = roll(x, 7, whole)
    shifts = set()
    for clip in y[:, 0]:
        shift = int(clip.argmin())
        shift = shift - 50 if shift > 25 else shift
        assert torch.equal(clip, torch.arange(50.0).roll(shift))
        shifts.add(shift)
    assert shifts == set(range(-7, 8))
    assert torch.equal(roll(x, 0, whole), x)


def test_roll_leaves_padding_where_it_is():
    torch.manual_seed(0)
    x = torch.cat([torch.arange(1.0, 31), torch.zeros(20)]).expand(50, 1, 50)
    y = roll(x, 9, torch.full((50,), 30))
    assert (y[..., 30:] == 0).all() and not torch.equal(x, y)
    assert torch.equal(y[..., :30].sort(-1).values, x[..., :30])


def test_mixstyle_keeps_the_content_and_mixes_the_statistics():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    x = torch.randn(2, 1, 6, 200) * scale + 10 * scale
    y = freq_mixstyle(x, p=1.0, alpha=0.5)

    def standard(v):
        return (v - v.mean((1, 3), keepdim=True)) / v.std((1, 3), keepdim=True)

    torch.testing.assert_close(standard(y), standard(x), rtol=1e-3, atol=1e-3)
    means = y.mean((1, 3))
    low, high = x.mean((1, 3)).min(0).values - 1e-3, x.mean((1, 3)).max(0).values + 1e-3
    assert ((means >= low) & (means <= high)).all()


def test_mixstyle_tosses_one_coin_for_the_batch():
    torch.manual_seed(0)
    x = torch.randn(16, 1, 4, 30) * torch.rand(16, 1, 1, 1)
    changed = [(freq_mixstyle(x, p=0.4, alpha=5.0) != x).flatten(1).any(1).float().mean().item() for _ in range(400)]
    touched = sum(share > 0 for share in changed) / 400
    assert 0.32 < touched < 0.48
    assert all(share == 0 or share > 0.6 for share in changed)  # the whole batch, but for clips paired with themselves
    assert torch.equal(freq_mixstyle(x, p=0.0, alpha=0.5), x)


def test_masks_are_filled_with_0_and_stay_within_their_limits():
    torch.manual_seed(0)
    x = torch.ones(100, 1, 256, 65)
    y = Masking(AugmentConfig(), 256, 65)(x)
    rows, columns = (y == 0).all(3).sum(2).flatten(), (y == 0).all(2).sum(2).flatten()
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert 40 < rows.max() <= 48 and 10 < columns.max() <= 13  # 13 = a fifth of 65 frames
    assert len(rows.unique()) > 10  # each clip its own mask
    uncapped = Masking(AugmentConfig(timem_max_fraction=1.0, freqm=0), 256, 65)(x)
    assert (uncapped == 0).all(2).sum(2).max() > 50
    assert torch.equal(Masking(AugmentConfig(freqm=0, timem=0), 256, 65)(x), x)


def baselines_log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """The log-mel that the DCASE2025 baseline trains on, in plain torch: mel, masks, logarithm, Freq-MixStyle.

    waveform (b, 1, samples) at 32 kHz, already rolled; the masks are drawn first, then MixStyle's coin, weights, order.
    """
    mel = torchaudio.transforms.MelSpectrogram(32000, 4096, 3072, 500, n_mels=256)(waveform)
    mel = torchaudio.transforms.FrequencyMasking(48, iid_masks=True)(mel)
    x = (mel + 1e-5).log()
    assert torch.rand(()) < 0.4
    weight = torch.distributions.Beta(0.3, 0.3).sample((len(x), 1, 1, 1))
    other = torch.randperm(len(x))
    mean, std = x.mean((1, 3), keepdim=True), (x.var((1, 3), keepdim=True) + 1e-6).sqrt()
    std_of_both = weight * std + (1 - weight) * std[other]
    return (x - mean) / std * std_of_both + weight * mean + (1 - weight) * mean[other]


@pytest.mark.parametrize("normalised, atol", [(False, 1e-4), (True, 2e-3)])  # MixStyle's 1e-6 is in other units then
def test_cp_mobiles_defaults_augment_as_the_baseline_does(normalised, atol):
    config, _ = parse_base("", ["--model", "cp_mobile"])
    module, waveform = LogMel(config.logmel, 44100), noise(6, 32000) * torch.logspace(-3, 0, 6)[:, None, None]
    if normalised:  # --normalise True
        module.mean.fill_(-4.0)
        module.std.fill_(2.5)
    augment = Augment(config.augment, config.logmel, 65)
    torch.manual_seed(3)  # the coin says yes
    expected = (baselines_log_mel(waveform) - module.mean) / module.std
    torch.manual_seed(3)
    x, mix = augment.log_mel(module(waveform), module.silence)
    torch.testing.assert_close(x, expected, rtol=0, atol=atol)
    assert mix.weight is None
    torch.manual_seed(3)
    last, _ = Augment(replace(config.augment, mask_on="log_mel"), config.logmel, 65).log_mel(module(waveform))
    assert (last - expected).abs().max() > 1


def test_masks_longer_than_the_log_mel_are_cut():
    torch.manual_seed(0)
    y = Masking(AugmentConfig(freqm=400, timem=400, timem_max_fraction=1.0), 20, 10)(torch.ones(500, 1, 20, 10))
    assert (y != 0).any()


def test_resampling_is_torchaudios():
    x = noise(1)
    expected = torchaudio.functional.resample(x, 44100, 32000)
    torch.testing.assert_close(LogMel(LogMelConfig(), 44100).resample(x), expected)


def test_a_padded_clip_is_as_long_as_it_is_when_it_is_resampled_alone():
    config = LogMelConfig(sample_rate=8000, window_length=256, n_fft=256, hop_length=128, n_mels=32)
    logmel = LogMel(config, 11025)
    lengths = [1001, 500]
    _, found = logmel.resampled(torch.zeros(2, 1, 1001), torch.tensor(lengths))
    assert found.tolist() == [logmel.resample(torch.zeros(1, n)).shape[-1] for n in lengths]
