"""SynthTAU: an embedded stand-in for TAU22, made of arithmetic, in TAU22's exact layout.

    python -m dcase.synth --out D
    python -m dcase.synth --responses D

Names, lists and file format are TAU22's, so that everything runs without its 30 GB of recordings. The sound is not, and
every page that shows a figure from it says so. A clip is a weighted sum of layers (SCENE_MIXES, the main ones first),
filtered by the room of its location and by its device (RECORDERS). Its bytes depend only on its name and the seed, not
on the other clips or their order.

A location draws every level, parameter and the room from ranges that overlap between scenes. Its segments stay near
it; pieces of one segment differ only by chance. Device a is flat, b and c are gently coloured. s1 to s3 are coloured
more, have a narrower band, a resonance, compression and more noise; s4 to s6 are harsher still, and only in the test.
Devices are the same for every seed. Test clips exist on all nine, so that devices are compared on equal content.
--responses makes impulse responses of further devices, for --dir_path: none of them is one of the nine.
"""

import fcntl
import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import soundfile

from aum.cache import cache_folder, make_cache_folder
from dcase.data.cores import over_all_cores
from dcase.data.tau22 import DEVICES, SCENES, SUBSETS
from dcase.errors import UserError
from dcase.progress import progress

VERSION = 2  # goes up whenever the same arguments would give other bytes
SAMPLE_RATE = 44100  # Hz; a clip is SAMPLE_RATE samples = 1 s, so bin k of its spectrum is k Hz
MARK = "SYNTHETIC.md"  # the file that says that the folder is synthetic, written last
WAV_BYTES = 44 + 3 * SAMPLE_RATE  # of a clip's file, as in TAU22
TRAIN_PIECES, TEST_PIECES = 2, 1  # clips of a segment (TAU22: 10): few, so that small sets have many segments
TRAIN_LOCATIONS, TEST_LOCATIONS = 20, 10  # of each scene
FIRST_TEST_LOCATION, FIRST_TEST_SEGMENT = 1000, 100_000  # beyond every training clip's
CITIES = ("barcelona", "helsinki", "lisbon", "london", "lyon", "milan", "paris", "prague", "stockholm", "vienna")
# A training segment is recorded by one device, 14 of 19 by device a: 73 % as in TAU22. 19 and TRAIN_LOCATIONS share
# no factor, so every device gets round all locations.
DEVICE_CYCLE = "a a a b a a a c a a a s1 a a a s2 a a s3".split()

