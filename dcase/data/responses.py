"""Augmentation that filters clips of the first device (TAU22's a) with the impulse responses of other devices."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dcase.data.sound import CHECK, is_odd_ratio, is_sound, read_samples, resampler
from dcase.errors import UserError

RESAMPLER_REACH = 7  # samples at the lower rate, to either side; torchaudio's filter has 6 zero crossings there


class DeviceResponses(nn.Module):
    """Filter clips of the first device in a waveform (b, 1, samples), with probability ``p``, with one of these.

    The training clips of other devices already have the colour of theirs.

    Source: Morocutti et al., arXiv:2305.07499. There, a response has the level at which it was published. Here it has
    unit energy at the model's rate and so keeps the level of white noise: the log-mel depends on the level, and that of
    a published response tells how it was measured, not how the device sounds. As there, a response keeps its delay: the
    clip begins a few ms later, and time rolling moves it by far more.
    """

    def __init__(self, responses: list[Tensor], p: float):
        """``responses``: one (samples,) per device, at the model's rate."""
        super().__init__()
        self.p = p
        # No buffers: they belong neither into checkpoints nor into the exchange between processes.
        self.responses = nn.utils.rnn.pad_sequence([_of_unit_energy(r) for r in responses], batch_first=True)
        self._spectra: dict[tuple, Tensor] = {}

    @classmethod
    def from_folder(cls, folder: Path, sample_rate: int, p: float) -> "DeviceResponses":
        """Read the sound files in ``folder``, sorted by name, as mono at ``sample_rate`` (Hz).

        Raises `UserError` for a folder that is missing or has no such file, and for a file that is unreadable, not
        finite or silent.
        """
        folder = Path(folder)
        try:
            files = sorted(file for file in folder.iterdir() if is_sound(file.name))  # macOS adds hidden ones
        except OSError as error:
            raise UserError(f"--dir_path {folder} cannot be read ({error.strerror}): check the folder") from error
        if not files:
            raise UserError(f"--dir_path {folder} has no sound file (.wav, .flac ...): give the folder that has them")
        return cls([_read(file, sample_rate) for file in files], p)

    def forward(self, waveform: Tensor, device: Tensor, length: Tensor) -> Tensor:
        """``device`` (b,): 0 is the first one; ``length`` (b,): samples of each clip; padding follows.

        Draws two random numbers for every clip, on the CPU, so that a GPU takes the same responses.
        """
        coin, choice = torch.rand(len(waveform)), torch.randint(len(self.responses), (len(waveform),))
        rows = ((device == 0) & (coin < self.p).to(device.device)).nonzero()[:, 0]
        if not len(rows):
            return waveform
        filtered = self._filter(waveform[rows, 0], choice.to(waveform.device)[rows])
        padding = torch.arange(filtered.shape[1], device=filtered.device) >= length[rows, None]
        return waveform.index_copy(0, rows, filtered.masked_fill(padding, 0)[:, None])

    def _filter(self, waveform: Tensor, choice: Tensor) -> Tensor:
        """Convolve each of (clips, samples) with the response ``choice`` (clips,); the ringing end is cut off."""
        samples = waveform.shape[1]
        n_fft = _fft_length(samples + min(samples, self.responses.shape[1]) - 1)
        spectra = self._spectra_of(n_fft, samples, waveform.device)
        return torch.fft.irfft(torch.fft.rfft(waveform, n_fft) * spectra[choice], n_fft)[:, :samples]

    def _spectra_of(self, n_fft: int, samples: int, device: torch.device) -> Tensor:
        """Return (responses, n_fft // 2 + 1), complex, of the first ``samples``: later ones do not reach a clip."""
        key = (n_fft, min(samples, self.responses.shape[1]), device)
        if key not in self._spectra:  # for one length: nearly all clips of a data set have the same
            self._spectra = {key: torch.fft.rfft(self.responses[:, :samples].to(device), n_fft)}
        return self._spectra[key]


def _fft_length(least: int) -> int:
    """Return the next length whose prime factors are 2, 3 and 5, mostly 2: its FFT is fast."""
    return min(m << (-(-least // m) - 1).bit_length() for m in (1, 3, 5, 9, 15))


def _of_unit_energy(response: Tensor) -> Tensor:
    return (response / response.double().square().sum().sqrt()).float()


def _read(file: Path, sample_rate: int) -> Tensor:
    """Read a response, (samples,) at ``sample_rate``."""
    try:
        samples, rate = read_samples(file)
    except UserError as error:  # its advice is for clips
        raise UserError(f"--dir_path: {str(error).removesuffix(CHECK)}remove or replace that file") from error
    response = torch.from_numpy(samples.mean(axis=1))
    if not 0 < response.double().square().sum() < float("inf"):
        raise UserError(f"--dir_path: {file} is empty, silent or not finite: remove or replace that file")
    if rate == sample_rate:
        return response
    if is_odd_ratio(rate, sample_rate):
        raise UserError(f"--dir_path: {file} has {rate} Hz, too odd a ratio to resample: remove or replace that file")
    # Resampling spreads a sample to both sides. A response that begins with its peak would lose the half before it,
    # and its lowest octave would be up to 10 dB too loud.
    lead_in = math.ceil(RESAMPLER_REACH * rate / min(rate, sample_rate))
    return resampler(rate, sample_rate)(nn.functional.pad(response, (lead_in, 0)))
