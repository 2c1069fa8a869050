"""Checks of places, for `dcase.doctor`: the data folder's lists, recordings and pack, and free disk.

Nothing is fetched, made or changed.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import numpy as np
import soundfile

from aum.cache import cache_folder
from dcase.data import pack, synth
from dcase.data.dataset import Sound
from dcase.data.labels import TAU22_LABELS
from dcase.data.loading import PACKING, check_recordings, data_command, open_sound, rates_in, usual_rate
from dcase.data.logmel import LogMelConfig, empty_bins, fitting
from dcase.data.sound import cut_short
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
from dcase.doctor.findings import Finding, looked
from dcase.doctor.machine import disk
from dcase.errors import UserError, command
from dcase.files import regular
from dcase.progress import progress

OWN_DATA = 'docs/extending.md, "A data set", has the lists of data of your own'
_SECONDS = 10  # for headers: all of TAU22's take about 2 from memory, and may take minutes from a cold disk


@dataclass(frozen=True)
class DoctorConfig:
    """The training scripts' flags that the checks depend on."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    logmel: LogMelConfig = field(default_factory=LogMelConfig)
    project_name: str = "DCASE25_Task1"
    """Folder of the runs, whose disk is checked."""

    def train(self, folder: Path, *flags: str) -> str:
        """Return the command that trains on the folder with these flags and those given to the doctor."""
        return data_command("python train_base.py", self, folder, *flags, given=(*PACKING, *vars(self.logmel)))

    def check(self, folder: Path, are_mixed: bool = False) -> str:
        """Return the command that checks the recordings; ``are_mixed``: most have other lengths, and must be kept."""
        takes_any = self.logmel.batch_lengths or self.logmel.target_length is not None
        any_length = ["--any_length"] if are_mixed or takes_any else []
        return data_command("python -m dcase.prepare", self, folder, *any_length, given=("orig_sample_rate",))


def places(config: DoctorConfig) -> list[Finding]:
    """Check the data, and the space for runs and for what is made once per machine."""
    runs, cache = Path(config.project_name), cache_folder()
    return [
        *looked("data", lambda: data_folder(config)),
        *looked("disk: runs", lambda: disk("disk: runs", runs, f"df -h; {command('du', '-sh', runs)}")),
        *looked("disk: cache", lambda: disk("disk: cache", cache, "export AUDIO_MAMBA_CACHE=/another/folder")),
    ]


def data_folder(config: DoctorConfig) -> list[Finding]:
    """Check the data folder: --dataset_dir, TAU22_DIR, or SynthTAU's."""
    given = config.data.dataset_dir or os.environ.get("TAU22_DIR")
    if not given:
        folder = synth.default_folder()
        if synth.is_whole(folder):
            place = f"in {folder}"
        elif folder.exists():
            place = f"and make it again at their next use, as {folder} is not whole"
        else:
            place = "and make it at first use"
        what = f"neither --dataset_dir nor TAU22_DIR is given: the scripts use SynthTAU, which is synthetic, {place}"
        first = Finding("data", "warn", what, "export TAU22_DIR=/data/TAU22")
        return [first, *(_contents(folder, config) if synth.is_whole(folder) else [])]
    folder = Path(given).expanduser()
    try:
        check_folder(folder)
    except UserError as error:
        fix = "" if folder.is_dir() else f"{command('ls', folder)}; {command('ls', folder.absolute().parent)}"
        return [Finding("data", "FAIL", str(error), fix)]
    kind = "TAU22" if is_tau22(folder) else "not TAU22 itself, or another test split"
    return [Finding("data", "ok", f"{folder} ({kind})"), *_contents(folder, config)]


def _contents(folder: Path, config: DoctorConfig) -> list[Finding]:
    asked = (f"split{config.split.subset}", "test")
    lists = _lists(folder, asked)
    if any(finding.state == "FAIL" for finding in lists) or not all(_list(folder, name).is_file() for name in asked):
        return lists
    try:
        splits = dict(zip(asked, _quietly(lambda: load_splits(folder, *asked)), strict=True))
    except UserError as error:
        fix = config.check(folder) if is_tau22(folder) else OWN_DATA
        return [*lists, Finding("clips", "FAIL", str(error), fix)]
    untrained = untrained_scenes(*splits.values())
    rates, asked_for = rates_in(folder), config.logmel
    usual = config.data.orig_sample_rate or usual_rate(rates)
    config = replace(config, logmel=fitting(asked_for, usual))  # so that all commands fit each other
    packed, sound = _pack(folder, config, splits, usual)
    lengths, are_mixed = _lengths(folder, config, splits, sound)
    return [
        *lists,
        *([Finding("scenes", "warn", untrained, OWN_DATA)] if untrained else []),
        *_recordings(folder, config, splits, sound),
        _rate(folder, config, rates, usual, empty_bins(asked_for, usual)),
        *lengths,
        _checked(folder, config, are_mixed),
        packed,
    ]


