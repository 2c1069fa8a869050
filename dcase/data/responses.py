"""Clips of device a, heard through the impulse responses of other devices."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dcase.data.sound import CHECK, read_samples, resampler
from dcase.data.tau22 import DEVICES
from dcase.errors import UserError

SUFFIXES = (".wav", ".flac")
RESAMPLER_REACH = 7  # samples at the lower rate, to either side; torchaudio's filter has 6 zero crossings there


class DeviceResponses(nn.Module):
    """Waveform (b, 1, samples) -> the same, each clip of device a with probability ``p`` through one of the responses.

    Only device a: the training clips of the others bear the colour of theirs already.

    Source: Morocutti et al., arXiv:2305.07499. There a response is taken at the level at which it was published. Here
    it has unit energy at the model's rate, and so leaves the level of white noise as it is: the log-mel depends on the
    level, and a response's own says how it was measured and nothing about the device. As there, a response's delay is
    left in it: the clip begins later by a few ms, and time rolling moves it by far more.
    """

    def __init__(self, responses: list[Tensor], p: float):
        """``responses``: (samples,) of each, at the model's rate."""
        super().__init__()
        self.p = p
        # No buffers: checkpoints do not hold them, and processes that train together do not exchange them.
        self.responses = nn.utils.rnn.pad_sequence([_of_unit_energy(r) for r in responses], batch_first=True)
        self._spectra: dict[tuple, Tensor] = {}

    @classmethod
    def from_folder(cls, folder: Path, sample_rate: int, p: float) -> "DeviceResponses":
        """The .wav and .flac files in ``folder``, in the order of their names, mixed down and resampled to
        ``sample_rate`` (Hz).

        Raises `UserError` for a folder that is missing or has no such file, and for a file that is unreadable, not
        finite or silent.
        """
        folder = Path(folder)
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        except OSError as error:
            raise UserError(f"--dir_path {folder} cannot be read ({error.strerror}): check the folder") from error
        files = [file for file in files if not file.name.startswith(".")]  # what macOS packs beside every file
        if not files:
            raise UserError(f"--dir_path {folder} has no .wav or .flac file: give the folder that they lie in")
        return cls([_read(file, sample_rate) for file in files], p)

    def forward(self, waveform: Tensor, device: Tensor, length: Tensor) -> Tensor:
        """``device`` (b,): index in DEVICES; ``length`` (b,): samples of each clip, what follows is padding.

        Two random numbers are used up for every clip, on the CPU: a GPU then hears the same responses.
        """
        coin, choice = torch.rand(len(waveform)), torch.randint(len(self.responses), (len(waveform),))
        rows = ((device == DEVICES.index("a")) & (coin < self.p).to(device.device)).nonzero()[:, 0]
        if not len(rows):
            return waveform
        heard = self._through(waveform[rows, 0], choice.to(waveform.device)[rows])
        padding = torch.arange(heard.shape[1], device=heard.device) >= length[rows, None]
        return waveform.index_copy(0, rows, heard.masked_fill(padding, 0)[:, None])

    def _through(self, waveform: Tensor, choice: Tensor) -> Tensor:
        """Convolve (clips, samples) with a response each, ``choice`` (clips,); the end that rings on is cut off."""
        samples = waveform.shape[1]
        n_fft = _fft_length(samples + min(samples, self.responses.shape[1]) - 1)
        spectra = self._spectra_of(n_fft, samples, waveform.device)
        return torch.fft.irfft(torch.fft.rfft(waveform, n_fft) * spectra[choice], n_fft)[:, :samples]

    def _spectra_of(self, n_fft: int, samples: int, device: torch.device) -> Tensor:
        """(responses, n_fft // 2 + 1), complex, of their first ``samples``: what comes later is not heard in a clip."""
        key = (n_fft, min(samples, self.responses.shape[1]), device)
        if key not in self._spectra:  # kept for one length: a data set's clips are nearly all of the same
            self._spectra = {key: torch.fft.rfft(self.responses[:, :samples].to(device), n_fft)}
        return self._spectra[key]


def _fft_length(least: int) -> int:
    """The next length with no other factors than 2, 3 and 5, and of them mostly 2: an FFT of it is fast."""
    return min(m << (-(-least // m) - 1).bit_length() for m in (1, 3, 5, 9, 15))


def _of_unit_energy(response: Tensor) -> Tensor:
    return (response / response.double().square().sum().sqrt()).float()


def _read(file: Path, sample_rate: int) -> Tensor:
    """(samples,) at ``sample_rate``, of a sound file with at least one channel."""
    try:
        samples, rate = read_samples(file)
    except UserError as error:  # whose advice is for a clip
        raise UserError(f"--dir_path: {str(error).removesuffix(CHECK)}remove or replace that file") from error
    response = torch.from_numpy(samples.mean(axis=1))
    if not 0 < response.double().square().sum() < float("inf"):
        raise UserError(f"--dir_path: {file} is empty, silent or not finite: remove or replace that file")
    if rate == sample_rate:
        return response
    # Resampling spreads a sample to both sides. Of a response that begins with its peak, the half that comes before it
    # would be lost, and the lowest octave come out by up to 10 dB too loud.
    lead_in = math.ceil(RESAMPLER_REACH * rate / min(rate, sample_rate))
    return resampler(rate, sample_rate)(nn.functional.pad(response, (lead_in, 0)))
