"""Augmentation of training batches, on the batch's device; nothing here runs in evaluation.

Device responses (`responses.py`) and time rolling change the waveform; Freq-MixStyle, mixup and masking change the
normalised log-mel, in this order: after masking, MixStyle would take its statistics from the masks. Masks are filled
with 0, the mean of the normalised log-mel. The DCASE2025 baseline masks the linear mel spectrogram with 0 instead, and
so before Freq-MixStyle (--mask_on mel).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torchaudio
from torch import Tensor, nn

from dcase.data.logmel import SILENCE, LogMelConfig
from dcase.data.responses import DeviceResponses
from dcase.errors import check_range


@dataclass(frozen=True)
class AugmentConfig:
    roll_sec: float = 0.1
    """Roll each clip in time, around its end, by up to this much either way, seconds."""
    mixstyle_p: float = 0.6
    """Probability that Freq-MixStyle changes a batch."""
    mixstyle_alpha: float = 0.5
    """Freq-MixStyle's weights are drawn from Beta(alpha, alpha)."""
    freqm: int = 48
    """Largest width of a frequency mask, mel bins; each width is drawn from 0 to this. 0: no mask."""
    timem: int = 64
    """Largest width of a time mask, frames, before --timem_max_fraction. 0: no mask."""
    timem_max_fraction: float = 0.2
    """Largest part of a clip that a time mask covers; 1.0: no limit (64 of 65 frames would erase half of a 1-second
    clip on average)."""
    mask_on: Literal["log_mel", "mel"] = "log_mel"
    """What is masked. log_mel: the log-mel after Freq-MixStyle and mixup, with its mean. mel: the mel spectrogram
    before its logarithm and before Freq-MixStyle, with silence, as the DCASE2025 baseline does."""
    dir_path: str | None = None
    """Folder of impulse responses of recording devices (WAV or FLAC files of any rate, such as MicIRP's,
    micirp.blogspot.com) to filter clips of the first device (a) with; None: no filter."""
    dir_p: float = 0.4
    """Probability that a clip of the first device is filtered with one of --dir_path's responses."""
    mixup_alpha: float = 0.0
    """Mixup's weights are drawn from Beta(alpha, alpha), such as 0.3; 0: no mixup."""

    def __post_init__(self):
        check_range(self, "mixstyle_p timem_max_fraction dir_p", least=0, most=1)
        check_range(self, "mixstyle_alpha", least=0.001, most=100)  # --mixstyle_p 0 turns it off
        check_range(self, "mixup_alpha", least=0, most=100)  # at 100, all weights are near a half
        check_range(self, "freqm timem", least=0, most=10**6)
        check_range(self, "roll_sec", least=0, most=3600)


def roll(waveform: Tensor, max_shift: int, length: Tensor) -> Tensor:
    """Roll each clip of (b, 1, samples) by its own shift of up to ``max_shift`` samples either way.

    ``length`` (b,): samples of each clip; the padding that follows stays in place.
    """
    b, _, samples = waveform.shape
    shift = torch.randint(-max_shift, max_shift + 1, (b, 1, 1), device=waveform.device)
    if waveform.device.type == "cpu":  # a quarter of the time that gathering takes
        rolled = waveform.clone()
        for clip, by, n in zip(rolled, shift.flatten().tolist(), length.tolist(), strict=True):
            clip[:, :n] = clip[:, :n].roll(by, 1)
        return rolled
    place, length = torch.arange(samples, device=waveform.device), length.view(-1, 1, 1)
    return waveform.gather(2, torch.where(place < length, (place - shift) % length, place))


def freq_mixstyle(x: Tensor, p: float, alpha: float, lengths: Tensor | None = None) -> Tensor:
    """Mix each clip's mean and deviation per frequency in a batch (b, 1, n_mels, frames) with those of another clip.

    Weights are drawn from Beta(alpha, alpha). It happens with probability p, decided once for the whole batch.
    ``lengths`` (b,): frames of each clip, whose statistics leave out the others; None: all.
    Source: MixStyle, arXiv:2104.02008, with statistics per frequency band in place of channels, as described in
    arXiv:2305.07499.
    """
    if torch.rand(()) >= p:
        return x
    n = lengths if lengths is None else lengths.to(x.device).view(-1, 1, 1, 1)
    mean = _mean(x, n)  # (b, 1, n_mels, 1)
    centred = x - mean
    # Tensor.var takes ten times as long on a CPU.
    std = (_mean(centred.square(), n, less=1) + 1e-6).sqrt()
    weight = torch.distributions.Beta(alpha, alpha).sample((len(x), 1, 1, 1)).to(x.device, non_blocking=True)
    other = torch.randperm(len(x), device=x.device)
    mixed_mean = weight * mean + (1 - weight) * mean[other]
    mixed_std = weight * std + (1 - weight) * std[other]
    return centred / std * mixed_std + mixed_mean


