"""One file of sound in place of thousands: the folder ``pack/`` that ``python -m dcase.prepare --pack`` writes.

    manifest.json      version, rates, checksums, and the ID of the other two files; replaced last, in one step
    samples-ID.i16     every clip at the model's rate as int16, one behind the other
    index-ID.npz       an array per column, a row per clip, sorted by filename
    journal-ID.jsonl   only while packing (`packing.py`): a line per block of clips that is written

A sample is its int16 times its clip's scale, which is the clip's peak / 32767. The error is at most half a step plus
float32's rounding, less than peak / 65000: a clip keeps 16 bits however quiet it is.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from dcase.data.sound import MOST_HZ
from dcase.errors import UserError, one_line
from dcase.files import regular
from dcase.progress import progress
from dcase.schema import Count, Name, Schema, read_json

VERSION = 1  # of these files
COMMAND = "python -m dcase.prepare --pack"
AGAIN = f"make it again with `{COMMAND}`, or read the WAV files with --read_from wav"
COLUMNS = ("filename", "start", "length", "scale", "source_size", "source_mtime_ns")  # of the index


@dataclass(frozen=True)
class Rates:
    """Rates of a pack's clips, Hz."""

    orig_sample_rate: int  # of the recordings, as they were read
    sample_rate: int  # of the pack


class _Block(Schema):
    start: Count  # byte
    n_bytes: Count
    sha256: Name


class Manifest(Schema):
    version: Count
    manifest_sha256: Name
    id: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    orig_sample_rate: Annotated[int, Field(ge=1, le=MOST_HZ)]
    sample_rate: Annotated[int, Field(ge=1, le=MOST_HZ)]
    n_bytes: Count
    index_sha256: Name
    blocks: list[_Block]


