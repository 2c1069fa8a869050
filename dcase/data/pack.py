"""One file of sound in place of thousands: the folder ``pack/`` that ``python -m dcase.prepare --pack`` writes.

    manifest.json      version, rates, checksums, and which the other two files are; replaced last, in one step
    samples-ID.i16     every clip at the model's rate as int16, one behind the other
    index-ID.npz       an array per column, a row per clip, sorted by filename
    journal-ID.jsonl   while packing only: the blocks that are whole, so that a killed run goes on behind them

A sample is its int16 times its clip's scale, the clip's peak / 32767. So it is off by at most half a step and
float32's rounding, less than peak / 65000: a clip keeps 16 bits however quiet it is.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dcase.errors import UserError, one_line
from dcase.files import replace_file
from dcase.progress import progress

VERSION = 1  # of these files
AGAIN = "make it again with `python -m dcase.prepare --pack`, or read the WAV files with --read_from wav"
_COLUMNS = {"filename": np.bytes_, "start": np.int64, "length": np.int64, "scale": np.float32,
            "source_size": np.int64, "source_mtime_ns": np.int64}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Of a pack's clips, Hz: what the recordings are read at, and what they are resampled to."""

    orig_sample_rate: int
    sample_rate: int


@dataclass(frozen=True)
class Block:
    """Some clips one behind the other, and what is known of each: what a process packs at a time."""

    start: int  # in the file, bytes
    filename: list[str]
    length: list[int]  # samples
    scale: list[float]
    source_size: list[int]  # of the WAV file, bytes
    source_mtime_ns: list[int]
    sha256: str  # of the block's int16 samples

    @property
    def n_bytes(self) -> int:
        return 2 * sum(self.length)

    def summary(self) -> dict:
        return {"start": self.start, "n_bytes": self.n_bytes, "sha256": self.sha256}