def _list(folder: Path, split: str) -> Path:
    return folder / "split_setup" / f"{split}.csv"


def _lists(folder: Path, asked: tuple[str, str]) -> list[Finding]:
    there, found = [], []
    tau22 = is_tau22(folder)
    own = not tau22 and any(_list(folder, split).is_file() for split in SPLITS)  # TAU22's must not replace them
    for split in SPLITS:
        path = _list(folder, split)
        fetch = command("curl", "-L", "--create-dirs", "-o", path, f"{RELEASE}/{path.name}")
        if path.is_file():
            try:
                there.append(f"{split} ({len(read_split(path, labels=TAU22_LABELS if tau22 else None)):,} clips)")
            except UserError as error:
                fix = f"{command('mv', path, f'{path}.old')} && {fetch}" if tau22 else OWN_DATA
                found.append(Finding("split lists", "FAIL", str(error), fix))
        elif split in asked:
            what = f"{path} is missing: training fetches TAU22's, where there is a network"
            what += "" if tau22 else "; data of your own need lists of their own"
            found.append(Finding("split lists", "warn", what, OWN_DATA if own else fetch))
    return [*([Finding("split lists", "ok", ", ".join(there))] if there else []), *found]


def _pack(folder: Path, config: DoctorConfig, splits: dict[str, Clips], usual: int) -> tuple[Finding, Sound]:
    """Return the finding, and where the sound comes from: the WAV files if the pack does not fit."""
    place = config.data.pack_folder(folder)
    again = data_command("python -m dcase.prepare", config, folder, "--pack", given=PACKING)
    wav = Sound(usual)
    try:
        sound = _quietly(lambda: open_sound(config, folder)[1])
        if sound.pack is None:
            why = "--read_from wav" if pack.exists(place) else f"none in {place}"
            return Finding("pack", "warn", f"{why}: WAV files are read, many times slower", again), wav
        for clips in splits.values():
            check_recordings(clips, sound)
    except UserError as error:
        return Finding("pack", "FAIL", str(error).partition(": make it again")[0], again), wav
    found = f"{place}: {len(sound.pack):,} clips at {sound.sample_rate} Hz"
    return Finding("pack", "ok", found), sound


def _recordings(folder: Path, config: DoctorConfig, splits: dict[str, Clips], sound: Sound) -> list[Finding]:
    found = []
    for split, clips in splits.items():
        missing = missing_files(folder, [name.decode() for name in clips.filenames.tolist()])
        if not missing:
            continue
        what = f"{len(missing):,} of the {len(clips):,} WAV files of {split} are missing ({missing[0]}, ...)"
        if sound.pack:
            found.append(Finding("recordings", "-", f"{what}; the pack has them"))
        else:
            found.append(Finding("recordings", "FAIL", f"{what}: unpack or exclude them", config.check(folder)))
    shown = " and ".join(f"{len(clips):,} of {split}" for split, clips in splits.items())
    return found or [Finding("recordings", "ok", f"all WAV files are there: {shown}")]


def _rate(folder: Path, config: DoctorConfig, rates: Counter[int], rate: int, unheard: str) -> Finding:
    """Say at which rate the recordings are read, how many have others, and whether they fill the mel bins."""
    what = f"recordings are read at {rate} Hz"
    if others := {other: n for other, n in rates.items() if other != rate}:
        found = ", ".join(f"{n} have {other} Hz" for other, n in sorted(others.items()))
        what += f", and resampled to it where they have another rate (of {rates.total()} looked at, {found})"
    if unheard:
        return Finding("rate", "warn", f"{what}; {unheard}", config.train(folder))
    return Finding("rate", "ok", what)


