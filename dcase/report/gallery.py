"""Mistakes to look at and listen to, and what a device does to the sound."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import DEVICES, SCENES, DataConfig
from dcase.errors import UserError, one_line
from dcase.report import svg
from dcase.report.html import Html, el, void
from dcase.report.mistakes import same_sound
from dcase.report.predictions import Predictions
from dcase.report.sounds import AUDIO_SECONDS, Recordings, audio, picture
from dcase.report.words import percent, title

SPECTRUM_SOUNDS = 20  # that every device has recorded
KILOHERTZ = (0.2, 0.5, 1, 2, 4, 8, 16)  # ticks
DECIBELS = 10 / math.log(10)  # of one step of the natural logarithm of power


class Gallery:
    """Pictures and sound of chosen clips, read once; without recordings it says why and shows words alone."""

    def __init__(
        self,
        predictions: Predictions,
        rows: list[int],
        folder: Path | None,
        data: DataConfig,
        logmel: LogMelConfig,
        with_audio: bool = True,
        with_spectra: bool = True,
    ):
        self.predictions = predictions
        self.others = same_sound(predictions)
        self._named = Counter(map(_last, predictions.filenames.tolist()))
        self.why_not = ""  # there is neither picture nor sound
        self.with_audio = with_audio
        self._log_mels: dict[int, np.ndarray] = {}
        self._sounds: dict[int, str] = {}
        self.spectra: dict[int, np.ndarray] = {}  # device -> (n_mels,) dB, against the mean of the other devices
        self.n_spectrum = 0  # sounds that they are of
        try:
            self._recordings = Recordings(folder, data, logmel)
            for row in dict.fromkeys(rows):
                waveform = self._recordings.read(predictions.filenames[row])
                self._log_mels[row] = self._recordings.log_mel(waveform)
                if with_audio:
                    self._sounds[row] = audio(waveform, self._recordings.rate)
            if with_spectra:
                self._measure_spectra()
        except UserError as error:
            self.why_not = f"{one_line(error)}. Give --dataset_dir to python -m dcase.report."
        shown = [x for x in self._log_mels.values() if x.size]
        values = np.concatenate([x.ravel() for x in shown]) if shown else np.zeros(1)
        self.low, self.high = np.percentile(values, [2, 99.8])  # one scale for all pictures

    def _measure_spectra(self) -> None:
        p = self.predictions
        there = sorted(set(p.device.tolist()))
        whole = [i for i, others in enumerate(self.others) if p.device[i] == there[0] and len(others) == len(there) - 1]
        chosen = whole[:: max(1, -(-len(whole) // SPECTRUM_SOUNDS))]
        if len(there) < 2 or len(chosen) < 5:
            return
        means: dict[int, list[np.ndarray]] = {device: [] for device in there}
        for first in chosen:
            for row in (first, *self.others[first]):
                log_mel = self._recordings.log_mel(self._recordings.read(p.filenames[row]))
                means[int(p.device[row])].append(log_mel.mean(1))
        by_device = {device: DECIBELS * np.mean(x, axis=0) for device, x in means.items()}
        for device in there:
            rest = np.mean([x for other, x in by_device.items() if other != device], axis=0)
            self.spectra[device] = by_device[device] - rest
        self.n_spectrum = len(chosen)

    def note(self) -> Html:
        if self.why_not:
            return el("p", f"No pictures and no sound: {self.why_not}", class_="note")
        heard = f" Sounds are as loud as they can be, at most {AUDIO_SECONDS} s." if self.with_audio else ""
        scale = f"{DECIBELS * self.low:.0f} to {DECIBELS * self.high:.0f} dB, black to white"
        return el(
            "p",
            f"At most one of a recording location. Pictures: log-mel, time to the right, mel bins upwards, {scale}, "
            f"the same for all.{heard}",
            class_="hint",
        )

    def cards(self, rows: list[int]) -> Html:
        return el("ul", *(el("li", self._card(row)) for row in rows), class_="cards")

    def _card(self, row: int) -> Html:
        p = self.predictions
        true, predicted, device = SCENES[p.scene[row]], SCENES[p.predicted[row]], DEVICES[p.device[row]].upper()
        chances = p.probabilities[row]
        name = str(p.filenames[row])
        shown: list[object] = []
        if row in self._log_mels:
            alt = f"Log-mel of {name}: {title(true)}, taken for {title(predicted)}"
            image = picture(self._log_mels[row], self.low, self.high)
            shown.append(void("img", src=image, alt=alt, loading="lazy", decoding="async"))
        if row in self._sounds:
            label = f"{title(true)} on device {device}, taken for {title(predicted)}"
            shown.append(el("audio", controls=True, preload="none", src=self._sounds[row], aria_label=label))
        return el(
            "figure",
            *shown,
            el(
                "figcaption",
                el("b", f"{title(true)} → {title(predicted)}"),
                el("span", f"{percent(chances.max())} % sure ({title(true)}: {percent(chances[p.scene[row]])} %)"),
                el("span", f"device {device}, {p.location[row]}"),
                self._elsewhere(row),
                el("code", _last(name) if self._named[_last(name)] == 1 else name.removeprefix("audio/")),
            ),
        )

    def _elsewhere(self, row: int) -> Html:
        """What the model makes of the same second on other devices."""
        p, others = self.predictions, self.others[row]
        if not others:
            return Html("")
        by = {True: [], False: []}
        for other in sorted(others, key=lambda i: p.device[i]):
            by[bool(p.correct[other])].append(DEVICES[p.device[other]].upper())
        words = {True: "right", False: "wrong"}
        parts = [f"{words[right]} on {', '.join(names)}" for right, names in by.items() if names]
        return el("span", f"same second: {'; '.join(parts)}", class_="hint")

    def spectrum(self, device: int) -> Html:
        """How loud each frequency is on a device, against the others; nothing where that is not known."""
        if device not in self.spectra:
            return Html("")
        levels = self.spectra[device]
        every = np.concatenate([*self.spectra.values(), [-1.0, 1.0]])  # one scale for all devices
        x = self._frequency(len(levels))
        y = svg.axis("level against the others (dB)", [every.min(), every.max()])
        left, at = svg.place(x, y, x.low, 0)
        zero = el("path", d=f"M{left:.1f} {at:.1f}H{svg.LARGE.width - svg.LARGE.right}", class_="axis")
        name = DEVICES[device]
        heard = f"mean over {self.n_spectrum} seconds that all devices have recorded"
        text = f"What {name.upper()} does to the sound: {heard}"
        series = svg.Series(name.upper(), range(len(levels)), levels.tolist())
        return svg.lines(f"spectrum-{name}", text, x, y, [series], zero)

    def _frequency(self, n_mels: int) -> svg.Axis:
        """From the lowest to the highest mel bin, with ticks in kHz."""
        config = self._recordings.front_end.config
        low, high = (_mel(hz) for hz in (config.f_min, config.f_max or config.sample_rate / 2))
        places = {(_mel(1000 * khz) - low) / (high - low) * (n_mels - 1): khz for khz in KILOHERTZ}
        ticks = [at for at in places if 0 <= at <= n_mels - 1]
        return svg.Axis("frequency (kHz, on the mel scale)", 0, n_mels - 1, ticks, lambda at: f"{places[at]:g}")


def _last(name: str) -> str:
    """Of a path, without its folders."""
    return name.rpartition("/")[2]


def _mel(hertz: float) -> float:
    """HTK's scale, the log-mel's."""
    return 2595 * math.log10(1 + hertz / 700)
