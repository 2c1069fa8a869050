"""Checks of the data folder, for `dcase.doctor`: its lists, its recordings and their lengths, and the pack.

Nothing is fetched, made or changed.
"""

import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from dcase.data import pack, synth
from dcase.data.logmel import LogMelConfig
from dcase.data.pack import Pack, Rates
from dcase.data.tau22 import (
    RELEASE,
    SPLITS,
    Clips,
    DataConfig,
    SplitConfig,
    check_folder,
    is_tau22,
    load_splits,
    missing_files,
    read_split,
    untrained_scenes,
)
from dcase.doctor import lengths
from dcase.doctor.findings import Finding
from dcase.errors import UserError

_READING = ("pack_dir", "subset", "sample_rate", "orig_sample_rate")  # flags that say what is read, and how
OWN_DATA = 'docs/extending.md, "A data set", has the lists of data of your own'


@dataclass(frozen=True)
class Data:
    """What training would be asked for."""

    dataset_dir: str | None
    pack_dir: str | None
    rates: Rates
    subset: int  # percent
    target_length: int | None  # frames

    def pack_folder(self, folder: Path) -> Path:
        return Path(self.pack_dir).expanduser() if self.pack_dir else folder / "pack"

    # Commands, with the flags that are not the defaults

    def check(self, folder: Path) -> str:
        any_length = [] if self.target_length is None else ["--any_length"]
        return _command("python -m dcase.prepare", folder, *self._given("orig_sample_rate"), *any_length)

    def make_pack(self, folder: Path) -> str:
        return _command("python -m dcase.prepare", folder, "--pack", *self._given(*_READING))

    def train(self, folder: Path) -> str:
        return _command("python train_base.py", folder, *self._given(*_READING))

    def _given(self, *names: str) -> list[str]:
        flags = {
            "pack_dir": (self.pack_dir and Path(self.pack_dir).expanduser(), DataConfig.pack_dir),
            "subset": (self.subset, SplitConfig.subset),
            "sample_rate": (self.rates.sample_rate, LogMelConfig.sample_rate),
            "orig_sample_rate": (self.rates.orig_sample_rate, DataConfig.orig_sample_rate),
        }
        other = {name: str(value) for name, (value, default) in flags.items() if value != default}
        return [f"--{name} {shlex.quote(other[name])}" for name in names if name in other]


def _command(program: str, folder: Path, *flags: str) -> str:
    return " ".join([program, "--dataset_dir", shlex.quote(str(folder)), *flags])


def data_folder(data: Data) -> list[Finding]:
    """Every finding about the data folder: --dataset_dir, TAU22_DIR, or SynthTAU's."""
    given = data.dataset_dir or os.environ.get("TAU22_DIR")
    if not given:
        folder = synth.default_folder()
        what = "neither --dataset_dir nor TAU22_DIR is given: the scripts use SynthTAU, which is synthetic"
        if not folder.exists():
            return [Finding("data", "warn", f"{what}, and make it at first use", "export TAU22_DIR=/data/TAU22")]
        if not synth.is_whole(folder):
            what += f", and make it again at their next use: something of {folder} is missing"
            return [Finding("data", "warn", what, "export TAU22_DIR=/data/TAU22")]
        first = Finding("data", "warn", f"{what}, in {folder}", "export TAU22_DIR=/data/TAU22")
        return [first, *_contents(folder, data)]
    folder = Path(given).expanduser()
    try:
        check_folder(folder)
    except UserError as error:
        fix = "" if folder.is_dir() else f"ls {folder}; ls {folder.absolute().parent}"
        return [Finding("data", "FAIL", str(error), fix)]
    kind = "TAU22" if is_tau22(folder) else "not TAU22 itself, or another test split"
    return [Finding("data", "ok", f"{folder} ({kind})"), *_contents(folder, data)]


def _contents(folder: Path, data: Data) -> list[Finding]:
    lists = _lists(folder, data.subset)
    broken = any(finding.state == "FAIL" for finding in lists)
    absent = [split for split in _asked(data) if not _list_path(folder, split).is_file()]
    if broken or absent:
        return lists
    try:
        splits = _quietly(lambda: dict(zip(_asked(data), load_splits(folder, *_asked(data)), strict=True)))
    except UserError as error:
        fix = data.check(folder) if is_tau22(folder) else OWN_DATA
        return [*lists, Finding("clips", "FAIL", str(error), fix)]
    packed = _pack(folder, data, splits)
    # Where a pack serves all of them, recordings may be missing.
    needed = not any(finding.state == "ok" for finding in packed)
    return [
        *lists,
        *_scenes(*splits.values()),
        *_recordings(folder, splits, needed, data.check(folder)),
        *_lengths(folder, data, splits.values(), needed),
        _checked(folder, data.check(folder)),
        *packed,
    ]


def _asked(data: Data) -> tuple[str, str]:
    return f"split{data.subset}", "test"


