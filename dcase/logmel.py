"""The front end: waveform (b, 1, samples) at the recordings' rate -> normalised log-mel (b, 1, n_mels, frames).

Resample -> power mel spectrogram -> log(x + 1e-5), as the DCASE2025 Task 1 baseline does
(CPJKU/dcase2025_task1_baseline, README), then minus the mean and over the deviation of the training clips.
At 32 kHz, hop 500 and window 3072 a frame advances by 15.6 ms and sees 96 ms; a 1-second clip makes 65 frames.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor, nn

from dcase.errors import UserError

LOG_OFFSET = 1e-5  # power; log(LOG_OFFSET) = -11.5 is the log-mel of digital silence


@dataclass(frozen=True)
class LogMelConfig:
    sample_rate: int = 32000
    """Sampling rate of the log-mel's input, Hz; recordings are resampled to it."""
    window_length: int = 3072
    """Window of one frame, samples at --sample_rate."""
    hop_length: int = 500
    """Step from frame to frame, samples at --sample_rate."""
    n_fft: int = 4096
    """FFT size, samples; the window is padded to it with zeros."""
    n_mels: int = 256
    """Mel bins."""
    f_min: float = 0.0
    """Lower edge of the lowest mel bin, Hz."""
    f_max: float | None = None
    """Upper edge of the highest mel bin, Hz; None: half of --sample_rate."""
    target_length: int | None = None
    """Frames of the log-mel: longer ones are cut, shorter ones padded with the log of silence. None: as long as the
    clip (65 frames for 1 s at the default settings)."""

    def __post_init__(self):
        for name in ("sample_rate", "window_length", "hop_length", "n_fft", "n_mels", "target_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is at least 1; got {value}")
        if self.window_length > self.n_fft:
            raise UserError(f"--window_length {self.window_length} is longer than --n_fft {self.n_fft}: raise --n_fft")
        f_max = self.sample_rate / 2 if self.f_max is None else self.f_max
        if not 0 <= self.f_min < f_max <= self.sample_rate / 2:
            raise UserError(
                f"--f_min {self.f_min} and --f_max {f_max} Hz: 0 <= f_min < f_max <= {self.sample_rate / 2}, "
                "half of --sample_rate"
            )


def frames_of(config: LogMelConfig, samples: int, orig_sample_rate: int) -> int:
    """Frames of a clip's log-mel: --target_length, else 1 + resampled samples // hop_length.

    Raises `UserError` for a clip that is too short for one window.
    """
    resampled = math.ceil(samples * config.sample_rate / orig_sample_rate)
    if resampled <= config.n_fft // 2:
        raise UserError(f"clips of {samples} samples at {orig_sample_rate} Hz are too short for --n_fft {config.n_fft}")
    if config.target_length is not None:
        return config.target_length
    return 1 + resampled // config.hop_length


def samples_for(config: LogMelConfig, orig_sample_rate: int) -> int | None:
    """Samples at the recordings' rate that the first ``target_length`` frames can depend on: no more need be read.

    None where the clip's own length counts.
    """
    if config.target_length is None:
        return None
    samples = (config.target_length - 1) * config.hop_length + config.n_fft  # half a window more than the last frame's
    return math.ceil(samples * orig_sample_rate / config.sample_rate)


class LogMel(nn.Module):
    """Waveform (b, 1, samples) at ``orig_sample_rate`` -> log-mel (b, 1, n_mels, frames), normalised.

    ``mean`` and ``std`` of the training clips' log-mel are the only entries of its state dict; `fit` finds them.
    """

    def __init__(self, config: LogMelConfig, orig_sample_rate: int):
        super().__init__()
        self.config = config
        self.resample = torchaudio.transforms.Resample(orig_sample_rate, config.sample_rate)
        self.spectrogram = torchaudio.transforms.Spectrogram(
            n_fft=config.n_fft, win_length=config.window_length, hop_length=config.hop_length, power=None
        )
        self.mel_scale = torchaudio.transforms.MelScale(
            n_mels=config.n_mels,
            sample_rate=config.sample_rate,
            f_min=config.f_min,
            f_max=config.f_max,
            n_stft=config.n_fft // 2 + 1,
        )
        for module in self.modules():  # window and filters follow from the configuration: keep them out of checkpoints
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def forward(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """``length`` (b,): samples of each clip, where some are padded at their end; None: none is."""
        return (self.raw(waveform, length) - self.mean) / self.std

    def raw(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """The log-mel before normalisation, always computed in float32, each clip's at its own length."""
        if self.config.target_length is None or length is None:
            return self._whole(waveform)
        x = waveform.new_empty(len(waveform), 1, self.config.n_mels, self.config.target_length, dtype=torch.float32)
        for samples in length.unique().tolist():
            rows = length == samples
            x[rows] = self._whole(waveform[rows, :, :samples])
        return x

    def _whole(self, waveform: Tensor) -> Tensor:
        """(b, 1, samples), nothing of it padding -> (b, 1, n_mels, frames), cut or padded to ``target_length``."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = self.spectrogram(self.resample(waveform.float()))
            power = spectrum.real.square() + spectrum.imag.square()  # a third faster than torchaudio's abs().pow(2)
            x = torch.log(self.mel_scale(power) + LOG_OFFSET)
        frames = self.config.target_length
        if frames is None:
            return x
        return nn.functional.pad(x[..., :frames], (0, max(0, frames - x.shape[-1])), value=math.log(LOG_OFFSET))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Set ``mean`` and ``std`` over every value of the log-mels of (waveform, length). Sums run in float64."""
        total = squares = count = 0
        for waveform, length in batches:
            x = self.raw(waveform.to(self.mean.device), length).double()
            total, squares, count = total + x.sum().item(), squares + x.square().sum().item(), count + x.numel()
        mean = total / count
        self.mean.fill_(mean)
        self.std.fill_(max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-3))  # all clips silent: no division by 0