def _mean(x: Tensor, n: Tensor | None, less: int = 0) -> Tensor:
    """Return (b, 1, n_mels, 1): the sum over the first ``n`` frames (None: all), divided by their number - ``less``."""
    if n is None:
        return x.sum((1, 3), keepdim=True) / (x.shape[1] * x.shape[3] - less)
    own = torch.arange(x.shape[3], device=x.device) < n
    return (x * own).sum((1, 3), keepdim=True) / (n - less).clamp(min=1)


class Mix(NamedTuple):
    """Mixup of one batch: ``weight`` (b,), at least a half, of each clip and the rest of clip ``other`` (b,).

    One object mixes the log-mel and every kind of target. Both None: no mixup.
    Source: mixup, arXiv:1710.09412. A weight below a half, as there, makes the same pairs with the clips swapped.
    """

    weight: Tensor | None = None
    other: Tensor | None = None

    @classmethod
    def draw(cls, b: int, alpha: float, device: torch.device | str = "cpu") -> "Mix":
        """Draw a weight from Beta(alpha, alpha) for each of ``b`` clips and an order of them; 0: nothing is drawn."""
        if alpha == 0:
            return cls()
        weight = torch.distributions.Beta(alpha, alpha).sample((b,)).to(device, non_blocking=True)
        return cls(torch.maximum(weight, 1 - weight), torch.randperm(b, device=device))

    def __call__(self, x: Tensor) -> Tensor:
        """Mix (b, ...): a log-mel (b, 1, n_mels, frames), or targets (b, n_classes)."""
        if self.weight is None:
            return x
        weight = self.weight.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return weight * x + (1 - weight) * x[self.other]

    def lengths(self, lengths: Tensor | None) -> Tensor | None:
        """Return the frames of each mixed clip (b,), those of the longer of its two; None: all have equally many."""
        if lengths is None or self.other is None:
            return lengths
        return torch.maximum(lengths, lengths[self.other.to(lengths.device)])


class Masking(nn.Module):
    """Mask a frequency band and a time span of each clip (SpecAugment, arXiv:1904.08779) in (b, 1, n_mels, frames)."""

    def __init__(self, config: AugmentConfig, n_mels: int, frames: int):
        super().__init__()
        freqm, timem, p = min(config.freqm, n_mels), min(config.timem, frames), config.timem_max_fraction
        masks = [torchaudio.transforms.FrequencyMasking(freqm, iid_masks=True)] if freqm else []
        masks += [torchaudio.transforms.TimeMasking(timem, iid_masks=True, p=p)] if timem else []
        self.masks = nn.ModuleList(masks)

    def forward(self, x: Tensor, value: Tensor | float = 0.0) -> Tensor:
        for mask in self.masks:
            x = mask(x, value)
        return x


class Augment(nn.Module):
    """Every augmentation of a training batch, in order: `waveform`, then `log_mel` of what that gives.

    It has no entries in a state dict.
    """

    def __init__(self, config: AugmentConfig, logmel: LogMelConfig, frames: int):
        super().__init__()
        self.config, self.sample_rate = config, logmel.sample_rate
        self.masking = Masking(config, logmel.n_mels, frames)
        self.responses: DeviceResponses | None = None

    def load_responses(self) -> None:
        """Read the responses of --dir_path. Raises `UserError` where the folder or a file cannot be used."""
        if self.config.dir_path:
            folder = Path(self.config.dir_path)
            self.responses = DeviceResponses.from_folder(folder, self.sample_rate, self.config.dir_p)

    def waveform(self, x: Tensor, device: Tensor, length: Tensor) -> Tensor:
        """Apply device responses and time rolling to (b, 1, samples); ``device`` (b,), ``length`` (b,) in samples."""
        if self.responses is not None:
            x = self.responses(x, device, length)
        return roll(x, round(self.config.roll_sec * self.sample_rate), length)

    def log_mel(
        self, x: Tensor, silence: Tensor | float = SILENCE, lengths: Tensor | None = None
    ) -> tuple[Tensor, Mix]:
        """Apply Freq-MixStyle, mixup and masking to (b, 1, n_mels, frames), of clips of ``lengths`` (b,) frames. Return
        it with the mixup that its targets and lengths need.

        ``silence``: what a mel of 0 is in ``x``, `LogMel.silence`; the default is that of a log-mel not normalised.
        """
        mel_first = self.config.mask_on == "mel"
        if mel_first:  # a mask of the mel itself gives the same log-mel
            x = self.masking(x, silence)
        x = freq_mixstyle(x, self.config.mixstyle_p, self.config.mixstyle_alpha, lengths)
        mix = Mix.draw(len(x), self.config.mixup_alpha, x.device)
        return mix(x) if mel_first else self.masking(mix(x)), mix