HZ = np.arange(SAMPLE_RATE // 2 + 1, dtype=np.float32)  # of a spectrum's bins
OCTAVES = np.log2(np.maximum(HZ, 20) / 1000)  # of the bins above 1 kHz
SECONDS = np.arange(SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
Waveform = np.ndarray  # (SAMPLE_RATE,) float32
Spectrum = np.ndarray  # (SAMPLE_RATE // 2 + 1,): a response float32, a sound complex64


def generator(*parts: object) -> np.random.Generator:
    """Return a random generator that depends only on ``parts``, so that the order of clips does not matter."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def from_db(decibels):
    return np.exp(decibels * (math.log(10) / 20))


# Kinds of sound: each takes a generator and parameters, and returns a waveform whose mean square is about 1.


def unit(wave: Waveform) -> Waveform:
    return wave / wave.std()


def bump(centre: float, octaves: float) -> Spectrum:
    """Return a band around ``centre`` Hz, ``octaves`` to either side."""
    return np.exp(-(((OCTAVES - math.log2(centre / 1000)) / octaves) ** 2))


def shaped_noise(rng: np.random.Generator, response: Spectrum) -> Waveform:
    white = rng.standard_normal(2 * len(HZ), dtype=np.float32).view(np.complex64)
    return unit(np.fft.irfft(white * response, SAMPLE_RATE))


def slow_curve(rng: np.random.Generator, rate: float) -> Waveform:
    """Return a random curve of deviation 1 that turns about ``rate`` times a second."""
    knots = rng.standard_normal(int(2 * rate) + 4)
    return np.interp(SECONDS * (2 * rate) + rng.random(), np.arange(len(knots)), knots).astype(np.float32)


def steady(rng: np.random.Generator, tilt: float, centre: float, peak: float) -> Waveform:
    """Noise that falls by ``-tilt`` dB an octave, with a hump of ``peak`` dB around ``centre`` Hz."""
    return shaped_noise(rng, from_db(tilt * OCTAVES + peak * bump(centre, 0.7)))


def swelling(rng: np.random.Generator, tilt: float, centre: float, peak: float, rate: float, depth: float) -> Waveform:
    """Such noise that comes and goes by ``depth`` dB, ``rate`` times a second."""
    return unit(steady(rng, tilt, centre, peak) * from_db(depth * slow_curve(rng, rate)))


def squeal(rng: np.random.Generator, centre: float, octaves: float, rate: float) -> Waveform:
    return unit(shaped_noise(rng, bump(centre, octaves)) * from_db(8 * slow_curve(rng, rate)))


def tone(rng: np.random.Generator, pitch: Waveform, response: Spectrum) -> Waveform:
    """Harmonics of a ``pitch`` (Hz) that may move, weighted by the ``response`` at their frequencies."""
    n_harmonics = int(min(60, 16000 / pitch.max()))
    weights = response[(np.arange(1, n_harmonics + 1) * pitch.mean()).astype(int)]
    period = np.fft.irfft(np.r_[0, weights * np.exp(2j * np.pi * rng.random(n_harmonics))], 2048).astype(np.float32)
    return unit(period[(np.cumsum(pitch, dtype=float) * (2048 / SAMPLE_RATE)).astype(int) % 2048])


def engine(rng: np.random.Generator, pitch: float, tilt: float, drift: float) -> Waveform:
    """A motor at ``pitch`` Hz that gains or loses speed by up to ``drift`` octaves."""
    slide = drift * (rng.uniform(-1, 1) * (SECONDS - 0.5) + 0.05 * slow_curve(rng, 3))
    return tone(rng, pitch * 2**slide, from_db(tilt * OCTAVES + 6 * bump(rng.uniform(300, 1200), 0.6)))


def vowels(rng: np.random.Generator, pitch: float, rate: float) -> Waveform:
    """A gliding tone with three formants, ``rate`` syllables a second."""
    formants = sum(bump(rng.uniform(*hz), 0.3) for hz in ((350, 800), (1000, 2200), (2400, 3200)))
    wave = tone(rng, pitch * 2 ** (0.15 * slow_curve(rng, rate)), formants * from_db(-4 * OCTAVES))
    return unit(wave * from_db(np.minimum(10 * slow_curve(rng, rate), 6)))


def consonants(rng: np.random.Generator, rate: float) -> Waveform:
    """Noise around 5 kHz: without it, the upper octaves of speech would hold nothing but steady noise."""
    return squeal(rng, rng.uniform(4500, 6500), 0.7, 2 * rate) * np.float32(0.15)


def voice(rng: np.random.Generator, pitch: float, rate: float) -> Waveform:
    """One talker."""
    return vowels(rng, pitch, rate) + consonants(rng, rate)


def babble(rng: np.random.Generator, talkers: float, rate: float) -> Waveform:
    """Several talkers, some nearer than others. They share one noise of consonants, which saves time."""
    distances = from_db(5 * rng.standard_normal(round(talkers))).astype(np.float32)
    voices = (distance * vowels(rng, rng.uniform(90, 260), rate) for distance in distances)
    return unit(unit(sum(voices)) + consonants(rng, rate))


def music(rng: np.random.Generator, pitch: float, rate: float) -> Waveform:
    """Fading chords, ``rate`` a second."""
    steady_pitch = np.full(SAMPLE_RATE, pitch, np.float32)
    notes = (tone(rng, steady_pitch * 2 ** (k / 12), from_db(-9 * OCTAVES)) * rng.uniform(0.3, 1) for k in (0, 4, 7))
    return unit(sum(notes) * np.exp(-5 * ((SECONDS * rate + rng.random()) % 1)))


def knocks(rng: np.random.Generator, rate: float, centre: float, decay: float, regular: bool = False) -> Waveform:
    """Impacts, ``rate`` a second, each ringing for ``decay`` ms around ``centre`` Hz."""
    times = np.arange(rng.random() / rate, 1, 1 / rate) if regular else rng.random(rng.poisson(rate))
    hits = np.zeros(SAMPLE_RATE, np.float32)
    hits[(times * SAMPLE_RATE).astype(int)] = np.exp(0.4 * rng.standard_normal(len(times)))
    ring = rng.standard_normal(SAMPLE_RATE, dtype=np.float32) * np.exp(SECONDS * (-1000 / decay))
    ring = np.fft.rfft(ring) * bump(centre, 0.8)
    energy = np.mean(np.abs(ring) ** 2)  # of one impact, by Parseval
    return np.fft.irfft(np.fft.rfft(hits) * ring, SAMPLE_RATE) * np.sqrt(SAMPLE_RATE / (energy * np.float32(rate)))


def chirps(rng: np.random.Generator, rate: float, centre: float, sweep: float) -> Waveform:
    """Birds: whistles around ``centre`` Hz, ``rate`` a second, that rise or fall by up to ``sweep`` octaves."""
    wave = np.zeros(SAMPLE_RATE, np.float32)
    for _ in range(rng.poisson(rate)):
        length = int(rng.uniform(0.03, 0.15) * SAMPLE_RATE)
        start = rng.integers(SAMPLE_RATE - length)
        pitch = centre * 2 ** (0.2 * rng.standard_normal() + rng.uniform(-sweep, sweep) * SECONDS[:length] / 0.1)
        wave[start : start + length] += np.hanning(length) * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE)
    return wave / math.sqrt(rate * 0.09 * 0.375 / 2)  # mean length in s, mean square of a Hann window, of a sine


# kind of layer: its sound, and the ranges its parameters have over locations. Fans and distant traffic lose 5 dB an
# octave in octave bands (NC curves), which is a tilt of -8 dB in density; what hisses near by falls more slowly. Wheels
# make rails roar unevenly, 5 to 10 times a second. Tyres are loudest around 1 kHz, and swell as a car passes.
LAYERS: dict[str, tuple[Callable[..., Waveform], dict[str, tuple[float, float]]]] = {
    "ventilation": (steady, dict(tilt=(-10, -8), centre=(150, 400), peak=(4, 10))),
    "hiss": (steady, dict(tilt=(-4, -2), centre=(4000, 8000), peak=(4, 10))),
    "city": (steady, dict(tilt=(-9, -7), centre=(200, 900), peak=(0, 6))),
    "road": (steady, dict(tilt=(-8, -5), centre=(80, 300), peak=(4, 10))),
    "fountain": (steady, dict(tilt=(-2, 0), centre=(3000, 8000), peak=(0, 6))),
    "wind": (swelling, dict(tilt=(-10, -7), centre=(80, 250), peak=(4, 8), rate=(0.5, 2), depth=(2, 6))),
    "rails": (swelling, dict(tilt=(-6, -4), centre=(250, 600), peak=(4, 8), rate=(5, 10), depth=(2, 4))),
    "track": (swelling, dict(tilt=(-9, -7), centre=(80, 500), peak=(6, 12), rate=(5, 10), depth=(2, 4))),
    "traffic": (swelling, dict(tilt=(-7, -5), centre=(800, 1200), peak=(10, 14), rate=(0.4, 1), depth=(4, 7))),
    "train": (swelling, dict(tilt=(-4, -2), centre=(900, 2000), peak=(4, 8), rate=(0.4, 1), depth=(3, 8))),
    "engine": (engine, dict(pitch=(22, 60), tilt=(-8, -4), drift=(0.05, 0.5))),
    "motor": (engine, dict(pitch=(80, 200), tilt=(-6, -3), drift=(0.1, 0.6))),
    "whine": (engine, dict(pitch=(250, 600), tilt=(-5, -1), drift=(0.1, 0.6))),
    "squeal": (squeal, dict(centre=(1500, 7000), octaves=(0.03, 0.2), rate=(0.5, 3))),
    "babble": (babble, dict(talkers=(10, 18), rate=(3, 6))),
    "group": (babble, dict(talkers=(2, 5), rate=(3, 6))),
    "talk": (voice, dict(pitch=(90, 260), rate=(3, 6))),
    "music": (music, dict(pitch=(180, 500), rate=(1.5, 4))),
    "chime": (music, dict(pitch=(500, 1000), rate=(1, 2))),
    "steps": (knocks, dict(rate=(1.5, 6), centre=(400, 2500), decay=(8, 30))),
    "suitcases": (knocks, dict(rate=(15, 40), centre=(600, 2500), decay=(5, 15))),
    "clatter": (knocks, dict(rate=(1, 5), centre=(2000, 7000), decay=(10, 60))),
    "joints": (partial(knocks, regular=True), dict(rate=(1.5, 4), centre=(100, 400), decay=(20, 60))),
    "birds": (chirps, dict(rate=(2, 9), centre=(2500, 6500), sweep=(0.1, 0.6))),
}
# scene: loudness (dB full scale), ranges of reverberation times (s) and of reverberant against direct sound (dB), level
# (dB) of each layer and the chance that a segment has it. A vehicle's noise comes in through its whole body, a hall's
# from all around: little of it is direct, while the open air gives almost nothing back. A fluctuating sound is the main
# one nearly everywhere: steady noise alone is what a model that was trained on TAU22 calls a park.
SCENE_MIXES: dict[str, tuple[float, tuple[float, float], tuple[float, float], dict[str, tuple[float, float]]]] = {
    "airport": (-26, (0.6, 1.2), (-3, 3), dict(
        group=(0, 1), ventilation=(-18, 1), suitcases=(-16, 0.6), steps=(-20, 0.6), hiss=(-22, 1))),
    "bus": (-25, (0.1, 0.3), (2, 12), dict(
        engine=(-3, 1), road=(0, 1), clatter=(-16, 0.6), talk=(-14, 0.4), squeal=(-22, 0.2))),
    "metro": (-23, (0.1, 0.3), (-10, 3), dict(
        rails=(0, 1), motor=(-18, 0.9), joints=(-8, 0.6), squeal=(-16, 0.4), talk=(-14, 0.3))),
    "metro_station": (-27, (1.2, 2.5), (0, 8), dict(
        ventilation=(-2, 1), train=(0, 0.9), talk=(-8, 0.6), steps=(-9, 0.6), babble=(-12, 0.7), chime=(-8, 0.4),
        squeal=(-14, 0.3))),
    "park": (-32, (0.05, 0.2), (-20, -12), dict(
        wind=(0, 0.9), city=(-10, 1), birds=(-10, 0.9), steps=(-14, 0.4), talk=(-14, 0.3))),
    "public_square": (-28, (0.4, 0.8), (-16, -8), dict(
        city=(0, 1), fountain=(-2, 0.8), babble=(-8, 0.9), steps=(-14, 0.6), birds=(-14, 0.5), traffic=(-12, 0.4))),
    "shopping_mall": (-27, (1.0, 2.0), (3, 9), dict(
        babble=(0, 1), ventilation=(-18, 1), music=(-14, 0.7), steps=(-18, 0.5), clatter=(-22, 0.5))),
    "street_pedestrian": (-28, (0.3, 0.8), (-8, 0), dict(
        babble=(0, 1), steps=(-10, 0.95), group=(-6, 0.6), city=(-6, 1), clatter=(-20, 0.3))),
    "street_traffic": (-23, (0.3, 0.6), (-18, -10), dict(
        traffic=(0, 1), engine=(-14, 0.6), city=(-14, 1), squeal=(-24, 0.2), birds=(-24, 0.2))),
    "tram": (-25, (0.1, 0.25), (-3, 6), dict(
        track=(0, 1), group=(-8, 0.9), whine=(-30, 0.8), joints=(-10, 0.5), squeal=(-20, 0.4), chime=(-20, 0.2))),
}  # fmt: skip
LOUDNESS_SPREAD = 4.0  # dB, deviation over locations
LEVEL_SPREAD, SEGMENT_LEVEL_SPREAD = 5.0, 4.5  # dB, deviation of a layer over locations, over a location's segments
SEGMENT_SPREAD = 0.15  # deviation of a parameter over a location's segments, as a part of its range


class Name(NamedTuple):
    """The parts of a TAU22 file name."""

    scene: str
    city: str
    location: int
    segment: int
    piece: int
    device_id: str

    @property
    def filename(self) -> str:
        return f"audio/{'-'.join(map(str, self))}.wav"


def layer(kind: str, level: float, chance: float, name: Name, seed: int) -> Waveform | float:
    """Return one layer of a clip, or 0 where its segment does not have it."""
    location = generator(seed, name.scene, name.location, kind)
    segment = generator(seed, name.scene, name.segment, kind)
    level += LEVEL_SPREAD * location.standard_normal() + SEGMENT_LEVEL_SPREAD * segment.standard_normal()
    if segment.random() >= chance:
        return 0.0
    sound, ranges = LAYERS[kind]
    parameters = {}
    for parameter, (low, high) in ranges.items():
        place = location.random() + SEGMENT_SPREAD * segment.standard_normal()
        parameters[parameter] = low + (high - low) * min(max(place, 0.0), 1.0)
    return float(from_db(level)) * sound(generator(seed, name.scene, name.segment, name.piece, kind), **parameters)


@lru_cache(maxsize=512)
def room(scene: str, location: int, seed: int) -> Spectrum:
    """Return a location's response: direct sound and a tail that decays and darkens, of the loudness together."""
    loudness, reverberation, wetness, _ = SCENE_MIXES[scene]
    rng = generator(seed, scene, location, "room")
    seconds = rng.uniform(*reverberation)
    tail = rng.standard_normal(SAMPLE_RATE, dtype=np.float32) * np.exp(SECONDS * (-6.9 / seconds))  # 6.9: to -60 dB
    tail = np.fft.rfft(unit(tail)) * from_db(-2 * OCTAVES.clip(0)) / math.sqrt(SAMPLE_RATE)
    gain = from_db(loudness + LOUDNESS_SPREAD * rng.standard_normal())
    wet = from_db(rng.uniform(*wetness))
    return ((1 + tail * wet) * (gain / math.hypot(1, wet))).astype(np.complex64)


def scene_spectrum(name: Name, seed: int) -> Spectrum:
    """Return a clip's sound before the device."""
    layers = SCENE_MIXES[name.scene][3]
    mix = sum(layer(kind, level, chance, name, seed) for kind, (level, chance) in layers.items())
    return np.fft.rfft(mix) * room(name.scene, name.location, seed)


class Device(NamedTuple):
    colour: float  # dB, deviation of the smooth random curve
    resonance: float  # dB, height of a peak somewhere
    low_cut: float  # Hz
    high_cut: float  # Hz
    ratio: float  # of compression above THRESHOLD
    noise_floor: float  # dB full scale


RECORDERS = {
    "a": Device(0, 0, 30, 20000, 1.0, -75),
    "b": Device(3.5, 3.5, 80, 16000, 1.0, -65),
    "c": Device(3.5, 3.5, 60, 17000, 1.0, -68),
    "s1": Device(5, 6, 150, 13000, 1.7, -62),
    "s2": Device(5, 6, 110, 10000, 2.4, -60),
    "s3": Device(5, 6, 180, 15000, 2.1, -64),
    "s4": Device(7, 9, 210, 11000, 1.9, -61),
    "s5": Device(7, 9, 120, 8000, 2.3, -59),
    "s6": Device(7, 9, 260, 14000, 2.7, -60),
}
THRESHOLD = -35.0  # dB full scale
N_RESPONSES = 40
RESPONSE_SAMPLES = SAMPLE_RATE // 10  # far more than the 20 ms in which all of them fall to -60 dB
BLOCK = 63  # samples of one step of the compressor; SAMPLE_RATE is a multiple


def drawn_response(device: Device, rng: np.random.Generator) -> Spectrum:
    """Return a complex response of minimum phase: its impulse response is short and has no pre-echo."""
    curve = device.colour * np.interp(OCTAVES, np.linspace(OCTAVES[0], OCTAVES[-1], 12), rng.standard_normal(12))
    curve += device.resonance * bump(400 * 15 ** rng.random(), 0.25)
    curve -= 10 * np.log10(1 + (device.low_cut / np.maximum(HZ, 1)) ** 4)
    curve -= 10 * np.log10(1 + (HZ / device.high_cut) ** 8)
    # The log-spectrum of a minimum-phase response is that of its log-magnitude's cepstrum folded onto positive times.
    cepstrum = np.fft.irfft(curve.clip(-80) * (math.log(10) / 20), SAMPLE_RATE)
    cepstrum[1 : SAMPLE_RATE // 2] *= 2
    cepstrum[SAMPLE_RATE // 2 + 1 :] = 0
    return np.exp(np.fft.rfft(cepstrum)).astype(np.complex64)


@lru_cache
def device_response(device_id: str) -> Spectrum:
    return drawn_response(RECORDERS[device_id], generator("device", device_id))


def further_response(k: int) -> np.ndarray:
    """Return the impulse response (RESPONSE_SAMPLES,) of the k-th further device, from the family of b to s6."""
    rng = generator("response", k)
    device = Device(
        colour=rng.uniform(3.5, 5),
        resonance=rng.uniform(3.5, 7),
        low_cut=60 * 4 ** rng.random(),
        high_cut=8000 * 2 ** rng.random(),
        ratio=1,  # a response has no dynamics and no noise
        noise_floor=-math.inf,
    )
    taps = np.fft.irfft(drawn_response(device, rng), SAMPLE_RATE)[:RESPONSE_SAMPLES]
    return taps * (0.9 / np.abs(taps).max())


def compress(wave: Waveform, ratio: float) -> Waveform:
    """Compress levels above THRESHOLD by ``ratio``, over about 50 ms."""
    power = np.mean(wave.reshape(-1, BLOCK) ** 2, axis=1)
    release = np.exp(-np.arange(150) * (BLOCK / SAMPLE_RATE / 0.05))
    power = np.convolve(np.r_[power[-149:], power], release / release.sum(), "valid")
    over = np.maximum(10 * np.log10(power + 1e-12) - THRESHOLD, 0)
    gain = np.interp(np.arange(SAMPLE_RATE), np.arange(BLOCK / 2, SAMPLE_RATE, BLOCK), from_db(-over * (1 - 1 / ratio)))
    return wave * gain.astype(np.float32)


def record(spectrum: Spectrum, name: Name, seed: int) -> Waveform:
    """Record the sound with the clip's device: coloured, compressed, noisy, saturating below full scale."""
    device = RECORDERS[name.device_id]
    wave = np.fft.irfft(spectrum * device_response(name.device_id), SAMPLE_RATE)
    if device.ratio > 1:
        wave = compress(wave, device.ratio)
    hiss = generator(seed, name.filename).standard_normal(SAMPLE_RATE, dtype=np.float32)
    return 0.99 * np.tanh((wave + float(from_db(device.noise_floor)) * hiss) / 0.99)


@dataclass(frozen=True)
class SynthConfig:
    out: str | None = None
    """Folder to make; it must be new or empty."""
    responses: str | None = None
    """Folder of impulse responses to make, for --dir_path, with or without --out; it must be new or empty."""
    train_clips: int = 1800
    """Clips in split25; split10 and split5 are parts of it."""
    test_clips_per_device: int = 100
    """Test clips of each of the 9 devices."""
    largest_subset: Literal[25, 50, 100] = 25
    """Percent; 50 makes split50 with twice the clips of split25, 100 also split100 with four times the clips."""
    seed: int = 0
    """Seed of the sound; names and devices are the same for every seed."""
    num_workers: int | None = None
    """Processes; 0: only this one; None: one per core. The files do not depend on it."""

    def __post_init__(self) -> None:
        if self.out is None and self.responses is None:
            raise UserError("--out is missing: give a folder to make, or one for impulse responses by --responses")
        for flag, least in (("train_clips", len(SCENES)), ("test_clips_per_device", len(SCENES)), ("num_workers", 0)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise UserError(f"--{flag} must be at least {least}; got {value}")


def names_on_a(
    n_clips: int, n_pieces: int, n_locations: int, first_location: int, first_segment: int
) -> Iterator[Name]:
    """Yield ``n_clips`` names of device a, scenes in turn, so that every first part of them is balanced."""
    for k in range(n_clips):
        scene, (segment, piece) = k % len(SCENES), divmod(k // len(SCENES), n_pieces)
        place = segment % n_locations
        location, segment = first_location + len(SCENES) * place + scene, first_segment + len(SCENES) * segment + scene
        yield Name(SCENES[scene], CITIES[(place + scene) % len(CITIES)], location, segment, piece, "a")


def names_for_train(n_clips: int) -> Iterator[Name]:
    """Yield names with a device per segment; scenes start at different places of DEVICE_CYCLE."""
    for name in names_on_a(n_clips, TRAIN_PIECES, TRAIN_LOCATIONS, 0, 0):
        turn = name.segment // len(SCENES) + 2 * SCENES.index(name.scene)
        yield name._replace(device_id=DEVICE_CYCLE[turn % len(DEVICE_CYCLE)])


def names_for_test(n_clips: int) -> Iterator[tuple[Name, ...]]:
    """Yield the names of each clip on all devices."""
    for name in names_on_a(n_clips, TEST_PIECES, TEST_LOCATIONS, FIRST_TEST_LOCATION, FIRST_TEST_SEGMENT):
        yield tuple(name._replace(device_id=device_id) for device_id in DEVICES)


def write_lists(folder: Path, train: list[Name], test: list[Name], config: SynthConfig) -> None:
    rows = [(name.filename, name.scene, f"{name.city}-{name.location}", name.device_id) for name in train + test]
    meta = pd.DataFrame(rows, columns=["filename", "scene_label", "identifier", "source_label"])
    lists = {"meta": meta, "split_setup/test": meta[["filename", "scene_label"]][len(train) :]}
    for subset in (subset for subset in SUBSETS if subset <= config.largest_subset):
        n_clips = config.train_clips * subset // 25
        lists[f"split_setup/split{subset}"] = meta[["filename", "scene_label"]][:n_clips]
    for name, table in lists.items():
        table.to_csv(folder / f"{name}.csv", sep="\t", index=False, lineterminator="\n")


def write_clips(folder: Path, seed: int, names: tuple[Name, ...]) -> int:
    """Write one sound as the devices of ``names`` record it; return the number of clips."""
    spectrum = scene_spectrum(names[0], seed)
    for name in names:
        soundfile.write(folder / name.filename, record(spectrum, name, seed), SAMPLE_RATE, subtype="PCM_24")
    return len(names)


def write_all(folder: Path, config: SynthConfig) -> None:
    train = list(names_for_train(config.train_clips * config.largest_subset // 25))
    test = list(names_for_test(config.test_clips_per_device))
    (folder / "audio").mkdir(parents=True)
    (folder / "split_setup").mkdir()
    write_lists(folder, train, [name for names in test for name in names], config)
    jobs = [(name,) for name in train] + test
    write = partial(write_clips, folder, config.seed)
    with (
        progress(total=len(train) + len(test) * len(DEVICES), desc="SynthTAU", unit="clip") as bar,
        closing(over_all_cores(write, jobs, config.num_workers)) as written,
    ):
        for n_written in written:
            bar.update(n_written)
    elsewhere = ("out", "responses", "num_workers")  # flags that this folder does not depend on
    flags = " ".join(f"--{flag} {value}" for flag, value in asdict(config).items() if flag not in elsewhere)
    (folder / MARK).write_text(
        f"""# Synthetic data

SynthTAU, version {VERSION}: {len(train)} training and {len(test) * len(DEVICES)} test clips in the layout of TAU Urban
Acoustic Scenes 2022 Mobile, computed by

    python -m dcase.synth --out DIR {flags}

Nothing in this folder was recorded: no figure from it is comparable with TAU22 or with the DCASE challenge.
"""
    )


def make(out: Path, **options: int | None) -> Path:
    """Make a SynthTAU folder, all of it or nothing; ``options`` are the fields of `SynthConfig`. Return its path.

    Raises UserError where ``out`` is not empty or cannot be written.
    """
    config = SynthConfig(str(out), **options)
    with new_folder(Path(out), "SynthTAU", "--out") as folder:
        write_all(folder, config)
    return Path(out).absolute()


def make_responses(out: Path) -> Path:
    """Make a folder of N_RESPONSES impulse responses, all of it or nothing, the same bytes every time. Return its path.

    Raises UserError where ``out`` is not empty or cannot be written.
    """
    with new_folder(Path(out), "responses", "--responses") as folder:
        folder.mkdir(parents=True)
        for k in range(N_RESPONSES):  # not float: libsndfile would write the time into the file
            soundfile.write(folder / f"synthetic{k:02}.wav", further_response(k), SAMPLE_RATE, subtype="PCM_24")
    return Path(out).absolute()


@contextmanager
def new_folder(path: Path, what: str, flag: str) -> Iterator[Path]:
    """Yield a folder beside ``path`` to make and fill; it is renamed at the end, and removed where that fails.

    Raises UserError, naming the flag, where ``path`` is not empty or cannot be written.
    """
    path = path.absolute()
    partial_folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with _told(path, what, flag):
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"{flag} {path} exists already: name a new folder, or remove it first")
            yield partial_folder
            partial_folder.replace(path)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)


@contextmanager
def _told(folder: Path, what: str, flag: str) -> Iterator[None]:
    """Turn errors of writing into a UserError."""
    try:
        yield
    except (OSError, soundfile.LibsndfileError) as error:
        default = " or, for the default one, by the environment variable AUDIO_MAMBA_CACHE" if flag == "--out" else ""
        raise UserError(
            f"{what} cannot be made in {folder} ({error}): give a folder that can be written, on a disk with room, "
            f"by {flag}{default}"
        ) from error


def default_folder() -> Path:
    """Return the place of the default SynthTAU."""
    return cache_folder() / f"synth_tau_v{VERSION}"


def is_whole(folder: Path) -> bool:
    """Whether nothing of a SynthTAU folder is missing."""
    try:
        listed = pd.read_csv(folder / "meta.csv", sep="\t")["filename"]
        whole = {f"audio/{file.name}" for file in os.scandir(folder / "audio") if file.stat().st_size == WAV_BYTES}
    except (OSError, ValueError, KeyError):
        return False
    return (folder / MARK).is_file() and whole.issuperset(listed)


def ensure_default() -> Path:
    """Return the default SynthTAU: the first caller makes it, again if something of it is missing, while others wait.

    Raises UserError where it cannot be made.
    """
    folder = default_folder()
    if not is_whole(folder):
        with _told(folder, "SynthTAU", "--out"):
            make_cache_folder()
            with open(folder.with_suffix(".lock"), "w") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)  # released when the process ends, also when it is killed
                if not is_whole(folder):
                    for remains in (folder, *folder.parent.glob(f".{folder.name}.*.partial")):
                        shutil.rmtree(remains, ignore_errors=True)
                    make(folder)
    print(f"data: SynthTAU, which is synthetic (no figure from it is comparable with TAU22), in {folder}")
    return folder
