"""Reading sound files."""

import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from dcase.errors import UserError, one_line, printable
from dcase.files import regular

MOST_HZ = 1_000_000  # of a rate
CHECK = "check the data folder with `python -m dcase.prepare`"
ENDINGS = tuple(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .voc".split())
LOUDEST = 1e6  # samples, of full scale 1: beyond unscaled 16-bit integers, and far below where a log-mel overflows
LOWEST_RATE = 1000  # Hz, that a header is believed: at 1 Hz, a second of sound would be resampled to hours


def is_sound(name: str) -> bool:
    """Whether a file in a folder is taken for sound: by its ending, unless it is hidden."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def passed_over(names: list[str], what: str = "sound") -> str:
    """Return a line about files of a folder that are not taken, as they are not ``what``."""
    listed = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"passed over {len(names):,} file{'s that are' if len(names) > 1 else ' that is'} not {what}: {listed}"


def read_samples(path: Path) -> tuple[np.ndarray, int]:
    """Read a sound file: samples (samples, channels), float32 with full scale 1, and its rate in Hz.

    Raises `UserError` where it is missing, is no sound file or ends early.
    """
    try:
        with soundfile.SoundFile(regular(path)) as file:
            samples = file.read(dtype="float32", always_2d=True)
            rate, cut = file.samplerate, cut_short(file)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: soundfile's, for a name in .raw
        raise UserError(f"{path} cannot be read ({one_line(error)}): {CHECK}") from error
    if cut:
        raise UserError(f"{path} cannot be read ({cut}): {CHECK}")
    return samples, rate


def cut_short(file: soundfile.SoundFile) -> str:
    """Return "truncated: 90 of 100 bytes of sound" where a WAV file ends before its header says, else ""."""
    # libsndfile reads such a file without an error, but notes it in its log.
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if cut and int(cut[2]) < int(cut[1]) < 0xFFFFFFFF:  # all ones: "length unknown", from programs that write to a pipe
        return f"truncated: {cut[2]} of {cut[1]} bytes of sound"
    return ""


def read_wav(path: Path, sample_rate: int) -> torch.Tensor:
    """Read a sound file of any bit depth as (1, samples), float32: mixed down and resampled to ``sample_rate`` (Hz).

    Raises `UserError` naming the file where it is missing, unreadable, truncated, empty, not finite or far too loud.
    """
    samples, rate = read_samples(path)
    if fault := fault_of(samples):
        raise UserError(f"{path} is no recording, {fault}: {CHECK}")
    waveform = torch.from_numpy(samples.mean(axis=1, keepdims=True).T if samples.shape[1] > 1 else samples.T)
    if rate == sample_rate:
        return waveform
    if is_odd_ratio(rate, sample_rate):
        raise UserError(f"{path} has {rate} Hz, too odd a ratio to resample to {sample_rate} Hz: {CHECK}")
    return resampler(rate, sample_rate)(waveform)


def fault_of(samples: np.ndarray) -> str:
    """Return why samples (samples, channels) cannot be those of a recording, or ""."""
    if not len(samples):
        return "empty"
    peak = np.abs(samples).max()
    if not np.isfinite(peak):
        return "NaN or infinite"
    return f"too loud (samples of up to {peak:.1e}, full scale is 1)" if peak > LOUDEST else ""


def is_odd_ratio(rate: int, sample_rate: int) -> bool:
    """Whether resampling would need more than 50 million coefficients, 200 MB, or a header's rate is not believed."""
    divisor = math.gcd(rate, sample_rate)
    return rate < min(LOWEST_RATE, sample_rate) or (rate // divisor) * (sample_rate // divisor) > 50_000_000


@lru_cache
def resampler(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    """Return the resampler, cached: its coefficients cost eight times as much as resampling a 1-s clip."""
    return torchaudio.transforms.Resample(rate, sample_rate)