class Pack:
    """A finished pack, opened for reading. Raises `UserError` where it is damaged or of another version; ``command`` is
    the one that makes it again.

    Samples are read with ``preadv`` rather than through a memory map. With the file in the page cache both are equally
    fast. But a map counts every page ever touched as the process's memory, and where the file is cut short or cannot
    be read, a map kills the process (SIGBUS), while a read can say what is wrong.
    """

    def __init__(self, folder: Path, command: str = COMMAND):
        self.folder, self.again = Path(folder), AGAIN.replace(COMMAND, command)
        manifest = read_manifest(self.folder)
        self.rates = Rates(manifest["orig_sample_rate"], manifest["sample_rate"])
        self.path = self.folder / f"samples-{manifest['id']}.i16"
        self._blocks = manifest["blocks"]
        index_path = self.folder / f"index-{manifest['id']}.npz"
        try:
            content = regular(index_path).read_bytes()
            n_bytes = self.path.stat().st_size
        except OSError as error:
            raise UserError(f"{self.folder} is not whole ({one_line(error)}): {self.again}") from error
        if hashlib.sha256(content).hexdigest() != manifest["index_sha256"]:
            raise UserError(f"{index_path} is damaged: {self.again}")
        if n_bytes != manifest["n_bytes"]:
            raise UserError(f"{self.path} has {n_bytes} bytes where {manifest['n_bytes']} were written: {self.again}")
        try:
            with np.load(index_path, allow_pickle=False) as index:
                columns = [index[column] for column in COLUMNS]
            kinds = "".join(column.dtype.kind for column in columns)
            if kinds != "Siifii" or {column.shape for column in columns} != {columns[0].shape[:1]}:
                raise ValueError("its columns are not of one length, or of other types")
            _, start, length, scale, *_ = columns
            inside = (start >= 0) & (length > 0) & (start <= n_bytes // 2) & (length <= n_bytes // 2 - start)
            if not (inside & np.isfinite(scale)).all() or not len(start):
                raise ValueError("a clip lies outside the samples")
        except (OSError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
            raise UserError(f"{index_path} cannot be used ({one_line(error)}): {self.again}") from error
        self.filename, self.start, self.length, self.scale, self._size, self._mtime_ns = columns
        self._file = None

    def __len__(self) -> int:
        return len(self.filename)

    def __getstate__(self) -> dict:  # every process opens the file for itself
        return {**vars(self), "_file": None, "_blocks": []}

    def rows(self, filenames: np.ndarray) -> np.ndarray:
        """Return the rows (n,), int64, of clips (n,), bytes. Raises `UserError` where the pack lacks one."""
        rows = np.searchsorted(self.filename, filenames)
        found = self.filename[np.minimum(rows, len(self) - 1)] == filenames
        if not found.all():
            n, first = int((~found).sum()), filenames[~found][0].decode()
            shown = f"{first}{', ...' if n > 1 else ''}"
            raise UserError(f"{self.folder} lacks {n} of these {len(filenames)} clips ({shown}): {self.again}")
        return rows

    def read(self, row: int, out: np.ndarray) -> None:
        """Read the first ``len(out)`` samples of a clip into ``out``, int16. Raises `UserError` where that fails."""
        content, start, done = memoryview(out).cast("B"), 2 * int(self.start[row]), 0
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)
            while done < len(content):  # preadv: processes that share the file do not share a position in it
                n = os.preadv(self._file.fileno(), [content[done:]], start + done)
                if not n:
                    raise OSError("it ends early")
                done += n
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}): {self.again}") from error

    def changed_sources(self, folder: Path, rows: np.ndarray) -> list[str]:
        """Return the names of these clips whose WAV file in the data folder is missing or has another size or time.

        Where the data folder holds no recordings at all, nothing can have changed.
        """
        names = [name.decode() for name in self.filename[rows].tolist()]
        known = zip(self._size[rows].tolist(), self._mtime_ns[rows].tolist(), strict=True)
        prefix = f"{folder}/"  # pathlib would take longer than the file system
        found = [stamp(prefix + name) for name in names]
        if not any(found):
            return []
        return [name for name, now, before in zip(names, found, known, strict=True) if now != before]

    def check_rates(self, wanted: Rates) -> None:
        """Raise `UserError` where the pack has other rates."""
        if self.rates != wanted:
            raise UserError(
                f"{self.folder} was resampled from {self.rates.orig_sample_rate} to {self.rates.sample_rate} Hz, and "
                f"now recordings are read at {wanted.orig_sample_rate} Hz (--orig_sample_rate, or most files) and "
                f"--sample_rate is {wanted.sample_rate}: {self.again}"
            )

    def check_sources(self, folder: Path, filenames: np.ndarray) -> None:
        """Raise `UserError` where the pack lacks one of the clips (n,), bytes, or a WAV file has changed since."""
        changed = self.changed_sources(folder, self.rows(filenames))
        if changed:
            shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            raise UserError(
                f"{len(changed)} of these {len(filenames)} recordings are missing or have changed since {self.folder} "
                f"was made ({shown}): {self.again}"
            )

    def damaged_blocks(self) -> int:
        """Return the number of blocks whose checksum is wrong, with a progress bar."""
        blocks = progress(self._blocks, desc="checking the pack", unit=" blocks")
        damaged = 0
        with open(self.path, "rb") as file:
            for block in blocks:
                file.seek(block["start"])
                damaged += hashlib.sha256(file.read(block["n_bytes"])).hexdigest() != block["sha256"]
        return damaged


def exists(folder: Path) -> bool:
    return (Path(folder) / "manifest.json").is_file()


def read_manifest(folder: Path) -> dict:
    """Read manifest.json. Raises `UserError` where it is of another version, or damaged."""
    path = folder / "manifest.json"
    manifest = read_json(Manifest, path, AGAIN)
    if manifest["version"] != VERSION:
        raise UserError(f"{path} is of version {manifest['version']}, this code reads {VERSION}: {AGAIN}")
    if manifest.pop("manifest_sha256") != checksum(manifest):
        raise UserError(f"{path} cannot be read (it is damaged): {AGAIN}")
    return manifest


def checksum(manifest: dict) -> str:
    """Return the checksum of a manifest's other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def stamp(path: Path | str) -> tuple[int, int] | None:
    """Return (size in bytes, time of change in ns) of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