def quantise(waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Waveforms (clips, samples), float32, as int16 and each clip's scale (clips,), float32."""
    peak = np.abs(waveform).max(1, initial=0)
    scale = np.where(peak > 0, peak / np.float32(32767), np.float32(1)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)  # a peak among the denormals
    steps = np.rint(waveform / scale[:, None])
    return np.clip(steps, -32767, 32767).astype(np.int16), scale


# Reading


class Pack:
    """A finished pack, opened for reading. Raises `UserError` where it is damaged or of another version.

    Samples are read with ``preadv`` rather than through a memory map. With the file in the page cache one is as fast
    as the other, but a map counts every page ever touched as the process's memory, and a file that is cut short or
    cannot be read kills a process that maps it (SIGBUS) where a read can say what is wrong.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.rates = Rates(manifest["orig_sample_rate"], manifest["sample_rate"])
        self.path = self.folder / f"samples-{manifest['id']}.i16"
        self._blocks = manifest["blocks"]
        index_path = self.folder / f"index-{manifest['id']}.npz"
        try:
            content = index_path.read_bytes()
            n_bytes = self.path.stat().st_size
        except OSError as error:
            raise UserError(f"{self.folder} is not whole ({one_line(error)}): {AGAIN}") from error
        if hashlib.sha256(content).hexdigest() != manifest["index_sha256"]:
            raise UserError(f"{index_path} is damaged: {AGAIN}")
        if n_bytes != manifest["n_bytes"]:
            raise UserError(f"{self.path} has {n_bytes} bytes where {manifest['n_bytes']} were written: {AGAIN}")
        with np.load(index_path, allow_pickle=False) as index:
            self.filename, self.start, self.length, self.scale, self._size, self._mtime_ns = (
                index[column] for column in _COLUMNS
            )
        self._file = None

    def __len__(self) -> int:
        return len(self.filename)

    def __getstate__(self) -> dict:  # every process opens the file for itself
        return {**vars(self), "_file": None, "_blocks": []}

    def rows(self, filenames: np.ndarray) -> np.ndarray:
        """(n,) int64: where these clips (n,) bytes are in the pack. Raises `UserError` where one is not."""
        rows = np.searchsorted(self.filename, filenames)
        found = self.filename[np.minimum(rows, len(self) - 1)] == filenames
        if not found.all():
            n, first = int((~found).sum()), filenames[~found][0].decode()
            raise UserError(
                f"{self.folder} lacks {n} of these {len(filenames)} clips ({first}{', ...' if n > 1 else ''}): {AGAIN}"
            )
        return rows

    def read(self, row: int, out: np.ndarray) -> None:
        """Read the first ``len(out)`` samples of a clip into ``out``, int16. Raises `UserError` where it cannot be."""
        place, start = memoryview(out).cast("B"), 2 * int(self.start[row])
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)
            done = os.preadv(self._file.fileno(), [place], start)  # no place in the file that processes would share
            while done < len(place):
                n = os.preadv(self._file.fileno(), [place[done:]], start + done)
                if not n:
                    raise OSError("it ends early")
                done += n
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}): {AGAIN}") from error

    def changed_sources(self, folder: Path, rows: np.ndarray) -> list[str]:
        """Those of the clips whose WAV file in the data folder is missing, or is of another size or time.

        Where the data folder holds no recordings at all, there is nothing that could have changed.
        """
        names = [name.decode() for name in self.filename[rows].tolist()]
        known = zip(self._size[rows].tolist(), self._mtime_ns[rows].tolist(), strict=True)
        prefix = f"{folder}/"  # pathlib would take longer than the file system
        found = [stamp(prefix + name) for name in names]
        if not any(found):
            return []
        return [name for name, now, before in zip(names, found, known, strict=True) if now != before]

    def damaged_blocks(self) -> list[int]:
        """Numbers of the blocks whose checksum is not what it was when they were written; with a progress bar."""
        with open(self.path, "rb") as file:
            return [
                i
                for i, block in enumerate(progress(self._blocks, desc="checking the pack", unit=" blocks"))
                if checksum(file, block["start"], block["n_bytes"]) != block["sha256"]
            ]


def checksum(file: BinaryIO, start: int, n_bytes: int) -> str:
    file.seek(start)
    return hashlib.sha256(file.read(n_bytes)).hexdigest()


def exists(folder: Path) -> bool:
    return (Path(folder) / "manifest.json").is_file()


def read_manifest(folder: Path) -> dict:
    """manifest.json. Raises `UserError` where it is of another version, or damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            raise UserError(f"{path} is of version {manifest['version']}, this code reads {VERSION}: {AGAIN}")
        content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
        if manifest["manifest_sha256"] != _sha256_of(content):
            raise ValueError("it is damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): {AGAIN}") from error
    return manifest


def _sha256_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamp(path: Path | str) -> tuple[int, int] | None:
    """(bytes, time of change in ns) of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


# Writing


class Packing:
    """A pack being made: packing processes write blocks at places of their own, and this notes those that are written;
    what a killed run has noted is kept."""

    def __init__(self, folder: Path, rates: Rates):
        """Go on with what an interrupted run left in ``folder``, where that was of the same rates and is undamaged."""
        self.folder, self.rates = folder, rates
        folder.mkdir(parents=True, exist_ok=True)
        journals = sorted(id for kind, id in map(_kind_and_id, folder.iterdir()) if kind == "journal")
        self.id = journals[-1] if journals else secrets.token_hex(4)
        if exists(folder) and self.id == read_id(folder):  # killed between the manifest and the end
            self.id = secrets.token_hex(4)
        remove_remains(folder, self.id)
        self.blocks: list[dict] = []  # start, bytes and checksum of each
        self._packed: dict[str, tuple[int, int]] = {}  # filename -> stamp of its WAV file, of what was left
        replace_file(self.journal, self._copy_journal)
        ends = [block["start"] + block["n_bytes"] for block in self.blocks]
        self.n_bytes = max(ends, default=0)  # new blocks come behind it
        self._file = open(self.samples, "ab")
        self._file.truncate(self.n_bytes)
        self._log = open(self.journal, "ab", buffering=0)

    @property
    def samples(self) -> Path:
        return self.folder / f"samples-{self.id}.i16"

    @property
    def journal(self) -> Path:
        return self.folder / f"journal-{self.id}.jsonl"

    def _copy_journal(self, to: Path) -> None:
        """The journal of an interrupted run, as far as its blocks are whole."""
        with open(to, "w") as copy:
            copy.write(json.dumps({"version": VERSION, **vars(self.rates)}) + "\n")
            for block in progress(self._whole_blocks(), desc="checking what is packed", unit=" blocks", leave=False):
                copy.write(json.dumps(vars(block)) + "\n")
                self.blocks.append(block.summary())
                stamps = zip(block.source_size, block.source_mtime_ns, strict=True)
                self._packed.update(zip(block.filename, stamps, strict=True))

    def _whole_blocks(self) -> Iterator[Block]:
        """The journal's blocks, up to the first whose samples are not all there, unharmed."""
        try:
            with open(self.samples, "rb") as file:
                for block in self._read_journal():
                    if checksum(file, block.start, block.n_bytes) != block.sha256:
                        return
                    yield block
        except (OSError, ValueError, TypeError):  # no journal, of other rates, or a line that was cut
            return

    def _read_journal(self) -> Iterator[Block]:
        with open(self.journal) as lines:
            if json.loads(next(lines, "")) != {"version": VERSION, **vars(self.rates)}:
                raise ValueError("it is of other rates")
            for line in lines:
                yield Block(**json.loads(line))

    def todo(self, folder: Path, filenames: Sequence[str]) -> list[str]:
        """Those of the clips that an interrupted run has not packed, or whose WAV files have changed since."""
        prefix, packed, self._packed = f"{folder}/", self._packed, {}
        return [name for name in filenames if name not in packed or packed[name] != stamp(prefix + name)]

    def add(self, block: Block) -> None:
        """Note a block that is written. Raises `UserError` where the disk does not take the note."""
        line = (json.dumps(vars(block)) + "\n").encode()
        try:
            if self._log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise not_written(self.journal, error) from error
        self.blocks.append(block.summary())

    def close(self) -> None:
        self._file.close()
        self._log.close()

    def finish(self, filenames: Sequence[str]) -> None:
        """Make of it the folder's pack, with the clips ``filenames``; the one that was there before is removed."""
        os.fsync(self._file.fileno())
        self.close()
        n_bytes = self.samples.stat().st_size
        if n_bytes != max(block["start"] + block["n_bytes"] for block in self.blocks):
            raise UserError(f"{self.samples} is not whole after writing (a failing disk?): run the same command again")
        index_path = self.folder / f"index-{self.id}.npz"
        columns = self._index(filenames)
        replace_file(index_path, lambda beside: _save_arrays(beside, columns))
        manifest = {
            "version": VERSION,
            "id": self.id,
            **vars(self.rates),
            "n_clips": len(filenames),
            "n_bytes": n_bytes,
            "source_bytes": int(columns["source_size"].sum()),
            "index_sha256": hashlib.sha256(index_path.read_bytes()).hexdigest(),
            "blocks": self.blocks,
        }
        text = json.dumps({**manifest, "manifest_sha256": _sha256_of(manifest)}, indent=1)
        replace_file(self.folder / "manifest.json", lambda beside: beside.write_text(text))
        self.journal.unlink()
        remove_remains(self.folder)

    def _index(self, filenames: Sequence[str]) -> dict[str, np.ndarray]:
        """The columns, sorted by filename. Of a clip packed twice (its WAV file had changed) the later counts."""
        names = np.array(sorted(name.encode() for name in filenames))
        columns = {name: np.zeros(len(names), dtype) for name, dtype in _COLUMNS.items() if name != "filename"}
        for block in self._read_journal():
            given = np.array([name.encode() for name in block.filename])
            rows = np.minimum(np.searchsorted(names, given), len(names) - 1)
            wanted = names[rows] == given
            start = block.start // 2 + np.cumsum([0, *block.length[:-1]])
            known = {"start": start, **{name: getattr(block, name) for name in columns if name != "start"}}
            for name, values in known.items():
                columns[name][rows[wanted]] = np.asarray(values)[wanted]
        return {"filename": names, **columns}


def remove_remains(folder: Path, in_the_making: str | None = None) -> None:
    """Remove a pack's files of neither the pack that is read nor the one ``in_the_making``, an id."""
    kept = {("journal", in_the_making), ("samples", in_the_making)}
    kept |= {(kind, read_id(folder)) for kind in ("samples", "index")}
    for path in folder.iterdir():
        if _kind_and_id(path)[0] and _kind_and_id(path) not in kept:
            path.unlink()


def _kind_and_id(path: Path) -> tuple[str, str]:
    """Of a pack's file, also of one half written beside its place: ("samples", ID); ("", "") of any other file."""
    found = re.fullmatch(r"(\.?)(samples|index|journal)-([0-9a-f]{8})\.(?:i16|npz|jsonl)(?:\.\d+)?", path.name)
    return (found[1] + found[2], found[3]) if found else ("", "")


def read_id(folder: Path) -> str | None:
    """Id of the folder's finished pack; None where there is none that this code could read."""
    try:
        return read_manifest(folder)["id"]
    except UserError:
        return None


def _save_arrays(path: Path, columns: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, **columns)


def not_written(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror}): make room; what is packed is kept, and the same command goes on "
        "behind it"
    )


def refuse_full_disk(folder: Path, n_bytes: int) -> None:
    """Raise `UserError` where the disk has less room than ``n_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"{folder} needs {n_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: make room, or give "
            "another folder as --pack_dir"
        )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raise `UserError` where another process packs into the folder; its end, however it comes, lets go."""
    try:
        import fcntl
    except ImportError:  # Windows: two at once are not noticed there
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {folder}: wait for its end, or stop it") from error
        except OSError:  # a file system without locks: two at once are not noticed there
            pass
        yield
