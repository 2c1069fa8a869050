"""Check a data folder, ``python -m dcase.prepare --dataset_dir D``, or pack it, ``... --pack``.

Checking reads every file that meta.csv names. It writes, beside meta.csv, ``meta_clean.csv`` (meta.csv without the
faulty clips, which `dcase.data.tau22.load_clips` then prefers) and ``meta_excluded.csv`` (filename, reason). Packing
reads every clip of the training and the test split once and writes them, resampled, to one file (`dcase.data.pack`).
No sound file is changed.
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
from dcase.data.loading import rates_in, usual_rate
from dcase.data.logmel import LogMelConfig
from dcase.data.packing import pack_clips
from dcase.data.sound import fault_of, is_odd_ratio, read_samples
from dcase.data.tau22 import (
    SPLITS,
    DataConfig,
    SplitConfig,
    check_folder,
    is_tau22,
    missing_files,
    read_meta,
    read_split,
)
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress

_CHUNK = 64  # files that a process takes at a time
_LENGTH = "not the most frequent length"  # only a fault beside the other files
_ONE_LENGTH = (
    "cut or pad the others to the most frequent one, or check with --any_length and train with --target_length, which "
    "pads or crops every clip"
)


@dataclass(frozen=True)
class PrepareConfig:
    dataset_dir: str | None = None
    """TAU22 folder to check or to pack; without it TAU22_DIR"""
    pack: bool = False
    """Pack the clips of --subset and of the test split instead of checking files; goes on where it was interrupted."""
    subset: int = SplitConfig.subset
    """Part of TAU22's training clips to pack: 5, 10, 25, 50 or 100 (percent)."""
    sample_rate: int = LogMelConfig.sample_rate
    """Rate (Hz) that clips are resampled to in the pack: the training scripts' --sample_rate."""
    pack_dir: str | None = None
    """Folder of the pack; without it pack/ in the data folder."""
    orig_sample_rate: int | None = None
    """Rate (Hz) at which recordings are read, the training scripts' --orig_sample_rate; a file of another rate is
    resampled to it. None: the rate that most files have."""
    num_workers: int | None = None
    """Processes that read files; 0: only this one; without it one per core."""
    silence_db: float = -100.0
    """Level (dBFS, RMS around the mean) below which a clip counts as silent."""
    any_length: bool = False
    """Accept clips of several lengths, for training with --target_length."""
    force: bool = False
    """Write meta_clean.csv even where more than half of the clips are faulty."""

    def __post_init__(self):
        SplitConfig(subset=self.subset)  # these check their flags
        DataConfig(orig_sample_rate=self.orig_sample_rate)
        LogMelConfig(sample_rate=self.sample_rate)
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"--num_workers is at least 0; got {self.num_workers}")


