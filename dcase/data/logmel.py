"""The front end: waveform (b, 1, samples) -> normalised log-mel (b, 1, n_mels, frames).

Resample (a pack is at the model's rate already) -> power mel spectrogram -> log(x + 1e-5), as the DCASE2025 Task 1
baseline does (CPJKU/dcase2025_task1_baseline, README) -> subtract the mean and divide by the deviation of the training
clips, which `fit` has computed: 0 and 1 without it. At 32 kHz, hop 500 and window 3072, frames are 15.6 ms apart and 96
ms long; a 1-second clip has 65 frames.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor, nn

from dcase.data.sound import MOST_HZ, is_odd_ratio
from dcase.errors import UserError, check_range

LOG_OFFSET = 1e-5  # power
SILENCE = math.log(LOG_OFFSET)  # -11.5, the log-mel of digital silence
_PIECE = 2**19  # samples, over all frames, that a CPU transforms at a time: their spectrum then stays in its cache
# Of whole numbers: far above any log-mel of use, and refused before memory is taken for filters and padding.
MOST = {
    "sample_rate": MOST_HZ, "window_length": 2**16, "hop_length": 2**20, "n_fft": 2**16, "n_mels": 2048,
    "target_length": 2**16,
}  # fmt: skip
_BLOCK = 16  # mel bins per matrix product: neighbours share few FFT bins, and elsewhere their filters are zero


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
    """Frames of the log-mel: longer ones are cut, shorter ones padded with the log of silence. None: the clip's own
    length (65 frames for 1 s at the default settings)."""
    batch_lengths: bool = False
    """Take clips of several lengths, each at its own, up to --target_length (None: the longest recording's): the model
    leaves out what fills them up in a batch. For aum_tiny, aum_small and aum_base, which do not mix frames before or
    after their blocks."""

    def __post_init__(self):
        for name, most in MOST.items():
            check_range(self, name, least=1, most=most)
        check_range(self, "f_min f_max", least=0, most=MOST_HZ)
        if self.window_length > self.n_fft:
            raise UserError(f"--window_length {self.window_length} is longer than --n_fft {self.n_fft}: raise --n_fft")
        f_max = self.sample_rate / 2 if self.f_max is None else self.f_max
        if not 0 <= self.f_min < f_max <= self.sample_rate / 2:
            raise UserError(
                f"--f_min {self.f_min} and --f_max {f_max} Hz: 0 <= f_min < f_max <= {self.sample_rate / 2}, "
                "half of --sample_rate"
            )


def frames_of(config: LogMelConfig, samples: int, orig_sample_rate: int) -> int:
    """Return the frames of a clip's log-mel: --target_length, else 1 + resampled samples // hop_length.

    Raises `UserError` for a clip that is too short for one window.
    """
    resampled = math.ceil(samples * config.sample_rate / orig_sample_rate)
    if resampled <= config.n_fft // 2:
        raise UserError(f"clips of {samples} samples at {orig_sample_rate} Hz are too short for --n_fft {config.n_fft}")
    if config.target_length is not None:
        return config.target_length
    return 1 + resampled // config.hop_length


def fitting(config: LogMelConfig, orig_sample_rate: int) -> LogMelConfig:
    """Return the front end for recordings of that rate (Hz): this one, or one of their rate with the same durations
    where some of its mel bins would be empty."""
    if not empty_bins(config, orig_sample_rate) or config.f_min >= orig_sample_rate / 2:
        return config
    share, end = orig_sample_rate / config.sample_rate, orig_sample_rate / 2
    return dataclasses.replace(
        config,
        sample_rate=orig_sample_rate,
        n_fft=2 ** math.ceil(math.log2(config.n_fft * share)),
        window_length=round(config.window_length * share),
        hop_length=int(config.hop_length * share),
        f_max=None if config.f_max is None else end,
    )


def empty_bins(config: LogMelConfig, orig_sample_rate: int) -> str:
    """Return a line where recordings of that rate (Hz) end below the highest mel bins; else ""."""
    end, highest = orig_sample_rate / 2, config.f_max or config.sample_rate / 2
    low, here, top = (math.log1p(hz / 700) for hz in (config.f_min, end, highest))  # mel, but for a factor
    empty = config.n_mels - math.ceil((here - low) / (top - low) * (config.n_mels + 1))
    if empty < 1:
        return ""
    if empty >= config.n_mels:
        below = f"below --f_min {config.f_min:g}"
        return f"recordings of {orig_sample_rate} Hz end at {end:g} Hz, {below}: every mel bin is empty"
    of = f"{empty} of the {config.n_mels} mel bins"
    return f"recordings of {orig_sample_rate} Hz end at {end:g} Hz: the highest {of} are empty"


def samples_for(config: LogMelConfig, sample_rate: int) -> int | None:
    """Return the samples at a rate (Hz) that the first ``target_length`` frames depend on; only these need be read.

    None where the clip's own length counts.
    """
    if config.target_length is None:
        return None
    samples = (config.target_length - 1) * config.hop_length + config.n_fft  # half a window more than the last frame's
    return math.ceil(samples * sample_rate / config.sample_rate)


class LogMel(nn.Module):
    """Waveform (b, 1, samples) at the configuration's ``sample_rate`` -> log-mel (b, 1, n_mels, frames), normalised.

    `resampled` converts sound at ``orig_sample_rate`` to that rate. The state dict has only ``mean`` and ``std`` of the
    training clips' log-mel, which `fit` computes.
    """

    def __init__(self, config: LogMelConfig, orig_sample_rate: int):
        super().__init__()
        if is_odd_ratio(orig_sample_rate, config.sample_rate):
            raise UserError(
                f"--orig_sample_rate {orig_sample_rate} and --sample_rate {config.sample_rate} are too odd a ratio to "
                "resample: give another --sample_rate"
            )
        self.config, self.orig_sample_rate = config, orig_sample_rate
        self.resample = torchaudio.transforms.Resample(orig_sample_rate, config.sample_rate)
        for name, buffer in list(self.resample.named_buffers()):  # not for checkpoints: the configuration gives them
            self.resample.register_buffer(name, buffer, persistent=False)
        f_max = config.sample_rate / 2 if config.f_max is None else config.f_max
        filters = torchaudio.functional.melscale_fbanks(
            config.n_fft // 2 + 1, config.f_min, f_max, config.n_mels, config.sample_rate
        )
        self.register_buffer("filters", filters, persistent=False)  # (FFT bins, n_mels)
        self.register_buffer("window", torch.hann_window(config.window_length), persistent=False)
        self.blocks = []  # (FFT bins, mel bins) of the parts of the filters that are not all zeros, as slices
        for mels in (slice(m, m + _BLOCK) for m in range(0, config.n_mels, _BLOCK)):
            used = filters[:, mels].any(1).nonzero().flatten().tolist() or [0]
            self.blocks.append((slice(used[0], used[-1] + 1), mels))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def resampled(
        self, waveform: Tensor, length: Tensor, scale: Tensor | None = None, sample_rate: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (waveform (b, 1, samples), length (b,)) at the configuration's ``sample_rate``, float32, full scale 1.

        ``sample_rate``: of the waveform, Hz; None: ``orig_sample_rate``. ``scale`` (b,): factor of an int16 waveform.
        """
        sample_rate = self.orig_sample_rate if sample_rate is None else sample_rate
        if waveform.dtype == torch.int16:
            waveform = waveform * scale.view(-1, 1, 1)  # float32
        if sample_rate == self.config.sample_rate:
            return waveform, length
        if sample_rate != self.orig_sample_rate:
            raise ValueError(f"sound at {sample_rate}, not {self.orig_sample_rate} or {self.config.sample_rate} Hz")
        with torch.autocast(waveform.device.type, enabled=False):
            waveform = self.resample(waveform.float())
        return waveform, -(-length * self.config.sample_rate // sample_rate)

    def forward(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """``length`` (b,): samples of each clip, where some are padded at their end; None: none are."""
        return (self.raw(waveform, length) - self.mean) / self.std

    @property
    def silence(self) -> Tensor:
        """Return what a mel of 0 is in the normalised log-mel, a scalar."""
        return (SILENCE - self.mean) / self.std

    def raw(self, waveform: Tensor, length: Tensor | None = None) -> Tensor:
        """Return the log-mel before normalisation, always computed in float32, of each clip at its own length."""
        if self.config.target_length is None or length is None:
            return self._whole(waveform)
        x = waveform.new_empty(len(waveform), 1, self.config.n_mels, self.config.target_length, dtype=torch.float32)
        for samples in length.unique().tolist():
            rows = length == samples
            x[rows] = self._whole(waveform[rows, :, :samples])
        return x

    def _whole(self, waveform: Tensor) -> Tensor:
        """(b, 1, samples) without padding -> (b, 1, n_mels, frames), cut or padded to ``target_length``."""
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            n_samples = (1 + waveform.shape[-1] // self.config.hop_length) * self.config.n_fft  # of a clip's frames
            clips = len(waveform) if waveform.is_cuda else max(1, round(_PIECE / n_samples))
            x = torch.cat([self._piece(piece[:, 0]) for piece in waveform.float().split(clips)])[:, None]
        frames = self.config.target_length
        if frames is None:
            return x
        return nn.functional.pad(x[..., :frames], (0, max(0, frames - x.shape[-1])), value=SILENCE)

    def _piece(self, waveform: Tensor) -> Tensor:
        """(b, samples) -> (b, n_mels, frames), a transposed view."""
        config = self.config
        spectrum = torch.stft(
            waveform, config.n_fft, config.hop_length, config.window_length, self.window, return_complex=True
        ).mT  # (b, frames, FFT bins): its order in memory
        squares = torch.view_as_real(spectrum).square_()
        power = (squares[..., 0] + squares[..., 1]).flatten(0, 1)
        mel = torch.cat([power[:, bins] @ self.filters[bins, mels] for bins, mels in self.blocks], 1)
        return mel.add_(LOG_OFFSET).log_().view(len(waveform), -1, config.n_mels).mT

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Set ``mean`` and ``std`` over all values of the log-mels of (waveform, length). Sums are in float64."""
        total = squares = count = 0
        for waveform, length in batches:
            x = self.raw(waveform.to(self.mean.device), length).double()
            if self.config.batch_lengths:  # without the padding
                frames = (1 + length // self.config.hop_length).tolist()
                x = torch.cat([clip[..., :n].flatten() for clip, n in zip(x, frames, strict=True)])
            total, squares, count = total + x.sum().item(), squares + x.square().sum().item(), count + x.numel()
        mean = total / count
        self.mean.fill_(mean)
        self.std.fill_(
            max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-3)
        )  # no division by 0 where all clips are silent
