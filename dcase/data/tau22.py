"""TAU Urban Acoustic Scenes 2022 Mobile (TAU22, zenodo.org/records/6337421) and folders laid out like it.

A data folder holds ``audio/*.wav``, ``meta.csv`` (filename, scene_label, identifier, source_label),
``split_setup/split{5,10,25,50,100}.csv`` and ``split_setup/test.csv`` (filename, scene_label), all tab-separated.
``meta_clean.csv``, written by ``python -m dcase.prepare``, takes the place of ``meta.csv`` when it is there.

Scenes and devices of one's own are named in ``labels.json``, or, without that file, by meta.csv (`_read_meta`).

Glossary: *scene* (``scene_label``) is the class, an index into `Labels.scenes`; *device* (``source_label``) is the
recording device, an index into `Labels.devices`; *location* (``identifier``) is the place of recording, as
"lisbon-1000". Clips of one location sound alike, so no location may be on both sides of a split.
"""

import csv
import hashlib
import http.client
import io
import json
import os
import random
import re
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from dcase.data.labels import DEVICES, LABELS_JSON, SCENES, TAU22_LABELS, Labels
from dcase.data.sound import MOST_HZ
from dcase.errors import UserError, check_range, command, one_line
from dcase.files import regular, replace_file

TEST_CLIPS = 29_680  # in TAU22's test.csv
RATE = 44_100  # Hz, of TAU22's recordings
SUBSETS = (5, 10, 25, 50, 100)  # percent of TAU22's training clips
SPLITS = (*(f"split{subset}" for subset in SUBSETS), "test")

_SPLIT_COLUMNS = ("filename", "scene_label")
_META_COLUMNS = (*_SPLIT_COLUMNS, "identifier", "source_label")
_TAU22_NAMES = (("scene_label", SCENES), ("source_label", DEVICES))
MOST_COLUMNS = 1000  # of a list; more are a damaged file
RELEASE = "https://github.com/CPJKU/dcase2024_task1_baseline/releases/download/files"  # of the split lists
_ZIP = "TAU-urban-acoustic-scenes-2022-mobile-development"
_TEST_SHA256 = "efe84eb90ebe11931f93f0877f8b3405d7684652cd3d2e2784e95ec39d8888a8"  # of TAU22's test.csv with LF ends
# Absolute, with a drive, with a backslash, through "..", or with a control character.
_LEAVES_FOLDER = r"^/|^[A-Za-z]:|\\|(?:^|/)\.\.(?:/|$)|[\x00-\x1f]"


def leaves_folder(filename: str) -> bool:
    """Whether a file name in a list points outside the list's folder."""
    return re.search(_LEAVES_FOLDER, filename) is not None


@dataclass(frozen=True, eq=False)
class Clips:
    """n clips of a data folder, as arrays: Python strings would be copied into the memory of every worker."""

    folder: Path
    filenames: np.ndarray  # (n,) bytes, relative to the folder
    scene: np.ndarray  # (n,) int64, in labels.scenes
    device: np.ndarray  # (n,) int64, in labels.devices
    location: np.ndarray  # (n,) bytes, meta.csv's identifier
    labels: Labels = TAU22_LABELS  # of the folder

    def __len__(self) -> int:
        return len(self.filenames)

    def select(self, rows) -> "Clips":
        """Return the clips where the mask ``rows`` is true, or those with the indices ``rows``, in that order."""
        rows = np.asarray(rows)
        rows = rows if rows.dtype == bool else rows.astype(np.int64)  # an empty list would be float
        return replace(self, **{name: getattr(self, name)[rows] for name in "filenames scene device location".split()})

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when a clip is added, lost or moved."""
        return hashlib.sha256(b"\n".join(self.filenames.tolist())).hexdigest()[:16]

    def of_device(self, device_id: str) -> "Clips":
        """Return the clips recorded with ``device_id``, one of the folder's devices."""
        return self.select(self.device == self.labels.devices.index(device_id))

    def name(self, i: int) -> str:
        """Return the file name of clip ``i`` as in the csv: "audio/airport-lisbon-1000-40000-0-a.wav"."""
        return self.filenames[i].decode()

    def path(self, i: int) -> Path:
        return self.folder / self.name(i)