def check_file(path: Path, sample_rate: int, silence_db: float) -> tuple[int, str, list[str]]:
    """Return a file's length in samples at ``sample_rate``, its fault ("" for none): its kind, for some with "(a
    figure)" behind it; and what training does to it.

    Its length can be judged only beside the others': `find_faults` does.
    """
    try:
        samples, rate = read_samples(path)
    except UserError:
        return 0, "empty" if path.is_file() and not path.stat().st_size else "unreadable", []
    fault = fault_of(samples)
    if not fault and samples.std(dtype=np.float64) < 10 ** (silence_db / 20):  # an offset is no sound: around the mean
        fault = "silent"
    elif not fault and rate != sample_rate and is_odd_ratio(rate, sample_rate):
        fault = f"wrong rate ({rate} Hz)"
    changes = [f"resampled from {rate} to {sample_rate} Hz"] if rate != sample_rate else []
    changes += [f"mixed down from {samples.shape[1]} channels"] if samples.shape[1] > 1 else []
    return -(-len(samples) * sample_rate // rate), fault, changes


def _check_files(paths: list[Path], **limits: float) -> list[tuple[int, str, list[str]]]:
    return [check_file(path, **limits) for path in paths]


def find_faults(folder: Path, filenames: list[str], config: PrepareConfig) -> list[str]:
    """Return the fault of each file, "" for none; reads in several processes, with a progress bar. Prints how many
    files are resampled or mixed down in training.

    A length is a fault where it is not the most frequent one among the files that have no other fault.
    """
    missing = set(missing_files(folder, filenames))
    present = [name for name in filenames if name not in missing]
    rate = config.orig_sample_rate or usual_rate(rates_in(folder))
    check = partial(_check_files, sample_rate=rate, silence_db=config.silence_db)
    chunks = [[folder / name for name in present[i : i + _CHUNK]] for i in range(0, len(present), _CHUNK)]
    found = []
    with (
        progress(total=len(present), desc="checking", unit=" files", disable=not present) as bar,
        closing(over_all_cores(check, chunks, config.num_workers)) as results,
    ):
        for some in results:
            found += some
            bar.update(len(some))
    lengths = Counter(n_samples for n_samples, fault, _ in found if not fault)
    usual = lengths.most_common(1)[0][0] if lengths else 0
    faults = dict.fromkeys(missing, "missing")
    changed: Counter[str] = Counter()
    for name, (n_samples, fault, changes) in zip(present, found, strict=True):
        if not fault and n_samples != usual and not config.any_length:
            fault = f"{_LENGTH} ({n_samples} samples, not {usual})"
        faults[name] = fault
        changed.update([] if fault else changes)
    for change, n in sorted(changed.items()):
        print(f"no fault: {n:,} of {len(present):,} files are {change} where training reads them")
    return [faults[name] for name in filenames]


def report(excluded: pd.DataFrame, splits: dict[str, set[str]], n_clips: int, tau22: bool) -> str:
    """Return the text on what was excluded (columns filename, reason), by reason and by split list.

    ``tau22``: whether the data are TAU22's, which decides what to do about it.
    """
    if excluded.empty:
        return f"All {n_clips} files are fine."
    lines = [f"{len(excluded)} of {n_clips} clips are faulty:", f"{'clips':>8}  {'fault':<28}  first of them"]
    kinds = _kind(excluded["reason"])
    for kind, names in excluded.groupby(kinds)["filename"]:
        examples = ", ".join(names.iloc[:2]) + (", ..." if len(names) > 2 else "")
        lines.append(f"{len(names):>8}  {kind:<28}  {examples}")
    at_fault = set(excluded["filename"])
    for split, names in splits.items():
        lines.append(f"{len(names & at_fault):>8}  of the {len(names)} clips of {split}")
    if not tau22 and (kinds == _LENGTH).any():
        lines.append(f"All clips need one length: {_ONE_LENGTH}.")
    n_test = len(splits.get("test", set()) & at_fault)
    if n_test:
        what_to_do = "download these files again" if tau22 else "repair or replace these files"
        lines.append(
            f"WARNING: {n_test} TEST CLIPS ARE EXCLUDED. A score on the other {len(splits['test']) - n_test} "
            f"is NOT COMPARABLE with one on the whole test split: {what_to_do}."
        )
    return "\n".join(lines)


def prepare(folder: Path, config: PrepareConfig) -> None:
    """Check a data folder and write its meta_clean.csv and meta_excluded.csv.

    Raises `UserError` where its lists are wrong and, without ``force``, where most files are faulty; both files are
    then left as they were.
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
            f"more than half of the clips are faulty, most of them {most!r}: {_cause(most, tau22)}; "
            "meta_clean.csv is not written (--force writes it anyway)"
        )
    # meta_clean.csv last, so that the reasons for what it leaves out are always there already.
    _write(folder / "meta_excluded.csv", excluded)
    _write(folder / "meta_clean.csv", meta[reason == ""])
    print(
        f"{folder / 'meta_clean.csv'}: {len(meta) - len(excluded)} clips; {len(excluded)} left out (meta_excluded.csv)"
    )


def _kind(reason: pd.Series) -> pd.Series:
    """Return each fault's kind, without the figure, which may differ from file to file."""
    return reason.str.partition(" (")[0]


def _cause(kind: str, tau22: bool) -> str:
    """Return the likely cause where most files have one fault."""
    if kind == "missing":
        return "are all parts of the sound unpacked into the folder's audio/?"
    if kind == "wrong rate":
        return "check the rates in the files' headers, and --orig_sample_rate"
    if kind == "silent":
        return "is --silence_db too high?"
    if kind == _LENGTH and not tau22:
        return _ONE_LENGTH
    return "download the sound files again"


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
