"""Clips to look at and listen to: log-mels as small PNGs, sound as short MP3s, both as data URIs."""

import base64
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch

from dcase.data import pack, synth
from dcase.data.logmel import LogMel, LogMelConfig
from dcase.data.pack import Pack
from dcase.data.sound import read_wav, resampler
from dcase.data.tau22 import RATE, DataConfig, leaves_folder
from dcase.errors import UserError

AUDIO_RATE = 16_000  # Hz
AUDIO_SECONDS = 4  # of a longer clip, the beginning
LEVELS = 64  # of grey in a picture: half the bytes of 256


class Recordings:
    """The sound of test clips, from the data folder or, where there is one, its pack."""

    def __init__(self, folder: Path | None, data: DataConfig, logmel: LogMelConfig):
        """``folder``: of the data; None where it is not known."""
        self.folder = folder
        rate = data.orig_sample_rate or RATE
        self.front_end = LogMel(logmel, rate)
        self.rate = logmel.sample_rate
        self._pack: Pack | None = None
        if folder is not None and data.read_from != "wav" and pack.exists(data.pack_folder(folder)):
            found = Pack(data.pack_folder(folder))
            if found.rates == pack.Rates(rate, self.rate):
                self._pack = found

    def read(self, filename: str) -> torch.Tensor:
        """Return (1, samples) float32 at the model's rate. Raise `UserError` where that cannot be read."""
        if self.folder is None:
            raise UserError("the data folder is not known: give --dataset_dir")
        if leaves_folder(filename):
            raise UserError(f"{filename} is not a recording in the data folder")
        if self._pack is None:
            return read_wav(self.folder / filename, self.rate)
        row = int(self._pack.rows(np.array([filename.encode()]))[0])
        samples = np.empty(self._pack.length[row], np.int16)
        self._pack.read(row, samples)
        return torch.from_numpy(samples * self._pack.scale[row])[None]

    def log_mel(self, waveform: torch.Tensor) -> np.ndarray:
        """Return (n_mels, frames), not normalised: natural logarithm of power."""
        length = torch.tensor([waveform.shape[-1]])
        return self.front_end.raw(waveform[None], length)[0, 0].numpy()


def data_folder(data: DataConfig, name: str) -> Path | None:
    """Return the folder of a run's recordings, from its configuration and from the data's name in results.json; None
    where neither says."""
    given = data.dataset_dir or os.environ.get("TAU22_DIR")
    if given:
        return Path(given).expanduser()
    return synth.default_folder() if name == "SynthTAU" else None


def picture(log_mel: np.ndarray, low: float, high: float) -> str:
    """Return a log-mel (n_mels, frames) as a PNG's data URI: low mel bins at the bottom, ``low`` to ``high`` in grey.

    The palette takes 16 kB a picture where matplotlib's imsave, which writes RGBA, takes 27.
    """
    grey = np.clip((log_mel - low) / max(high - low, 1e-6), 0, 1)
    pixels = np.round(grey * (LEVELS - 1)).astype(np.uint8)[::-1]
    height, width = pixels.shape
    palette = np.repeat(np.round(np.linspace(0, 255, LEVELS)).astype(np.uint8), 3).tobytes()
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette
    chunks = {b"IHDR": header, b"PLTE": palette, b"IDAT": zlib.compress(rows.tobytes(), 9), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return _uri("image/png", png)


def audio(waveform: torch.Tensor, rate: int) -> str:
    """Return sound (1, samples) as an MP3's data URI, at most `AUDIO_SECONDS` long and at full level: devices differ in
    level, and a quiet clip would be inaudible on a phone."""
    waveform = waveform[:, : AUDIO_SECONDS * rate]
    if rate != AUDIO_RATE:
        waveform = resampler(rate, AUDIO_RATE)(waveform)
    samples = waveform[0].numpy()
    peak = np.abs(samples).max(initial=0)
    with tempfile.TemporaryDirectory() as folder:  # to a BytesIO, soundfile writes by callbacks, which swallow a Ctrl-C
        path = Path(folder) / "clip.mp3"
        soundfile.write(path, samples * (0.9 / peak if peak else 1), AUDIO_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return _uri("audio/mpeg", path.read_bytes())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