@dataclass(frozen=True)
class DataConfig:
    """Where the recordings are."""

    dataset_dir: str | None = None
    """TAU22 folder; without it TAU22_DIR, else the folder that the checkpoint's run was given, else SynthTAU, a small
    synthetic stand-in."""
    orig_sample_rate: int | None = None
    """Rate (Hz) at which recordings are read; a file of another rate is resampled to it. None: the rate that most files
    have, 44100 in TAU22."""
    read_from: Literal["auto", "pack", "wav"] = "auto"
    """Read the pack that `python -m dcase.prepare --pack` made, or the WAV files; auto: the pack if there is one."""
    pack_dir: str | None = None
    """Folder of the pack; without it pack/ in the data folder."""

    def pack_folder(self, folder: Path) -> Path:
        return Path(self.pack_dir).expanduser() if self.pack_dir else Path(folder) / "pack"

    def __post_init__(self):
        check_range(self, "orig_sample_rate", least=1, most=MOST_HZ)


@dataclass(frozen=True)
class SplitConfig:
    """Which clips the model is trained on, and which ones choose the best epoch."""

    subset: int = 25
    """Part of TAU22's training clips to train on: 5, 10, 25, 50 or 100 (percent)."""
    val_fraction: float = 0.1
    """Part of the training clips to hold out for validation, by recording location (0 to 1; 0: train on all clips)."""
    val_split: Literal["train", "test"] = "train"
    """Where validation clips come from; test chooses the model on the test split, so its score is optimistic."""

    def __post_init__(self):
        if self.subset not in SUBSETS:
            raise UserError(f"--subset is 5, 10, 25, 50 or 100 (percent); got {self.subset}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction is at least 0 and less than 1; got {self.val_fraction}")


# Lists of clips


def load_clips(folder: Path, split: str) -> Clips:
    """Load the clips of ``split`` (one of `SPLITS`) in the list's order; `check_files` looks for their files.

    Prints a line when meta_clean.csv leaves clips out, and one when the list had to be fetched.
    Raises `UserError`, naming file and line, for any fault of the folder or its lists.
    """
    return load_splits(folder, split)[0]


def load_splits(folder: Path, *splits: str) -> list[Clips]:
    """Load the clips of each split as `load_clips` does; meta.csv, the longest list, is read only once."""
    folder = Path(folder)
    check_folder(folder)
    path = folder / ("meta_clean.csv" if "meta_clean.csv" in _listing(folder) else "meta.csv")
    meta, labels = _read_meta(path)
    lists = {split: _read_or_fetch_split(folder, split, labels) for split in splits}
    place = pd.Index(meta["filename"])
    loaded = []
    for split, rows in lists.items():
        _refuse_unknown(folder / "split_setup" / f"{split}.csv", rows, labels)
        found = _meta_of(path, meta, place.get_indexer(rows["filename"]), rows, split)
        loaded.append(
            Clips(
                folder=folder,
                filenames=np.array([name.encode() for name in found["filename"]]),
                scene=pd.Index(labels.scenes).get_indexer(found["scene_label"]).astype(np.int64),
                device=pd.Index(labels.devices).get_indexer(found["source_label"]).astype(np.int64),
                location=np.array([name.encode() for name in found["identifier"]]),
                labels=labels,
            )
        )
    return loaded


def untrained_scenes(training: Clips, test: Clips) -> str:
    """Return a warning where test clips are of scenes that no training clip is of, else ""."""
    scenes = np.setdiff1d(test.scene, training.scene)
    if not len(scenes):
        return ""
    n_clips = int(np.isin(test.scene, scenes).sum())
    named = ", ".join(test.labels.scenes[i] for i in scenes)
    return f"no training clip of the scene(s) {named}: the test has {n_clips:,}, which cannot be learnt"


def check_files(clips: Clips) -> None:
    """Raise `UserError` where a clip's file is not in the data folder."""
    missing = missing_files(clips.folder, [name.decode() for name in clips.filenames.tolist()])
    if missing:
        again = command("python", "-m", "dcase.prepare", "--dataset_dir", clips.folder)
        raise UserError(
            f"{len(missing)} of these {len(clips)} clips are not in {clips.folder} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): unpack all 16 parts {_ZIP}.audio.*.zip there, "
            f"or leave the missing clips out with `{again}`"
        )


