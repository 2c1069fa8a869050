"""Mistakes to look at and listen to, and each device's effect on the sound."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import DataConfig
from dcase.errors import UserError, one_line
from dcase.report import svg
from dcase.report.mistakes import same_sound
from dcase.report.predictions import Predictions
from dcase.report.run_files import Finished
from dcase.report.sounds import Recordings, audio, data_folder, picture
from dcase.runs.config import EvalConfig, from_plain

SPECTRUM_SOUNDS = 20  # that every device has recorded
KILOHERTZ = (0.2, 0.5, 1, 2, 4, 8, 16)  # ticks
DECIBELS = 10 / math.log(10)  # in one step of the natural logarithm of power


class Card(NamedTuple):
    """A mistake, with the data URIs of its picture and sound; "" where there are none."""

    true: str
    predicted: str
    device: str
    location: str
    confidence: float
    confidence_in_true: float
    elsewhere: list[tuple[str, list[str]]]  # ("right" or "wrong", devices): the same second on other devices
    name: str
    picture: str
    sound: str


class Gallery:
    """Pictures and sound of chosen clips, read once. Without recordings it says why in ``why_not``."""

    def __init__(self, predictions: Predictions, rows: list[int], recordings: "Source", with_audio: bool = True):
        self.predictions = predictions
        self.others = same_sound(predictions)
        self.with_audio, self.why_not = with_audio, ""
        self._named = Counter(map(_last, predictions.filenames.tolist()))
        self._log_mels: dict[int, np.ndarray] = {}
        self._sounds: dict[int, str] = {}
        self._spectra: dict[int, np.ndarray] = {}  # device -> (n_mels,) dB, relative to the mean of the other devices
        self._n_spectrum = 0  # sounds that the spectra are averaged over
        try:
            self._recordings = Recordings(*recordings)
            for row in dict.fromkeys(rows):
                waveform = self._recordings.read(predictions.filenames[row])
                self._log_mels[row] = self._recordings.log_mel(waveform)
                if with_audio:
                    self._sounds[row] = audio(waveform, self._recordings.rate)
        except UserError as error:
            self._fail(error)
        shown = [x.ravel() for x in self._log_mels.values() if x.size]
        self.low, self.high = np.percentile(np.concatenate(shown) if shown else [0], [2, 99.8])  # of all pictures

    def _fail(self, error: UserError) -> None:
        self.why_not = f"{one_line(error)}. Give --dataset_dir to python -m dcase.report."

    @property
    def decibels(self) -> tuple[float, float]:
        """The levels that are drawn black and white."""
        return DECIBELS * self.low, DECIBELS * self.high

    def card(self, row: int) -> Card:
        p, name = self.predictions, str(self.predictions.filenames[row])
        scenes, devices = p.labels.scenes, [device.upper() for device in p.labels.devices]
        by: dict[str, list[str]] = {"right": [], "wrong": []}
        for other in sorted(self.others[row], key=lambda i: p.device[i]):
            by["right" if p.correct[other] else "wrong"].append(devices[p.device[other]])
        return Card(
            scenes[p.scene[row]],
            scenes[p.predicted[row]],
            devices[p.device[row]],
            str(p.location[row]),
            p.confidence[row],
            p.probabilities[row, p.scene[row]],
            [(result, names) for result, names in by.items() if names],
            _last(name) if self._named[_last(name)] == 1 else name.removeprefix("audio/"),
            picture(self._log_mels[row], self.low, self.high) if row in self._log_mels else "",
            self._sounds.get(row, ""),
        )

    def measure_spectra(self) -> None:
        """Average the log-mels of sounds that every device has recorded, where there are enough of them."""
        p = self.predictions
        there = sorted(set(p.device.tolist()))
        whole = [i for i, others in enumerate(self.others) if p.device[i] == there[0] and len(others) == len(there) - 1]
        chosen = whole[:: max(1, -(-len(whole) // SPECTRUM_SOUNDS))]
        if self.why_not or len(there) < 2 or len(chosen) < 5:
            return
        means: dict[int, list[np.ndarray]] = {device: [] for device in there}
        try:
            for row in (row for first in chosen for row in (first, *self.others[first])):
                log_mel = self._recordings.log_mel(self._recordings.read(p.filenames[row]))
                means[int(p.device[row])].append(log_mel.mean(1))
        except UserError as error:
            return self._fail(error)
        by_device = {device: DECIBELS * np.mean(x, axis=0) for device, x in means.items()}
        for device in there:
            rest = np.mean([x for other, x in by_device.items() if other != device], axis=0)
            self._spectra[device] = by_device[device] - rest
        self._n_spectrum = len(chosen)

    def spectrum(self, device: int) -> svg.Chart | None:
        """Return the level of each frequency on a device, relative to the others; None where it is not known."""
        if device not in self._spectra:
            return None
        levels, name = self._spectra[device], self.predictions.labels.devices[device]
        x = self._frequency(len(levels))
        y = svg.axis("level against the others (dB)", np.concatenate([*self._spectra.values(), [-1, 1]]))
        series = [svg.Series(name.upper(), range(len(levels)), levels.tolist())]
        title = f"Effect of {name.upper()} on the sound: mean over {self._n_spectrum} seconds recorded by all devices"
        zero = ("axis", (x.low, 0), (x.high, 0))
        return svg.Chart(f"spectrum-{name}", title, x, y, series, rule=zero)

    def _frequency(self, n_mels: int) -> svg.Axis:
        """Return an axis from the lowest to the highest mel bin, with ticks in kHz."""
        config = self._recordings.front_end.config
        low, high = (_mel(hz) for hz in (config.f_min, config.f_max or config.sample_rate / 2))
        places = {(_mel(1000 * khz) - low) / (high - low) * (n_mels - 1): khz for khz in KILOHERTZ}
        ticks = [at for at in places if 0 <= at <= n_mels - 1]
        return svg.Axis("frequency (kHz, on the mel scale)", 0, n_mels - 1, ticks, lambda at: f"{places[at]:g}")


Source = tuple[Path | None, DataConfig, LogMelConfig]


def source_of(run: Finished, folder: Path | None = None) -> Source:
    """Return what opens a run's recordings. ``folder``: of the data; None: the one in the run's configuration."""
    config = from_plain(EvalConfig, {name: run.config[name] for name in ("data", "logmel") if name in run.config})
    return folder or data_folder(config.data, run.results["data"]), config.data, config.logmel


def _last(name: str) -> str:
    """Return a path without its folders."""
    return name.rpartition("/")[2]


def _mel(hertz: float) -> float:
    """HTK's scale, the log-mel's."""
    return 2595 * math.log10(1 + hertz / 700)
