"""Clips with their sound, a batch at a time: from a pack, or from the WAV files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dcase.data.pack import Pack
from dcase.data.sound import CHECK, read_wav
from dcase.data.tau22 import Clips
from dcase.errors import UserError


class Batch(NamedTuple):
    """A batch of b clips. An item of `TAU22` is one clip, without the dimension b and with ``waveform`` as float32."""

    waveform: torch.Tensor  # (b, 1, samples): float32 with full scale 1, or int16 from a pack
    scale: torch.Tensor  # (b,), float32: factor of the waveform
    sample_rate: int  # of the waveform, Hz
    length: torch.Tensor  # (b,) samples of each waveform; the rest of a shorter one is zeros
    scene: torch.Tensor  # (b,), in the labels' scenes
    device: torch.Tensor  # (b,), in their devices
    index: torch.Tensor  # (b,), row in the data set's Clips


@dataclass(frozen=True)
class Sound:
    """Where the sound of clips comes from."""

    sample_rate: int  # Hz, of the waveforms
    max_samples: int | None = None  # clips of any length are accepted, and cut to this one; None: one length
    pack: Pack | None = None  # None: the WAV files


class TAU22(Dataset):
    """Clips with their sound: a batch for a list of indices (``__getitems__``, which torch's loader calls).

    Raises `UserError` for a clip that is not as long as the first one, or as those of the data set ``like``, unless
    ``sound.max_samples`` is given.
    """

    def __init__(self, clips: Clips, sound: Sound, like: "TAU22 | None" = None):
        if not len(clips):
            raise UserError(f"no clip of {clips.folder} is left to read: check --subset and the split lists")
        self.clips, self.sound = clips, sound
        self.rows = sound.pack.rows(clips.filenames) if sound.pack else None
        if like is not None:
            self.n_samples, self.measured = like.n_samples, like.measured
        else:
            self.n_samples, self.measured = self._length_of_first(), clips.name(0)
        if sound.pack:
            self._refuse_other_lengths(np.arange(len(clips)), sound.pack.length[self.rows])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        waveform = batch.waveform[0].float() * batch.scale[0]
        scene, device, index, length = (int(field) for field in (batch.scene, batch.device, batch.index, batch.length))
        return Batch(waveform, torch.tensor(1.0), batch.sample_rate, length, scene, device, index)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = np.asarray(indices, np.int64)
        waveform, length, scale = self._packed(index) if self.sound.pack else self._from_files(index)
        scene, device = (torch.from_numpy(column[index]) for column in (self.clips.scene, self.clips.device))
        return Batch(waveform, scale, self.sound.sample_rate, length, scene, device, torch.from_numpy(index))

    def _packed(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return waveforms (b, 1, samples) as they are in the pack, lengths (b,) and scales (b,)."""
        pack, rows = self.sound.pack, self.rows[index]
        length = self._cut(pack.length[rows])
        waveform = torch.empty(len(rows), 1, int(length.max()), dtype=torch.int16)
        places = waveform.numpy()
        for place, row, n in zip(places, rows.tolist(), length.tolist(), strict=True):
            pack.read(row, place[0, :n])
            place[0, n:] = 0
        return waveform, torch.from_numpy(length), torch.from_numpy(pack.scale[rows])

    def _from_files(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        waveforms = [
            read_wav(self.clips.path(i), self.sound.sample_rate)[:, : self.sound.max_samples] for i in index.tolist()
        ]
        length = np.array([waveform.shape[-1] for waveform in waveforms])
        self._refuse_other_lengths(index, length)
        waveform = torch.zeros(len(waveforms), 1, int(length.max()))
        for place, read, n in zip(waveform, waveforms, length.tolist(), strict=True):
            place[:, :n] = read
        return waveform, torch.from_numpy(length), torch.ones(len(waveforms))

    def _length_of_first(self) -> int:
        if self.sound.pack:
            return int(self._cut(self.sound.pack.length[self.rows[:1]])[0])
        return read_wav(self.clips.path(0), self.sound.sample_rate)[:, : self.sound.max_samples].shape[-1]

    def _cut(self, length: np.ndarray) -> np.ndarray:
        return length if self.sound.max_samples is None else np.minimum(length, self.sound.max_samples)

    def _refuse_other_lengths(self, index: np.ndarray, length: np.ndarray) -> None:
        other = length != self.n_samples
        if self.sound.max_samples is None and other.any():
            first = int(other.argmax())
            raise UserError(
                f"{self.clips.path(index[first])} has {length[first]} samples at {self.sound.sample_rate} Hz where "
                f"{self.measured} has {self.n_samples}: cut the clips to one length, train "
                f"with --target_length, which pads or crops every one, or --batch_lengths, or {CHECK}"
            )