def is_tau22(folder: Path) -> bool:
    """Whether the folder is TAU22 itself, so that scores compare with published ones, and no stand-in."""
    test_list = Path(folder) / "split_setup" / "test.csv"
    if (Path(folder) / "SYNTHETIC.md").exists() or not test_list.is_file():
        return False
    return hashlib.sha256(_read_bytes(test_list).replace(b"\r\n", b"\n")).hexdigest() == _TEST_SHA256


def check_folder(folder: Path) -> None:
    """Raise `UserError` where the data folder does not exist, cannot be read, or is one level too high."""
    if not os.path.isdir(folder):
        raise UserError(f"data folder {folder} does not exist or is no folder: check --dataset_dir or TAU22_DIR")
    names = _listing(folder)
    if not names & {"meta.csv", "meta_clean.csv"}:
        if (folder / _ZIP / "meta.csv").is_file():
            inner = command("--dataset_dir", folder / _ZIP)
            raise UserError(f"{folder} has no meta.csv, but the folder in it has: {inner}")
        raise UserError(
            f"{folder / 'meta.csv'} is missing: check --dataset_dir, or unpack {_ZIP}.meta.zip into that folder; "
            "`python -m dcase.adopt` makes a data folder of recordings of your own"
        )


def read_meta(path: Path) -> pd.DataFrame:
    """Read and check meta.csv or meta_clean.csv, columns as strings. Raises `UserError` with file and line."""
    return _read_meta(path)[0]


def _read_meta(path: Path) -> tuple[pd.DataFrame, Labels]:
    """Return meta.csv or meta_clean.csv, checked, and the folder's labels: those of labels.json, else of meta.csv."""
    meta, names = _read_list(path, _META_COLUMNS), _listing(path.parent)
    if LABELS_JSON in names:
        labels = _read_labels(path.with_name(LABELS_JSON))
    else:  # of all clips, also those that meta_clean.csv leaves out: an index means the same with it and without
        whole = path.with_name("meta.csv")
        complete = all(set(meta[column]) == set(known) for column, known in _TAU22_NAMES)
        is_part = path != whole and whole.name in names and not complete
        of_all = _read_list(whole, _META_COLUMNS) if is_part else meta
        labels = _labels_in(of_all, path)
    _refuse_unknown(path, meta, labels)
    return meta, labels