def _list_path(folder: Path, split: str) -> Path:
    return folder / "split_setup" / f"{split}.csv"


def _lists(folder: Path, subset: int) -> list[Finding]:
    there, found = {}, []
    paths = {split: _list_path(folder, split) for split in SPLITS}
    tau22 = is_tau22(folder)
    own = not tau22 and any(path.is_file() for path in paths.values())  # lists that TAU22's must not replace
    for split, path in paths.items():
        if path.is_file():
            try:
                there[split] = len(read_split(path))
            except UserError as error:
                found.append(Finding("split lists", "FAIL", str(error), _fetch_anew(path) if tau22 else OWN_DATA))
        elif split in (f"split{subset}", "test"):
            what = f"{path} is missing: training fetches TAU22's, where there is a network"
            what += "" if tau22 else "; data of your own need lists of their own"
            found.append(Finding("split lists", "warn", what, OWN_DATA if own else _fetch(path)))
    shown = ", ".join(f"{split} ({n:,} clips)" for split, n in there.items())
    return [*([Finding("split lists", "ok", shown)] if shown else []), *found]


def _fetch(path: Path) -> str:
    return f"curl -L --create-dirs -o {shlex.quote(str(path))} {RELEASE}/{path.name}"


def _fetch_anew(path: Path) -> str:
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')} && {_fetch(path)}"


def _scenes(training: Clips, test: Clips) -> list[Finding]:
    untrained = untrained_scenes(training, test)
    return [Finding("scenes", "warn", untrained, OWN_DATA)] if untrained else []


def _recordings(folder: Path, splits: dict[str, Clips], needed: bool, check: str) -> list[Finding]:
    found = []
    for split, clips in splits.items():
        missing = missing_files(folder, [name.decode() for name in clips.filenames.tolist()])
        if missing:
            what = f"{len(missing):,} of the {len(clips):,} WAV files of {split} are missing ({missing[0]}, ...)"
            if needed:
                found.append(Finding("recordings", "FAIL", f"{what}: unpack them, or leave them out", check))
            else:
                found.append(Finding("recordings", "-", f"{what}; the pack has them"))
    shown = " and ".join(f"{len(clips):,} of {split}" for split, clips in splits.items())
    return found or [Finding("recordings", "ok", f"all WAV files are there: {shown}")]


def _lengths(folder: Path, data: Data, splits: Iterable[Clips], from_files: bool) -> list[Finding]:
    if data.target_length is not None:
        return [Finding("lengths", "ok", f"any: --target_length {data.target_length} pads or crops every clip")]
    if from_files:
        return lengths.of_files(folder, splits, data.rates, data.check(folder), data.train(folder))
    return [lengths.of_pack(splits, Pack(data.pack_folder(folder)), data.train(folder))]


def _checked(folder: Path, check: str) -> Finding:
    clean, excluded, meta = (folder / name for name in ("meta_clean.csv", "meta_excluded.csv", "meta.csv"))
    if not clean.is_file():
        if (folder / synth.MARK).is_file():
            return Finding("checked", "-", "not yet; synthetic recordings are not damaged")
        return Finding("checked", "warn", "nobody has looked for damaged recordings yet", check)
    n_out = len(excluded.read_text().splitlines()) - 1 if excluded.is_file() else None
    if meta.is_file() and meta.stat().st_mtime > clean.stat().st_mtime:
        return Finding("checked", "warn", f"{meta} has changed since {clean.name} was made", check)
    if n_out is None:
        return Finding("checked", "warn", f"{clean.name} is there without {excluded.name}", check)
    return Finding("checked", "ok", f"{clean.name} leaves out {n_out:,} recordings ({excluded.name} says why)")


def _pack(folder: Path, data: Data, splits: dict[str, Clips]) -> list[Finding]:
    place = data.pack_folder(folder)
    again = data.make_pack(folder)
    if not pack.exists(place):
        return [Finding("pack", "warn", f"none in {place}: WAV files are read, many times slower", again)]
    try:
        found = Pack(place)
        if found.rates != data.rates:
            raise UserError(
                f"{place} was resampled from {found.rates.orig_sample_rate} to {found.rates.sample_rate} Hz, not from "
                f"{data.rates.orig_sample_rate} to {data.rates.sample_rate}"
            )
        for split, clips in splits.items():
            changed = found.changed_sources(folder, found.rows(clips.filenames))
            if changed:
                raise UserError(
                    f"{len(changed):,} recordings of {split} are missing or have changed since {place} was made "
                    f"({changed[0]}, ...)"
                )
    except UserError as error:
        return [Finding("pack", "FAIL", str(error).removesuffix(f": {pack.AGAIN}"), again)]
    return [Finding("pack", "ok", f"{place}: {len(found):,} clips at {found.rates.sample_rate} Hz")]


def _quietly(what: Callable):
    with redirect_stdout(StringIO()):  # what meta_clean.csv leaves out is a finding of its own
        return what()
