"""Raw sound (PCM) from a pipe, such as arecord's or ffmpeg's, as it comes."""

import io
import os
import time
from collections.abc import Iterator

import numpy as np
import soundfile
from torch import Tensor

from dcase.data.recordings import resampled
from dcase.data.sound import is_odd_ratio
from dcase.errors import UserError, one_line

FORMATS = {"s16le": "PCM_16", "s24le": "PCM_24", "s32le": "PCM_32", "f32le": "FLOAT"}  # to libsndfile's names
_PIECE_SECONDS = 0.05  # what a sample waits for at most, but for the resampling filter
_LONGEST = 2**16  # bytes of a WAV header


class PcmStream:
    """PCM from a file descriptor. What a WAV header tells, such as arecord writes, takes the place of ``pcm`` (a key of
    `FORMATS`), ``rate`` (Hz) and ``channels``; it is read at once."""

    def __init__(self, file: int, pcm: str, rate: int, channels: int):
        self.pcm, self.rate, self.channels = pcm, rate, channels
        self.waited = 0.0  # seconds, for bytes
        self._file, self.held = file, b""  # at the end, bytes that are no whole sample of all channels
        os.set_blocking(file, True)  # another program may have changed it
        self._fill(4)
        if self.held.startswith((b"fLaC", b"OggS", b"ID3", b"FORM", b"RF64")):
            raise UserError("standard input is a sound file, no PCM: give the file's name, or decode it with ffmpeg")
        if self.held == b"RIFF":
            self._skip_header()

    def __str__(self) -> str:
        return f"standard input ({self.pcm}, {self.rate:,} Hz, channels: {self.channels})"

    def pieces(self, sample_rate: int) -> Iterator[Tensor]:
        """Yield the sound as `recordings.pieces` does, soon after it comes; raise `UserError` as that does."""
        if is_odd_ratio(self.rate, sample_rate):
            raise UserError(f"{self} has too odd a ratio to resample to {sample_rate} Hz: give another --rate")
        return resampled(self._read, self.rate, sample_rate, _PIECE_SECONDS, self)

    def _read(self, n: int) -> np.ndarray:
        """Return the next n samples (n, channels), float32; fewer only at the end."""
        kind = {"samplerate": self.rate, "channels": self.channels, "subtype": FORMATS[self.pcm]}
        size = int(self.pcm[1:3]) // 8 * self.channels
        self._fill(n * size)
        end = min(n, len(self.held) // size) * size
        data, self.held = self.held[:end], self.held[end:]
        sound = io.BytesIO(data)
        return soundfile.read(sound, format="RAW", endian="LITTLE", dtype="float32", always_2d=True, **kind)[0]

    def _fill(self, size: int) -> None:
        """Wait until that many bytes are held, or the input ends."""
        before = time.monotonic()
        try:
            while len(self.held) < size and (new := os.read(self._file, size - len(self.held))):
                self.held += new
        except OSError as error:
            raise UserError(f"standard input cannot be read ({error.strerror})") from error
        self.waited += time.monotonic() - before

    def _skip_header(self) -> None:
        names = {kind: name for name, kind in FORMATS.items()}
        at, chunk = 12, b""  # behind "RIFF", its size and "WAVE", chunks of a name, a size and so many bytes
        while chunk[:4] != b"data" and at < _LONGEST:
            self._fill(at + 8)
            chunk = self.held[at : at + 8]
            at += 8 + (0 if chunk[:4] == b"data" else int.from_bytes(chunk[4:], "little") + 1 & ~1)  # of even length
        try:
            with soundfile.SoundFile(io.BytesIO(self.held)) as header:
                self.rate, self.channels, self.pcm = header.samplerate, header.channels, names[header.subtype]
        except (soundfile.SoundFileError, KeyError) as error:
            wanted = ", ".join(FORMATS)
            raise UserError(f"standard input is a WAV file, but not of {wanted} ({one_line(error)})") from error
        self.held = b""