def _read_labels(path: Path) -> Labels:
    try:
        plain = json.loads(_read_bytes(path))
        if missing := {"scenes", "devices"} - set(plain):
            raise ValueError(f"it lacks {min(missing)!r}")
        if unknown := set(plain) - set(TAU22_LABELS.plain()):
            raise ValueError(f"{min(unknown)!r} is not one of {', '.join(TAU22_LABELS.plain())}")
        return Labels.from_plain(dict(plain), str(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): docs/data.md shows one") from error


def _labels_in(meta: pd.DataFrame, path: Path) -> Labels:
    """Return the labels of a folder without labels.json from the whole of its meta.csv.

    They are TAU22's where its scenes and devices are TAU22's, or most of both: then another name is a mistake.
    """
    names = [(set(meta[column]), set(known)) for column, known in _TAU22_NAMES]
    if all(len(found & known) > len(found - known) for found, known in names):
        return TAU22_LABELS
    scenes, devices = (sorted(found) for found, _ in names)
    training = [path.parent / "split_setup" / f"{split}.csv" for split in SPLITS if split != "test"]
    heard = [read_split(file)["filename"] for file in training if file.is_file()]
    seen = set(meta["source_label"][meta["filename"].isin(pd.concat(heard))] if heard else devices) or set(devices)
    groups = {"seen": sorted(seen), "unseen": sorted(set(devices) - seen)}
    return Labels.from_plain({"scenes": scenes, "devices": devices, "device_groups": groups}, str(path))


def _refuse_unknown(path: Path, table: pd.DataFrame, labels: Labels) -> None:
    """Raise `UserError` where a list has a scene or a device that is not the folder's."""
    for what, column, names in (("scene", "scene_label", labels.scenes), ("device", "source_label", labels.devices)):
        if column in table:
            known = ", ".join(names).replace("{", "{{").replace("}", "}}")  # `_refuse` formats it
            known = f"not one of {known}; {what}s of your own go into {LABELS_JSON} there (docs/data.md)"
            _refuse(path, table, ~table[column].isin(names), f"unknown {what} {{{column}!r}} ({column}), {known}")


def read_split(path: Path, content: bytes | None = None, labels: Labels | None = None) -> pd.DataFrame:
    """Read and check a split list, or its ``content``, columns as strings, where they are known with the folder's
    ``labels``. Raises `UserError` with file and line."""
    rows = _read_list(path, _SPLIT_COLUMNS, content)
    if labels:
        _refuse_unknown(path, rows, labels)
    return rows


def drawn_names(folder: Path, n: int) -> list[str]:
    """Return the names of ``n`` clips of meta.csv, drawn at random, but always the same ones; `read_meta` would take
    seconds. Names that leave the folder are left out."""
    path = folder / ("meta.csv" if "meta.csv" in _listing(folder) else "meta_clean.csv")
    header, *lines = _read_bytes(path).decode("utf-8-sig", errors="replace").replace("\r", "\n").split("\n")
    column = header.split("\t").index("filename")
    lines = [line for line in lines if line.count("\t") >= column]
    names = [line.split("\t")[column] for line in random.Random(0).sample(lines, min(n, len(lines)))]
    return [name for name in names if not leaves_folder(name)]


def missing_files(folder: Path, filenames: Sequence[str]) -> list[str]:
    """Return those of ``filenames`` that are not in the data folder. Folders are listed; files are not looked up."""
    parts = [name.rpartition("/")[::2] for name in filenames]
    present = {parent: _listing(folder / parent) for parent in {parent for parent, _ in parts}}
    return [name for name, (parent, base) in zip(filenames, parts, strict=True) if base not in present[parent]]


def _meta_of(path: Path, meta: pd.DataFrame, found: np.ndarray, rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of ``meta``, the file ``path``, for a split list's, in its order, less those that meta_clean.csv
    leaves out. ``found``: the place of each row in meta, -1 where it is missing."""
    list_path = path.parent / "split_setup" / f"{split}.csv"
    unknown = pd.Series(found < 0, index=rows.index)
    if path.name == "meta_clean.csv" and unknown.any():
        line = f"{path} leaves out {unknown.sum()} of the {len(rows)} clips of {split} (why: meta_excluded.csv)"
        not_comparable = "The test score is then NOT COMPARABLE with one on the whole test split."
        print(f"WARNING: {line}. {not_comparable}" if split == "test" else line)
        if unknown.all():
            raise UserError(f"{path} leaves out every clip of {split}: run `python -m dcase.prepare` again")
        if "meta.csv" in _listing(path.parent):  # only what meta.csv has can be left out; the rest is a mistake
            unknown &= ~rows["filename"].isin(read_meta(path.with_name("meta.csv"))["filename"])
        else:
            unknown[:] = False
    n_unknown = f"(as {unknown.sum()} of {len(rows)} are)"
    _refuse(list_path, rows, unknown, "{filename!r} is not in meta.csv " + n_unknown + "; are both of one data set?")
    rows, meta = rows[found >= 0], meta.iloc[found[found >= 0]]
    other = pd.Series(rows["scene_label"].to_numpy() != meta["scene_label"].to_numpy(), index=rows.index)
    _refuse(list_path, rows, other, "{filename!r} is {scene_label!r} here but another scene in " + path.name)
    return meta


def _read_or_fetch_split(folder: Path, split: str, labels: Labels) -> pd.DataFrame:
    path = folder / "split_setup" / f"{split}.csv"
    if path.name in _listing(path.parent):
        return read_split(path)
    if labels != TAU22_LABELS:
        there = ", ".join(sorted(_listing(path.parent))) or "nothing"
        raise UserError(f"{path} is missing (there is {there}): give the --subset whose list there is, or write it")
    address = f"{RELEASE}/{split}.csv"
    by_hand = f"put {address} there by hand"
    try:
        with urllib.request.urlopen(address, timeout=20) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{path} is missing and could not be fetched ({one_line(error)}): {by_hand}") from error
    try:
        rows = read_split(path, content)
    except UserError as error:
        raise UserError(f"{path} is missing and what came for it is no split list ({error}): {by_hand}") from error
    replace_file(path, lambda beside: beside.write_bytes(content))
    print(f"{path} was missing: fetched from {address}")
    return rows


def _read_list(path: Path, columns: tuple[str, ...], content: bytes | None = None) -> pd.DataFrame:
    """Read a tab-separated list of clips, with the checks of all lists. Its index plus 2 is the line in the file."""
    table = _parse(path, _read_bytes(path) if content is None else content)
    absent = [column for column in columns if column not in table.columns]
    if absent and any("," in column for column in table.columns):
        raise UserError(f"{path} is comma-separated: TAU22's lists are tab-separated; save it with tabs")
    if absent:
        raise UserError(f"{path} lacks the column {absent[0]!r}: its first line must be {' TAB '.join(columns)}")
    table = table[(table != "").any(axis=1)]  # blank lines, at the end as a rule
    if table.empty:
        raise UserError(f"{path} is empty: it has no clip; get TAU22's own list")
    for column in columns:
        _refuse(path, table, table[column] == "", f"{column} is empty")
    names = table["filename"]
    unusual = ~names.str.fullmatch(r"[\w-]+(?:/[\w-]+)*\.\w+", flags=re.ASCII)  # six times as fast as the next test
    leaves = unusual & names.where(unusual, "").str.contains(_LEAVES_FOLDER, regex=True)
    _refuse(path, table, leaves, "{filename!r} leaves the data folder")
    _refuse(path, table, names.duplicated(), "{filename!r} is there for the second time")
    return table


def _parse(path: Path, content: bytes) -> pd.DataFrame:
    columns = 1 + re.split(rb"[\r\n]", content, maxsplit=1)[0].count(b"\t")
    if columns > MOST_COLUMNS:  # pandas takes minutes for 300,000 of one name
        raise UserError(f"{path} is no list of clips: its first line has {columns:,} columns; get TAU22's own list")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a first row that is longer than the header
            return pd.read_csv(
                io.BytesIO(content),
                sep="\t",
                dtype=str,
                na_filter=False,  # a missing field is "", and "NA" is a string
                quoting=csv.QUOTE_NONE,
                skip_blank_lines=False,  # so that rows count as lines do
                index_col=False,
                encoding="utf-8-sig",
            )
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path} is empty: it has no clip; get TAU22's own list") from error
    except (ValueError, pd.errors.ParserWarning) as error:  # ParserError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is no tab-separated text ({one_line(error)}): get TAU22's own list") from error


def _refuse(path: Path, table: pd.DataFrame, bad: pd.Series, problem: str) -> None:
    """Raise `UserError` about the first row where ``bad`` holds; ``problem`` is a format of the row's columns."""
    if bad.any():
        line = int(bad.idxmax())
        raise UserError(f"{path}, line {line + 2}: {problem.format(**table.loc[line].str[:200])}")


def _read_bytes(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: check --dataset_dir") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its rights") from error


def _listing(folder: Path) -> set[str]:
    """Return the names in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}): check its rights") from error


# Validation part

_LOOK_AHEAD = 8  # locations. With 1, 10 % of split25 is 7 to 12 % of a device; with all, large locations only


def split_by_location(clips: Clips, fraction: float) -> tuple[Clips, Clips]:
    """Split clips into (train, val) by whole recording locations: none has clips on both sides.

    Of each scene, ``fraction`` of the clips is held out, as nearly as whole locations allow: at least one location and
    never all of them. Locations are tried in a fixed order without a pattern (of their hashes); of the next few that
    fit, the one is taken that brings every device nearest to ``fraction``. The result depends only on the clips'
    locations, scenes and devices, not on a seed.
    Raises `UserError` for a fraction outside (0, 1) and where a scene has too few locations.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction is more than 0 and less than 1 to hold clips out; got {fraction}")
    names, location = np.unique(clips.location, return_inverse=True)
    labels = clips.labels
    counts = np.zeros((len(names), len(labels.scenes), len(labels.devices)), dtype=np.int64)  # clips
    np.add.at(counts, (location, clips.scene, clips.device), 1)
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(b"TAU22 validation " + names[i]).digest())
    held_out = np.zeros(len(names), dtype=bool)
    scenes = np.unique(clips.scene)
    for n_scenes, scene in enumerate(scenes, start=1):
        device_target = fraction * counts[:, scenes[:n_scenes]].sum((0, 1))  # of the scenes so far
        while (i := _next_to_hold_out(scene, counts, order, held_out, fraction, device_target)) is not None:
            held_out[i] = True
        if not counts[held_out, scene].any():
            raise UserError(
                f"{labels.scenes[scene]} has too few recording locations to hold one out: it needs clips of one more "
                "(meta.csv's identifier), or use --val_fraction 0"
            )
    is_val = held_out[location]
    return clips.select(~is_val), clips.select(is_val)


def _next_to_hold_out(
    scene: int, counts: np.ndarray, order: list[int], held_out: np.ndarray, fraction: float, device_target: np.ndarray
) -> int | None:
    """Return the location to hold out next for a scene; None where enough is held out.

    ``counts``: clips (locations, scenes, devices); ``held_out``: (locations,) bool; ``device_target``: (devices,).
    """
    n_clips = counts[:, scene].sum(1)  # (locations,)
    target, taken = fraction * n_clips.sum(), n_clips[held_out].sum()
    has_scene = counts.sum(2) > 0  # (locations, scenes)
    is_last = has_scene & ((has_scene & ~held_out[:, None]).sum(0) == 1)  # a scene needs a training location
    free = [i for i in order if n_clips[i] and not held_out[i] and not is_last[i].any()]

    def device_error(i: int) -> float:
        devices = counts[held_out].sum((0, 1)) + counts[i].sum(0)
        return float(((devices - device_target) ** 2 / np.maximum(device_target, 1)).sum())

    fitting = [i for i in free if taken + n_clips[i] <= target]
    if fitting:
        return min(fitting[:_LOOK_AHEAD], key=device_error)
    # One that goes beyond the target: where nothing is held out yet, or where it comes nearer.
    nearest = min(free, key=lambda i: abs(taken + n_clips[i] - target), default=None)
    if nearest is not None and (not taken or abs(taken + n_clips[nearest] - target) < abs(taken - target)):
        return nearest
    return None


def location_folds(clips: Clips, n_folds: int) -> np.ndarray:
    """Return the fold (n,), 0 to ``n_folds`` - 1, of each clip: a location's clips are in one fold.

    Every fold has its share of each scene's and each device's clips, as nearly as whole locations allow. The result
    depends only on the clips' locations, scenes and devices.
    Raises `UserError` where there are too few locations: a scene's clips would all be in one fold, or a fold empty.
    """
    names, location = np.unique(clips.location, return_inverse=True)
    n_scenes, n_devices = len(clips.labels.scenes), len(clips.labels.devices)
    share = np.zeros((len(names), n_scenes + n_devices))  # of the clips of each scene, and of each device
    np.add.at(share, (location, clips.scene), 1)
    np.add.at(share, (location, n_scenes + clips.device), 1)
    has_scene = share[:, :n_scenes] > 0
    share /= np.maximum(share.sum(0), 1)
    taken, fold = np.zeros((n_folds, share.shape[1])), np.zeros(len(names), dtype=np.int64)
    # The largest first. Each goes where there is least of its kind, which keeps the sum of the squares low.
    for i in sorted(range(len(names)), key=lambda i: (-share[i].sum(), hashlib.sha256(names[i]).digest())):
        fold[i] = (taken @ share[i]).argmin()
        taken[fold[i]] += share[i]
    if len(np.unique(fold)) < n_folds:
        raise UserError(f"--cross_fit {n_folds}: {len(names)} recording locations do not make so many parts: give less")
    for scene in np.unique(clips.scene):
        if len(np.unique(fold[has_scene[:, scene]])) < 2:
            raise UserError(
                f"the training clips of {clips.labels.scenes[scene]} are from too few recording locations for folds: "
                "cross-fitting needs two at least (meta.csv's identifier)"
            )
    return fold[location]
