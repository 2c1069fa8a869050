"""Whether all clips have one length, for `dcase.doctor`: without --target_length training refuses any other one."""

import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import soundfile

from dcase.data.logmel import LogMelConfig
from dcase.data.pack import Pack, Rates
from dcase.data.sound import cut_short
from dcase.data.tau22 import Clips, missing_files
from dcase.doctor.findings import Finding
from dcase.progress import progress

_SECONDS = 10  # for headers: all of TAU22's take about 2 from memory, and may take minutes from a cold disk


def of_pack(splits: Iterable[Clips], pack: Pack, train: str) -> Finding:
    """By a pack's index: of all clips, as training compares them. ``train``: the command that trains on them."""
    found = {}
    for clips in splits:
        names = (name.decode() for name in clips.filenames.tolist())
        found |= zip(names, pack.length[pack.rows(clips.filenames)].tolist(), strict=True)
    return _compared(found, f"all {len(found):,} clips", pack.rates.sample_rate, pack.rates, train)


def of_files(folder: Path, splits: Iterable[Clips], rates: Rates, check: str, train: str) -> list[Finding]:
    """By the headers of the WAV files that are there, as many as can be read in some seconds. Files at fault are a
    finding of their own. ``check``: the command that finds all of those; ``train``: the one that trains on clips."""
    names = list(dict.fromkeys(name.decode() for clips in splits for name in clips.filenames.tolist()))
    missing = set(missing_files(folder, names))
    names = [name for name in names if name not in missing]
    random.Random(0).shuffle(names)  # so that the first ones are of all scenes, devices and splits
    until = time.monotonic() + _SECONDS
    found, at_fault = {}, []
    for name in progress(names, desc="lengths of the clips", unit=" files", leave=False, delay=1):
        try:
            found[name] = _length(folder / name, rates.orig_sample_rate)
        except (soundfile.SoundFileError, OSError, TypeError, ValueError):  # TypeError: soundfile's, for a name in .raw
            at_fault.append(name)
        if time.monotonic() > until:
            break
    looked_at = len(found) + len(at_fault)
    shown = f"{looked_at:,} of {len(names):,} clips, drawn at random"
    shown = f"all {looked_at:,} clips" if looked_at == len(names) else shown
    findings = []
    if at_fault:
        what = f"in {shown}: {len(at_fault):,} unreadable, empty or cut short ({at_fault[0]}, ...)"
        findings.append(Finding("recordings", "FAIL", f"{what}: replace them, or leave them out", check))
    if found:
        findings.append(_compared(found, shown, rates.orig_sample_rate, rates, train))
    return findings


def _length(path: Path, sample_rate: int) -> int:
    """Samples of a sound file when it is resampled, by its header. Raises ValueError where it has none, or fewer."""
    with soundfile.SoundFile(path) as file:
        if not file.frames or cut_short(file):
            raise ValueError
        return -(-file.frames * sample_rate // file.samplerate)


def _compared(found: dict[str, int], shown: str, sample_rate: int, rates: Rates, train: str) -> Finding:
    """``found``: samples at ``sample_rate`` (Hz) of each clip that was looked at; ``shown``: how many these are."""
    usual, n_usual = Counter(found.values()).most_common(1)[0]
    length = f"{usual:,} samples at {sample_rate} Hz ({usual / sample_rate:.4g} s)"
    if n_usual == len(found):
        return Finding("lengths", "ok", f"{length} in {shown}")
    other = next(name for name, n_samples in found.items() if n_samples != usual)
    # `dcase.prepare` refuses to leave out more than half.
    leave = "leave the others out with `python -m dcase.prepare`, " if 2 * n_usual >= len(found) else ""
    what = (
        f"several in {shown}: {len(found) - n_usual:,} have not the most frequent one, {length} ({other} has "
        f"{found[other]:,}). Training refuses that: cut them to one length, {leave}or train with --target_length, "
        "which pads or crops every one"
    )
    frames = 1 + usual * rates.sample_rate // sample_rate // LogMelConfig.hop_length
    return Finding("lengths", "FAIL", what, f"{train} --target_length {frames}")
