"""Check a data folder, ``python -m dcase.prepare --dataset_dir D``, or pack it, ``... --pack``.

Checking reads every file that meta.csv names and writes, beside it, ``meta_clean.csv`` (meta.csv without the clips at
fault, which `dcase.data.tau22.load_clips` then prefers) and ``meta_excluded.csv`` (filename, reason). Packing reads
every clip of the training and the test split once and writes them, resampled, to one file (`dcase.data.pack`). No
sound file is touched.
"""

import csv
import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dcase.cli import parse
from dcase.data.cores import over_all_cores
from dcase.data.packing import pack_clips
from dcase.data.sound import read_samples
from dcase.data.tau22 import SPLITS, SUBSETS, check_folder, is_tau22, missing_files, read_meta, read_split
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress

_CHUNK = 64  # files a worker takes at a time
_LENGTH = "not the most frequent length"  # no fault of a file alone
_ONE_LENGTH = (
    "cut or pad the others to the most frequent one, or check with --any_length and train with --target_length, which "
    "pads or crops every clip"
)


@dataclass(frozen=True)
class PrepareConfig:
    """Raises `UserError` for a value that makes no sense."""

    dataset_dir: str | None = None
    """TAU22 folder to check or to pack; without it TAU22_DIR"""
    pack: bool = False
    """pack the clips of --subset and of the test split instead of checking files; goes on where it was interrupted"""
    subset: int = 25
    """part of TAU22's training clips to pack: 5, 10, 25, 50 or 100 (percent)"""
    sample_rate: int = 32000
    """rate (Hz) that clips are resampled to in the pack: the training scripts' --sample_rate"""
    pack_dir: str | None = None
    """folder of the pack; without it pack/ in the data folder"""
    orig_sample_rate: int = 44100
    """rate (Hz) that every file must have; in a pack, the training scripts' --orig_sample_rate"""
    num_workers: int | None = None
    """processes that read files; 0: only this one; without it one per core"""
    silence_db: float = -100.0
    """level (dBFS, RMS around the mean) below which a clip counts as silent"""
    any_length: bool = False
    """clips may have several lengths, for training with --target_length"""
    force: bool = False
    """write meta_clean.csv even where more than half of the clips are at fault"""

    def __post_init__(self):
        for name in ("orig_sample_rate", "sample_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} is a rate in Hz, more than 0; got {getattr(self, name)}")
        if self.subset not in SUBSETS:
            raise UserError(f"--subset is 5, 10, 25, 50 or 100 (percent); got {self.subset}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"--num_workers is at least 0; got {self.num_workers}")


@dataclass(frozen=True)
class FileCheck:
    """What reading one file showed: its length in samples, and what is wrong with it ("" for nothing)."""

    n_samples: int
    fault: str


def check_file(path: Path, sample_rate: int, silence_db: float) -> FileCheck:
    """Read one file. Its length can be judged only beside the others': `find_faults` does."""
    try:
        samples, rate = read_samples(path)
    except UserError:
        return FileCheck(0, "empty" if path.is_file() and not path.stat().st_size else "unreadable")
    return FileCheck(len(samples), _fault(samples, rate, sample_rate, silence_db))


def _fault(samples: np.ndarray, rate: int, sample_rate: int, silence_db: float) -> str:
    """The first thing wrong with samples (n, channels) at ``rate`` Hz: its kind, some with "(a figure)" behind it."""
    if not len(samples):
        return "empty"
    if not np.isfinite(samples).all():
        return "NaN or infinite"
    # Around the mean: a recorder's constant offset is not sound.
    if samples.std(dtype=np.float64) < 10 ** (silence_db / 20):
        return "silent"
    if rate != sample_rate:
        return f"wrong rate ({rate} Hz)"
    if samples.shape[1] != 1:
        return f"not mono ({samples.shape[1]} channels)"
    return ""


def find_faults(folder: Path, filenames: list[str], config: PrepareConfig) -> list[str]:
    """What is wrong with each file, "" where nothing is; over all cores, with a progress bar.

    A length is a fault where it is not the most frequent one of the files that have no other fault.
    """
    missing = set(missing_files(folder, filenames))
    present = [name for name in filenames if name not in missing]
    check = partial(check_file, sample_rate=config.orig_sample_rate, silence_db=config.silence_db)
    chunks = [[folder / name for name in present[i : i + _CHUNK]] for i in range(0, len(present), _CHUNK)]
    found = over_all_cores(partial(_each, check), chunks, config.num_workers)
    results = []
    with progress(total=len(present), desc="checking", unit=" files", disable=not present) as bar, closing(found):
        for some in found:
            results += some
            bar.update(len(some))
    checks = dict(zip(present, results, strict=True))
    lengths = Counter(found.n_samples for found in checks.values() if not found.fault)
    usual = lengths.most_common(1)[0][0] if lengths else 0

    def fault(name: str) -> str:
        if name in missing:
            return "missing"
        found = checks[name]
        if found.fault or found.n_samples == usual or config.any_length:
            return found.fault
        return f"{_LENGTH} ({found.n_samples} samples, not {usual})"

    return [fault(name) for name in filenames]


def _each(check, paths: list[Path]) -> list[FileCheck]:
    return [check(path) for path in paths]


def report(excluded: pd.DataFrame, splits: dict[str, set[str]], n_clips: int, tau22: bool) -> str:
    """What was excluded (columns filename, reason), by reason and by split list; whether the data are TAU22's decides
    what to do about it."""
    if excluded.empty:
        return f"All {n_clips} files are fine."
    lines = [f"{len(excluded)} of {n_clips} clips are at fault:", f"{'clips':>8}  {'fault':<28}  first of them"]
    kinds = _kind(excluded["reason"])
    for kind, names in excluded.groupby(kinds)["filename"]:
        examples = ", ".join(names.iloc[:2]) + (", ..." if len(names) > 2 else "")
        lines.append(f"{len(names):>8}  {kind:<28}  {examples}")
    at_fault = set(excluded["filename"])
    for split, names in splits.items():
        lines.append(f"{len(names & at_fault):>8}  of the {len(names)} clips of {split}")
    if not tau22 and (kinds == _LENGTH).any():
        lines.append(f"All clips need one length, whichever it is: {_ONE_LENGTH}.")
    n_test = len(splits.get("test", set()) & at_fault)
    if n_test:
        what_to_do = "get these files again" if tau22 else "mend or replace these files"
        lines.append(
            f"WARNING: {n_test} TEST CLIPS ARE EXCLUDED. A score on the other {len(splits['test']) - n_test} "
            f"is NOT COMPARABLE with one on the whole test split: {what_to_do}."
        )
    return "\n".join(lines)


def prepare(folder: Path, config: PrepareConfig) -> None:
    """Check a data folder and write its meta_clean.csv and meta_excluded.csv.

    Raises `UserError` where its lists are wrong, and, without ``force``, where most files are at fault; both
    lists are then as they were.
    """
    check_folder(folder)
    meta = read_meta(folder / "meta.csv")
    paths = {split: folder / "split_setup" / f"{split}.csv" for split in SPLITS}
    splits = {split: set(read_split(path)["filename"]) for split, path in paths.items() if path.is_file()}
    reason = np.array(find_faults(folder, meta["filename"].tolist(), config), dtype=object)
    excluded = pd.DataFrame({"filename": meta["filename"], "reason": reason})[reason != ""]
    tau22 = is_tau22(folder)
    print(report(excluded, splits, len(meta), tau22))
    if len(excluded) > len(meta) / 2 and not config.force:
        most = _kind(excluded["reason"]).value_counts().index[0]
        raise UserError(
            f"more than half of the clips are at fault, most of them {most!r}: {_cause(most, tau22)}; "
            f"meta_clean.csv is not written (--force writes it all the same)"
        )
    # meta_clean.csv last: what it leaves out is always written down already.
    _write(folder / "meta_excluded.csv", excluded)
    _write(folder / "meta_clean.csv", meta[reason == ""])
    print(
        f"{folder / 'meta_clean.csv'}: {len(meta) - len(excluded)} clips; {len(excluded)} left out (meta_excluded.csv)"
    )


def _kind(reason: pd.Series) -> pd.Series:
    """A fault without its figure, which may differ from file to file."""
    return reason.str.partition(" (")[0]


def _cause(kind: str, tau22: bool) -> str:
    """What is likely wrong where most files have one fault."""
    if kind == "missing":
        return "is the sound unpacked, all parts of it, into the folder's audio/?"
    if kind == "wrong rate":
        return "give the rate of these recordings as --orig_sample_rate"
    if kind == "silent":
        return "is --silence_db too high?"
    if kind == _LENGTH and not tau22:
        return _ONE_LENGTH
    return "get the sound files again"


def _write(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(sep="\t", index=False, lineterminator="\n", quoting=csv.QUOTE_NONE)  # as tau22 reads it
    replace_file(path, lambda beside: beside.write_bytes(text.encode()))


def main() -> None:
    config = parse(PrepareConfig, "Check every file of a data folder and write meta_clean.csv, or pack its clips.")
    dataset_dir = config.dataset_dir or os.environ.get("TAU22_DIR")
    if not dataset_dir:
        raise UserError("which folder? Give --dataset_dir or set TAU22_DIR")
    folder = Path(dataset_dir).expanduser()
    if config.pack:
        pack_clips(folder, config)
    else:
        prepare(folder, config)


if __name__ == "__main__":
    run(main)
