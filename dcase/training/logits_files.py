"""Logits of clips in files that others have written: by file name, or in the order of a split list.

    FILE.npz        ``filename`` (n,), ``logits`` (n, scenes), and if possible ``scenes``, the names of the columns;
                    FILE.npz:KEY takes the array KEY in place of ``logits``
    FILE.csv .tsv   the column ``filename`` and one column per scene; a run's predictions.csv is such a file
    FILE.pt         a tensor (n, scenes) with a row for each row of one of the data folder's split lists

A row with a value that is not finite stands for a clip without logits. Where all rows are probabilities, their
logarithms are taken. Columns without names are in the order of the data's scenes.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.data.tau22 import SPLITS, Clips, read_split
from dcase.errors import UserError, one_line

SHOWN = 3  # names in a message
LEAST_PROBABILITY = 1e-8  # in place of 0, whose logarithm is not finite


@dataclass(frozen=True, eq=False)
class ClipLogits:
    """The logits of n clips."""

    filenames: np.ndarray  # (n,) str
    logits: np.ndarray  # (n, scenes) float32

    def of(self, clips: Clips) -> Tensor:
        """Return the logits (clips, scenes) of these clips. Where no name is among ours, the folders in names do not
        count. Raises `UserError` where a clip has none."""
        wanted, ours = _names(clips), self.filenames
        rows = pd.Index(ours).get_indexer(wanted)
        if (rows < 0).all():
            wanted, ours = _without_folders(wanted), _without_folders(ours)
            if len(set(ours)) < len(ours) or len(set(wanted)) < len(wanted):
                raise UserError("names no training clip as the data folder does; without folders, names are not unique")
            rows = pd.Index(ours).get_indexer(wanted)
        missing = (rows < 0) | ~np.isfinite(self.logits).all(1)[rows]
        if missing.any():
            names = ", ".join(clips.name(i) for i in np.flatnonzero(missing)[:SHOWN])
            raise UserError(
                f"has no finite logits for {missing.sum():,} of the {len(clips):,} training clips ({names}"
                f"{', ...' if missing.sum() > SHOWN else ''}): add them, or leave these clips out of the split list"
            )
        return torch.from_numpy(self.logits[rows])


def read_logits(given: str, folder: Path, subset: int = 25, labels: Labels = TAU22_LABELS) -> ClipLogits:
    """Read a file of logits, ``given`` as PATH or PATH:KEY. ``folder``: the data folder, with these ``labels``, whose
    split lists give names to the rows of a .pt file; ``subset``: the one that is trained on, which is looked at first.

    Raises `UserError`, whose message continues "the file", where it cannot be used.
    """
    path, key = split_key(given)
    if not path.is_file():
        raise UserError("does not exist")
    try:
        read = {".npz": _npz, ".pt": _tensor}.get(path.suffix, _table)
        filenames, logits = read(path, key, labels.scenes, folder, subset)
    except (OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot be read ({one_line(error):.300})") from error
    if len(set(filenames)) < len(filenames):
        names, counts = np.unique(filenames, return_counts=True)
        raise UserError(f"has more than one row for {names[counts > 1][0]}")
    return ClipLogits(filenames, _as_logits(logits.astype(np.float32)))


def split_key(given: str) -> tuple[Path, str]:
    """Return the path and the key of PATH:KEY; "" where there is none."""
    path, colon, key = given.rpartition(":")
    return (Path(path), key) if colon and path.endswith(".npz") else (Path(given), "")


def _npz(path: Path, key: str, ours: Sequence[str], *_) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:  # object arrays could run code
        tables = [name for name in arrays.files if arrays[name].ndim == 2]
        key = key or "logits"
        if "filename" not in arrays.files:
            raise ValueError(f"it has no array filename; it has {', '.join(arrays.files)}")
        if key not in tables:
            named = ", ".join(f"{path.name}:{name}" for name in tables) or "none"
            raise ValueError(f"it has no array {key} (clips, scenes); give one that it has: {named}")
        filenames, logits = arrays["filename"], arrays[key]
        scenes = arrays["scenes"].tolist() if "scenes" in arrays.files else list(ours)
    if filenames.dtype.kind == "S":
        filenames = np.char.decode(filenames)
    if filenames.ndim != 1 or len(filenames) != len(logits):
        raise ValueError(f"filename has {len(filenames)} rows, and {key} has {len(logits)}")
    if logits.shape[1] != len(scenes) or len(scenes) != len(ours):
        raise ValueError(f"{key} has {logits.shape[1]} columns, scenes has {len(scenes)}: there are {len(ours)} scenes")
    table = pd.DataFrame(logits, columns=[name.decode() if isinstance(name, bytes) else name for name in scenes])
    return filenames.astype(str), _by_scene(table, ours)


def _table(path: Path, key: str, ours: Sequence[str], *_) -> tuple[np.ndarray, np.ndarray]:
    separator = "\t" if "\t" in path.read_text().partition("\n")[0] else ","
    table = pd.read_csv(path, sep=separator, dtype={"filename": str})
    if "filename" not in table:
        raise ValueError(f"it has no column filename; it has {', '.join(map(str, table.columns[:SHOWN]))}, ...")
    if table["filename"].isna().any():
        raise ValueError(f"line {int(table['filename'].isna().idxmax()) + 2} has no filename")
    return table["filename"].to_numpy(str), _by_scene(table, ours)


def _tensor(path: Path, key: str, ours: Sequence[str], folder: Path, subset: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        logits = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch raise anything
        raise ValueError(f"it is damaged, no file of torch.save, or could run code: {one_line(error)[:80]}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError("it holds no tensor (clips, scenes)")
    if logits.shape[1] != len(ours):
        raise ValueError(f"it has {logits.shape[1]} columns, and there are {len(ours)} scenes")
    found, rows = {}, {}
    own = f"split{subset}"
    for split in (own, *(name for name in SPLITS if name != own)):
        if (file := folder / "split_setup" / f"{split}.csv").is_file():
            names = read_split(file)["filename"].to_numpy(str)
            rows[split] = len(names)
            if len(names) == len(logits):
                found[split] = names
    if not found:
        lists = ", ".join(f"{split}.csv {n:,}" for split, n in rows.items())
        raise ValueError(f"it has {len(logits):,} rows without names, and no split list has so many ({lists})")
    first, *others = found.values()
    if any(not np.array_equal(first, names) for names in others):
        raise ValueError(f"its rows have no names, and {' and '.join(found)} have as many: give an .npz with filename")
    return first, logits.detach().float().numpy()


def _by_scene(table: pd.DataFrame, ours: Sequence[str]) -> np.ndarray:
    """Return the columns of a table (n, scenes) in the order of our scenes."""
    if absent := [scene for scene in ours if scene not in table]:
        raise ValueError(f"it has no column {absent[0]}: a scene is one of {', '.join(ours)}")
    if len(table[list(ours)].columns) > len(ours):
        raise ValueError("a scene has two columns")
    return table[list(ours)].to_numpy(np.float32)


def _as_logits(values: np.ndarray) -> np.ndarray:
    """Return logits: the values, or their logarithms where all finite rows are probabilities."""
    rows = values[np.isfinite(values).all(1)]
    if len(rows) and (rows >= 0).all() and (np.abs(rows.sum(1) - 1) < 1e-2).all():
        return np.log(np.maximum(values, LEAST_PROBABILITY))
    return values


def _names(clips: Clips) -> np.ndarray:
    return np.char.decode(clips.filenames)


def _without_folders(names: np.ndarray) -> np.ndarray:
    return np.array([name.rpartition("/")[2] for name in names.tolist()])
