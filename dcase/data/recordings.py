"""Recordings of any length, rate and format: read a piece at a time, and cut into windows as long as training clips."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from dcase.data.logmel import LogMelConfig
from dcase.data.sound import cut_short, fault_of, is_odd_ratio, resampler
from dcase.errors import UserError, one_line
from dcase.files import regular

PIECE_SECONDS = 30  # length of the pieces


@dataclass(frozen=True)
class Span:
    """Lengths that a model takes at once, in samples at the recordings' rate."""

    window: int  # of the pieces that a recording longer than `most` is cut into
    least: int  # a shorter recording is repeated up to this length
    most: int  # a recording up to this length is one window


def span_of(config: LogMelConfig, frames: int, orig_sample_rate: int) -> Span:
    """Return the lengths for a model of ``frames`` frames, which tell how long its training clips were.

    A clip has 1 + resampled samples // hop_length frames, so clips between ``window`` and ``most`` have ``frames``: at
    the default settings, 65 frames are 1 s, or up to 16 ms more. With --target_length, a shorter clip is padded by the
    log-mel, as in training, and only has to fill one FFT. Training and test read only the beginning of a longer clip:
    a window and the samples after it that the last frames reach (`logmel.samples_for`). Here every window is read as a
    clip that ends there.
    """

    def first(resampled: int) -> int:  # samples that make at least this many resampled ones
        return (resampled - 1) * orig_sample_rate // config.sample_rate + 1

    of_fft = first(config.n_fft // 2 + 1)
    # Not first((frames - 1) * hop_length): that is a sample less than 1 s of 44,100 Hz, as resampling rounds up.
    window = max(-(-(frames - 1) * config.hop_length * orig_sample_rate // config.sample_rate), of_fft)
    most = max(first(frames * config.hop_length) - 1, window)
    return Span(window, window if config.target_length is None else of_fft, most)


def pieces(path: Path, sample_rate: int) -> Iterator[Tensor]:
    """Yield a sound file as (1, samples), float32, some seconds at a time: mono, resampled to ``sample_rate`` (Hz).

    Concatenated, the pieces equal `sound.read_wav`. Raises `UserError`, naming the file, where it is missing,
    unreadable, truncated, empty, not finite or far too loud; some of it shows only at the file's end.
    """
    try:
        open(regular(path), "rb").close()  # libsndfile would only say "System error"
        with soundfile.SoundFile(path) as file:
            if cut := cut_short(file):
                raise UserError(f"{path} cannot be read ({cut})")
            if is_odd_ratio(file.samplerate, sample_rate):
                raise UserError(f"{path} has {file.samplerate} Hz, too odd a ratio to resample to {sample_rate} Hz")
            read = partial(file.read, dtype="float32", always_2d=True)
            n_read = yield from resampled(read, file.samplerate, sample_rate, PIECE_SECONDS, path)
            if n_read < file.frames:  # a cut MP3 file; FLAC's decoder reports it, and an OGG does not know its length
                raise UserError(f"{path} cannot be read (truncated: {n_read} of {file.frames} samples)")
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: soundfile's, for a name in .raw
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from error


def resampled(
    read: Callable[[int], np.ndarray], rate: int, sample_rate: int, seconds: float, name: object
) -> Generator[Tensor, None, int]:
    """Yield the sound of ``read`` as `pieces` does, ``seconds`` at a time, and return the number of samples read.

    ``read(n)`` returns the next n samples (n, channels) at ``rate``, float32; fewer only at the end. Each piece is
    resampled together with the samples of its neighbours that the filter reaches.
    """
    divisor = math.gcd(rate, sample_rate)
    step, made = rate // divisor, sample_rate // divisor  # `step` samples become `made` samples
    size = math.ceil(seconds * rate / step) * step
    resample = resampler(rate, sample_rate) if step != made else None
    reach = -(-resample.width // step) * step if resample else 0  # of the filter, to either side
    held, before = torch.zeros(1, 0), 0  # samples read, from ``before`` samples before the next piece
    n_read = 0
    while True:
        new = read(before + size + reach - held.shape[1])
        n_read += len(new)
        if fault := fault_of(new) if len(new) or not n_read else "":
            raise UserError(f"{name} is no recording, {fault}")
        held = torch.cat([held, torch.from_numpy(new.mean(axis=1, keepdims=True).T)], 1)
        at_end = held.shape[1] < before + size + reach
        y = resample(held) if resample else held
        y = y[:, before // step * made :]
        yield y if at_end else y[:, : size // step * made]
        if at_end:
            return n_read
        held = held[:, before + size - reach :]
        before = reach


def windows(pieces: Iterable[Tensor], span: Span, hop: int) -> Iterator[Tensor]:
    """Cut sound, (1, samples) a piece at a time, into the windows (1, samples) that a model takes.

    Sound up to ``span.most`` is one window, repeated from its start where it is shorter than ``span.least``. In longer
    sound, a window begins every ``hop`` samples, and one more ends with the sound, so that none is left out.
    """
    held = torch.zeros(1, 0)
    start, end = 0, None  # of the next and of the last window, in ``held``
    for piece in pieces:
        held = torch.cat([held, piece], 1)
        if end is None and held.shape[1] <= span.most:
            continue  # it may end here
        while start + span.window <= held.shape[1]:
            yield held[:, start : start + span.window]
            start, end = start + hop, start + span.window
        done = min(start, held.shape[1] - span.window)
        held, start, end = held[:, done:], start - done, end - done
    if end is None:
        yield held.repeat(1, max(1, -(-span.least // held.shape[1])))[:, : max(span.least, held.shape[1])]
    elif end < held.shape[1]:
        yield held[:, -span.window :]