def _lengths(folder: Path, config: DoctorConfig, splits: dict[str, Clips], sound: Sound) -> tuple[list[Finding], bool]:
    """Check that all clips have one length: without --target_length, training refuses any other one.

    Return also whether more than half of them have another one: `dcase.prepare` refuses to exclude so many.
    """
    if config.logmel.batch_lengths:
        return [Finding("lengths", "ok", "any: --batch_lengths takes every clip at its own")], False
    if config.logmel.target_length is not None:
        what = f"any: --target_length {config.logmel.target_length} pads or crops every clip"
        return [Finding("lengths", "ok", what)], False
    names = np.unique(np.concatenate([clips.filenames for clips in splits.values()]))
    decoded = [name.decode() for name in names.tolist()]
    findings, faulty = [], []
    if sound.pack:
        found = dict(zip(decoded, sound.pack.length[sound.pack.rows(names)].tolist(), strict=True))
        shown = f"all {len(found):,} clips"
    else:
        found, faulty, shown = _lengths_of_files(folder, decoded, sound.sample_rate)
    # Of equally frequent lengths the shortest: its model is the smallest.
    counts = Counter(found.values())
    usual, n_usual = max(counts.items(), key=lambda pair: (pair[1], -pair[0]), default=(0, 0))
    are_mixed = 2 * n_usual < len(found)
    wanted = sorted(found.values())[len(found) * 9 // 10] if are_mixed else usual  # cuts a tenth of them
    if faulty:
        what = f"in {shown}: {len(faulty):,} unreadable, empty or cut short ({faulty[0]}, ...)"
        check = config.check(folder, are_mixed)
        findings.append(Finding("recordings", "FAIL", f"{what}: replace or exclude them", check))
    if not found:
        return findings, are_mixed
    length = f"{usual:,} samples at {sound.sample_rate} Hz ({usual / sound.sample_rate:.4g} s)"
    if n_usual == len(found):
        return [*findings, Finding("lengths", "ok", f"{length} in {shown}")], are_mixed
    other = next(name for name, n_samples in found.items() if n_samples != usual)
    exclude = "" if are_mixed else "exclude the others with `python -m dcase.prepare`, "
    what = (
        f"several in {shown}: {len(found) - n_usual:,} have not the most frequent one, {length} ({other} has "
        f"{found[other]:,}). Training refuses that: cut them to one length, {exclude}or train with --target_length, "
        f"which pads or crops every clip (below: to {wanted / sound.sample_rate:.4g} s), or with --batch_lengths, "
        "which takes each at its own (aum_tiny, aum_small, aum_base)"
    )
    frames = 1 + wanted * config.logmel.sample_rate // sound.sample_rate // config.logmel.hop_length
    train = config.train(folder, "--target_length", str(frames))
    return [*findings, Finding("lengths", "FAIL", what, train)], are_mixed


def _lengths_of_files(folder: Path, names: list[str], sample_rate: int) -> tuple[dict[str, int], list[str], str]:
    """Read the headers of WAV files for some seconds. Return lengths at ``sample_rate``, faulty files, and which."""
    missing = set(missing_files(folder, names))
    names = [name for name in names if name not in missing]
    random.Random(0).shuffle(names)  # so that the first ones are of all scenes, devices and splits
    until = time.monotonic() + _SECONDS
    found, faulty = {}, []
    for name in progress(names, desc="lengths of the clips", unit=" files", leave=False, delay=1):
        try:
            with soundfile.SoundFile(regular(folder / name)) as file:
                if not file.frames or cut_short(file):
                    raise OSError
                found[name] = -(-file.frames * sample_rate // file.samplerate)
        except (soundfile.SoundFileError, OSError, TypeError):  # TypeError: soundfile's, for a name in .raw
            faulty.append(name)
        if time.monotonic() > until:
            break
    n_read = len(found) + len(faulty)
    shown = f"all {n_read:,} clips" if n_read == len(names) else f"{n_read:,} of {len(names):,} clips, drawn at random"
    return found, faulty, shown


def _checked(folder: Path, config: DoctorConfig, are_mixed: bool) -> Finding:
    clean, excluded, meta = (folder / name for name in ("meta_clean.csv", "meta_excluded.csv", "meta.csv"))
    if not clean.is_file():
        if (folder / synth.MARK).is_file():
            return Finding("checked", "-", "not yet; synthetic recordings are not damaged")
        what = "the recordings have not been checked for damage"
    elif meta.is_file() and meta.stat().st_mtime > clean.stat().st_mtime:
        what = f"{meta} has changed since {clean.name} was made"
    elif not excluded.is_file():
        what = f"{clean.name} is there without {excluded.name}"
    else:
        n_out = len(excluded.read_text().splitlines()) - 1
        return Finding("checked", "ok", f"{clean.name} leaves out {n_out:,} recordings ({excluded.name} says why)")
    return Finding("checked", "warn", what, config.check(folder, are_mixed))


def _quietly(what: Callable):
    with redirect_stdout(StringIO()):  # other findings say what it prints
        return what()
