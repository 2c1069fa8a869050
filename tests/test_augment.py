"""Device responses, mixup, and the responses of SynthTAU's further devices."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal

from dcase.data import synth
from dcase.data.augment import AugmentConfig, Mix
from dcase.data.responses import DeviceResponses
from dcase.data.tau22 import DEVICES

RATE = 8000  # Hz
A = DEVICES.index("a")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(x):
    return torch.full((len(x),), x.shape[-1])


def devices(*names):
    return torch.tensor([DEVICES.index(name) for name in names])


def write(folder: Path, name: str, samples, rate=RATE, subtype="FLOAT"):
    soundfile.write(folder / name, np.asarray(samples), rate, subtype=subtype)


def load(folder, p=1.0):
    return DeviceResponses.from_folder(folder, RATE, p)


def bands(taps, rate: int, octaves: int) -> np.ndarray:
    """Levels, dB, in third octaves from 50 Hz on, of an impulse response (samples,), as if of unit energy."""
    power = np.abs(np.fft.rfft(taps / np.linalg.norm(taps), rate)) ** 2 / rate  # per Hz, of a bin each
    edges = (50 * 2 ** (np.arange(3 * octaves + 1) / 3)).astype(int)
    return np.array([10 * np.log10(power[low:high].sum()) for low, high in zip(edges, edges[1:], strict=False)])


@pytest.mark.parametrize("taps, samples", [(1, 300), (40, 300), (299, 300), (300, 300), (1000, 300), (7, 4097)])
def test_clips_of_device_a_are_convolved_and_others_left_alone(taps, samples):
    response, x = random(taps, seed=1), random(5, 1, samples)
    y = DeviceResponses([response], 1.0)(x, devices("a", "b", "a", "s1", "s6"), whole(x))
    unit = response.double().numpy() / np.linalg.norm(response.double().numpy())
    for k in (0, 2):
        expected = np.convolve(x[k, 0].double().numpy(), unit)[:samples]
        np.testing.assert_allclose(y[k, 0].numpy(), expected, rtol=0, atol=1e-5)
    for k in (1, 3, 4):
        assert torch.equal(y[k], x[k])


def test_p_0_changes_nothing_and_p_a_half_half_of_the_clips():
    torch.manual_seed(0)
    x = random(2000, 1, 20)
    device = torch.full((2000,), A)
    responses = [random(3, seed=seed) for seed in range(1, 5)]
    assert torch.equal(DeviceResponses(responses, 0.0)(x, device, whole(x)), x)
    y = DeviceResponses(responses, 0.5)(x, device, whole(x))
    changed = (y != x).flatten(1).any(1)
    assert 0.46 < changed.float().mean() < 0.54
    each = torch.stack([DeviceResponses([r], 1.0)(x, device, whole(x)) for r in responses])
    nearest = (each - y).abs().amax((2, 3)).min(0)  # (2000,): which response it was
    assert (nearest.values[changed] < 1e-5).all()
    assert (nearest.indices[changed].bincount(minlength=4) > 0.2 * changed.sum()).all()


def test_the_seed_alone_decides_whoever_else_is_in_the_batch():
    module, x = DeviceResponses([random(9, seed=seed) for seed in range(1, 9)], 0.5), random(30, 1, 50)
    torch.manual_seed(3)
    all_a = module(x, torch.full((30,), A), whole(x))
    after = torch.rand(())
    torch.manual_seed(3)
    mixed = module(x, devices(*"aab" * 10), whole(x))
    assert torch.rand(()) == after
    is_a = torch.tensor([True, True, False] * 10)
    assert torch.equal(mixed[~is_a], x[~is_a]) and not torch.equal(all_a, x)
    torch.testing.assert_close(mixed[is_a], all_a[is_a])


def test_padding_stays_0_and_clips_are_as_without_it():
    module = DeviceResponses([random(60, seed=1)], 1.0)
    x, length = random(3, 1, 200), torch.tensor([200, 120, 1])
    for clip, samples in zip(x, length.tolist(), strict=True):
        clip[:, samples:] = 0
    y = module(x, torch.full((3,), A), length)
    for k, samples in enumerate(length.tolist()):
        assert (y[k, :, samples:] == 0).all()
        alone = module(x[k : k + 1, :, :samples], torch.tensor([A]), length[k : k + 1])
        torch.testing.assert_close(y[k, :, :samples], alone[0], rtol=0, atol=1e-5)


def test_lengths_may_change_from_batch_to_batch():
    responses = [random(60, seed=1), random(55, seed=2)]
    module = DeviceResponses(responses, 1.0)
    for samples in (500, 40, 500, 50, 51):  # of the last two, one FFT length serves both, but not as many taps
        x = random(4, 1, samples, seed=samples)
        torch.manual_seed(0)
        y = module(x, torch.full((4,), A), whole(x))
        torch.manual_seed(0)
        assert torch.equal(y, DeviceResponses(responses, 1.0)(x, torch.full((4,), A), whole(x)))


def test_white_noise_keeps_its_level_however_loud_the_response():
    module = DeviceResponses([1e-4 * random(50, seed=1), 1e3 * random(50, seed=2)], 1.0)
    torch.testing.assert_close(module.responses.double().square().sum(1), torch.ones(2, dtype=torch.float64))
    torch.manual_seed(0)
    x = random(8, 1, 20000)
    level = module(x, torch.full((8,), A), whole(x)).std((1, 2))
    torch.testing.assert_close(level, torch.ones(8), rtol=0, atol=0.05)


def test_the_delay_of_a_response_is_kept():
    x = random(1, 1, 100)
    y = DeviceResponses([torch.tensor([0.0] * 7 + [2.0])], 1.0)(x, torch.tensor([A]), whole(x))
    torch.testing.assert_close(y[..., 7:], x[..., :-7], rtol=0, atol=1e-5)
    torch.testing.assert_close(y[..., :7], torch.zeros(1, 1, 7), rtol=0, atol=1e-5)


def test_nothing_of_it_goes_into_a_checkpoint():
    module = DeviceResponses([random(9)], 1.0)
    module(random(2, 1, 30), devices("a", "b"), torch.tensor([30, 30]))
    assert not module.state_dict() and not list(module.buffers()) and not list(module.parameters())


def test_autocast_does_not_touch_it():
    module, x = DeviceResponses([random(9, seed=1)], 1.0), random(2, 1, 30)
    expected = module(x, devices("a", "a"), whole(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, devices("a", "a"), whole(x)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_hears_the_same():
    module, x = DeviceResponses([random(90, seed=seed) for seed in range(5)], 0.5), random(40, 1, 3000)
    heard = []
    for where in ("cpu", "cuda", "cpu"):
        torch.manual_seed(0)
        heard.append(module(x.to(where), devices(*"abcaa" * 8).to(where), whole(x).to(where)).cpu())
    torch.testing.assert_close(heard[1], heard[0], rtol=0, atol=1e-4)
    assert torch.equal(heard[2], heard[0])


def test_a_folder_is_read_in_the_order_of_names_whatever_it_also_holds(tmp_path):
    responses = {"b.wav": [0.0, 0.5], "A.WAV": [0.5, 0.0], "c.flac": [0.3, 0.4]}
    for name, samples in responses.items():
        write(tmp_path, name, samples, subtype="PCM_24")
    write(tmp_path, "stereo.wav", [[0.8, 0.0], [0.0, 0.6]], subtype="PCM_16")
    (tmp_path / "readme.txt").write_text("no response")
    (tmp_path / "._b.wav").write_bytes(b"what macOS packs")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "d.wav", [1.0])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    torch.testing.assert_close(load(tmp_path).responses, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate, sample_rate", [(44100, 32000), (48000, 44100), (44100, 8000), (8000, 32000)])
def test_responses_of_other_rates_are_resampled(tmp_path, rate, sample_rate):
    """Resonances stay where they are and ring as long, also in a response that begins with its peak."""
    for k, (hertz, decay) in enumerate(((300, 60), (2500, 100))):
        seconds = torch.arange(rate // 5) / rate
        samples = torch.cos(2 * torch.pi * hertz * seconds) * torch.exp(-decay * seconds)
        write(tmp_path, f"{k}.wav", samples - samples.mean(), rate)
    responses = DeviceResponses.from_folder(tmp_path, sample_rate, 1.0).responses
    torch.testing.assert_close(responses.norm(dim=1), torch.ones(2))
    for k in range(2):
        before, _ = soundfile.read(tmp_path / f"{k}.wav")
        delay = int(responses[k].abs().argmax())
        assert delay < 2e-3 * sample_rate and abs(responses.shape[1] - sample_rate / 5) < 2e-3 * sample_rate
        got, expected = bands(responses[k].numpy(), sample_rate, 6), bands(before, rate, 6)
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.2)


def test_folders_without_responses_are_refused(tmp_path):
    assert "--dir_path" in refusal(load, tmp_path / "none") and "none" in refusal(load, tmp_path / "none")
    (tmp_path / "file.wav").write_text("")
    assert "--dir_path" in refusal(load, tmp_path / "file.wav")
    (tmp_path / "empty").mkdir()
    message = refusal(load, tmp_path / "empty")
    assert "--dir_path" in message and "no sound file" in message


@pytest.mark.parametrize("samples", [[0.0] * 9, [1.0, float("nan")], [float("inf")], []])
def test_useless_responses_are_named(tmp_path, samples):
    write(tmp_path, "good.wav", [1.0])
    write(tmp_path, "poor.wav", samples)
    message = refusal(load, tmp_path)
    assert f"--dir_path: {tmp_path / 'poor.wav'} is empty, silent or not finite" in message


def test_an_unreadable_response_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    message = refusal(load, tmp_path)
    assert "--dir_path" in message and str(tmp_path / "text.wav") in message and "dcase.prepare" not in message


@pytest.mark.parametrize(
    "field, value",
    [("dir_p", 1.1), ("dir_p", -0.1), ("mixup_alpha", -0.1), ("mixup_alpha", float("nan")), ("mixup_alpha", 1e9)]
    + [("mixstyle_p", 1.5), ("roll_sec", -1.0), ("mixstyle_alpha", 0.0), ("timem", -1)],
)
def test_impossible_values_name_the_flag(field, value):
    assert f"--{field}" in refusal(lambda: AugmentConfig(**{field: value}))


def test_mixup_mixes_inputs_and_all_targets_by_the_same_weights():
    torch.manual_seed(0)
    x, target, soft = random(32, 1, 6, 5), torch.eye(10)[torch.arange(32) % 10], random(32, 10, seed=1).softmax(1)
    mix = Mix.draw(32, 0.5)
    assert mix.weight.shape == mix.other.shape == (32,) and set(mix.other.tolist()) == set(range(32))
    for values in (x, target, soft):
        mixed = mix(values)
        for k, (weight, other) in enumerate(zip(mix.weight.tolist(), mix.other.tolist(), strict=True)):
            torch.testing.assert_close(mixed[k], weight * values[k] + (1 - weight) * values[other])
    for values in (target, soft):
        torch.testing.assert_close(mix(values).sum(1), torch.ones(32))
    assert not torch.equal(mix(x), x)


def test_each_clip_has_its_own_weight_and_prevails():
    torch.manual_seed(0)
    for alpha, mean in ((0.1, 0.9458), (1.0, 0.75), (50.0, 0.5398)):  # of the larger of w and 1 - w
        weight = Mix.draw(20000, alpha).weight
        assert 0.5 <= weight.min() and weight.max() <= 1
        assert weight.mean().item() == pytest.approx(mean, abs=5e-3) and len(weight.unique()) > 5000
    weight, other = Mix.draw(20000, 1.0)
    assert abs(np.corrcoef(weight, other)[0, 1]) < 0.03


def test_mixup_of_alpha_0_is_none_and_uses_up_no_random_number():
    x = random(4, 1, 3, 2)
    state = torch.get_rng_state()
    assert Mix.draw(4, 0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert AugmentConfig().mixup_alpha == 0 and AugmentConfig().dir_path is None


@pytest.fixture(scope="module")
def further(tmp_path_factory) -> Path:
    return synth.make_responses(tmp_path_factory.mktemp("synth") / "responses")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_further_responses_are_the_same_every_time(tmp_path, further):
    files = digests(further)
    assert files == digests(synth.make_responses(tmp_path / "again"))
    assert len(files) == len(set(files.values())) == synth.N_RESPONSES


def test_further_responses_are_short_loud_and_without_delay(further):
    for path in further.iterdir():
        taps, rate = soundfile.read(path)
        assert rate == 44100 and soundfile.info(path).subtype == "PCM_24" and len(taps) <= rate / 10
        assert 0.8 < np.abs(taps).max() < 1 and np.abs(taps).argmax() < rate / 1000
        assert np.abs(taps[rate // 50 :]).max() < 1e-3  # after 20 ms


def test_further_devices_are_none_of_synth_taus(further):
    module = DeviceResponses.from_folder(further, 44100, 1.0)
    ours = [bands(taps, 44100, 8) for taps in module.responses.double().numpy()]
    assert len(ours) == synth.N_RESPONSES
    for device_id in DEVICES:
        theirs = bands(np.fft.irfft(synth.device_response(device_id), 44100), 44100, 8)
        assert min(np.sqrt(np.mean((one - theirs) ** 2)) for one in ours) > 1.5, device_id  # dB
    spread = np.std(ours, axis=0)
    assert (spread > 1.5).all()  # dB, in every band
