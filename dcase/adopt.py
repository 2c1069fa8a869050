"""Make a data folder of recordings of your own: copies of the sound files, and lists with a test part.

    python -m dcase.adopt recordings/ --out DIR           # recordings/<scene>/*.wav, or <scene>/<place>/*.wav
    python -m dcase.adopt recordings/list.csv --out DIR   # filename,scene_label[,identifier][,source_label]

A place is where a recording was made. Clips of one place sound alike, so all of them go into the training part, or all
into the test part. Give each place a subfolder or, in a list, an identifier; source_label is the recording device. For
recordings without a place, file names decide: those that differ only in a number at their end (hall-1.wav, hall-2.wav)
are of one place, where each scene then has three places at least; otherwise each recording is a place of its own. The
result depends only on the names, and the recordings stay as they are.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import soundfile
import tyro

from dcase.cli import parse
from dcase.data.labels import LABELS_JSON, Labels
from dcase.data.sound import is_sound, passed_over
from dcase.data.synth import new_folder
from dcase.data.tau22 import Clips, leaves_folder, split_by_location
from dcase.errors import UserError, check_range, command, one_line, run
from dcase.files import regular, write_json
from dcase.progress import progress
from dcase.report import markdown

COLUMNS = ("filename", "scene_label", "identifier", "source_label")
FEWEST = 3  # places of a scene: to train on, to choose the best epoch on, to test on


@dataclass(frozen=True)
class AdoptConfig:
    recordings: Annotated[str, tyro.conf.Positional] = ""
    """Folder with a subfolder of recordings for each scene, or a comma- or tab-separated list in their folder."""
    out: str = ""
    """Data folder to make."""
    devices: str = "own"
    """Names of the recording devices, separated by commas. Of several, each file's name or folder has one:
    hall-1-phone.wav or phone/hall-1.wav. A list names them itself."""
    test_fraction: float = 0.25
    """Part of each scene's recordings to test on, by whole places (0 to 1)."""

    def __post_init__(self):
        if not self.recordings or not self.out:
            raise UserError("which recordings, and where to? Give their folder or a list of them, and --out DIR")
        check_range(self, "test_fraction", above=0, below=1)


def of_folder(folder: Path, devices: Sequence[str]) -> pd.DataFrame:
    """Return the recordings <scene>/[<place>/]*.wav in a folder as rows of meta.csv; a place may be "".

    Raises `UserError` where there is none, and where a name has none or several of the devices.
    """
    rows, others = [], []
    for path in (path for path in sorted(folder.rglob("*")) if not path.is_dir()):
        *parents, name = path.relative_to(folder).parts
        if not parents or not is_sound(name) or not path.is_file():
            others.append("/".join((*parents, name)))
            continue
        scene, *places = parents
        named = [one for one in devices if len(devices) == 1 or one in (*_words(name), *places)]
        if len(named) != 1:
            raise UserError(f"{path}: which of --devices {','.join(devices)} is it? Its name or folder must have one")
        place = "/".join(part for part in places if part not in devices)
        place = place and f"{scene}-{place}"  # the place1 of a kitchen is not that of a garden
        rows.append(("/".join((*parents, name)), scene, place, named[0]))
    if others:
        print(passed_over(others, "<scene>/*.wav, .flac, .mp3 ..."))
    if not rows:
        raise UserError(f"{folder} has no recordings <scene>/*.wav: check the folder, or give a list")
    return pd.DataFrame(rows, columns=COLUMNS)


def of_list(path: Path) -> pd.DataFrame:
    """Return the recordings of a list as rows of meta.csv; a place may be "". Raises `UserError` for a bad list."""
    try:
        separator = "\t" if "\t" in regular(path).read_text("utf-8-sig").partition("\n")[0] else ","
        table = pd.read_csv(path, sep=separator, dtype=str, na_filter=False, encoding="utf-8-sig")
        table = table[list(COLUMNS[:2])].join(table.reindex(columns=COLUMNS[2:], fill_value=""))
        lost = [x for x in table["filename"] if leaves_folder(x) or not (path.parent / x).is_file()]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no list of {', '.join(COLUMNS)} ({one_line(error)})") from error
    if lost:
        raise UserError(f"{path}: {len(lost):,} of its {len(table):,} files are not in {path.parent}, as {lost[0]!r}")
    if table.empty or table["filename"].duplicated().any():
        raise UserError(f"{path} lists no file, or one of them twice")
    return table.replace({"source_label": {"": AdoptConfig.devices}})


def with_places(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with an identifier for each, and print how it was found where none was given."""
    scene, unknown = table["scene_label"], table["identifier"] == ""
    devices = set(table["source_label"])
    stem = table["filename"].map(lambda name: "-".join(word for word in _words(name) if word not in devices))
    begin = stem.str.replace(r"-*\d+$", "", regex=True)
    if unknown.any():
        together = begin[unknown].groupby(scene[unknown]).nunique().min() >= FEWEST
        stem = begin if together else stem
        how = (
            "files whose names differ in the last number only are of one place"
            if together
            else "each is one of its own"
        )
        print(f"recordings without a place: {unknown.sum():,}, so {how}; subfolders <scene>/<place>/ would say more")
    return table.assign(identifier=table["identifier"].where(~unknown, scene + "-" + stem))


def _words(name: str) -> list[str]:
    return re.split(r"[-_ ]", Path(name).stem)


def split(table: pd.DataFrame, fraction: float, what: str) -> tuple[Clips, Clips]:
    """Return (training, test) by places. Raises `UserError`, naming ``what``, where a scene has too few."""
    scenes, devices = (sorted(set(table[column])) for column in ("scene_label", "source_label"))
    labels = Labels.from_plain({"scenes": scenes, "devices": devices}, what)
    names, places = (np.array([name.encode() for name in table[column]]) for column in ("filename", "identifier"))
    scene, device = table["scene_label"].map(scenes.index), table["source_label"].map(devices.index)
    try:
        parts = split_by_location(Clips(Path(), names, scene.to_numpy(), device.to_numpy(), places, labels), fraction)
    except UserError as error:
        few = str(error).partition(" to hold one out")[0]
        raise UserError(f"{what}: {few} for a test: record at one more place at least") from error
    seen = {devices[number] for number in parts[0].device}
    groups = {"seen": sorted(seen), "unseen": sorted(set(devices) - seen)}
    labels = Labels.from_plain(labels.plain() | {"device_groups": groups}, what)
    return tuple(replace(part, labels=labels) for part in parts)


def counts(training: Clips, test: Clips) -> str:
    """Return a table of the recordings and places of each scene and device."""
    rows = []
    for kind, names in (("scene", training.labels.scenes), ("device", training.labels.devices)):
        for number, name in enumerate(names):
            parts = [part.select(getattr(part, kind) == number) for part in (training, test)]
            cells = (f"{len(part):,} ({len(set(part.location.tolist())):,})" for part in parts)
            rows.append([f"{kind} {name}", *cells])
    return markdown(["Recordings (Places)", "Training", "Test"], rows)


def main() -> None:
    config = parse(AdoptConfig, __doc__)
    given, out = Path(config.recordings).expanduser(), Path(config.out).expanduser()
    table = of_folder(given, config.devices.split(",")) if given.is_dir() else of_list(given)
    for name in table.to_numpy().ravel():
        if not name.isprintable() or leaves_folder(name):
            raise UserError(f"{given}: {name!r} cannot be written into a list: give it another name")
    table = with_places(table)
    training, test = split(table, config.test_fraction, str(given))
    with new_folder(out, "data folder", "--out") as folder:
        for name in progress(table["filename"], desc="copying", unit="file"):
            (folder / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((given if given.is_dir() else given.parent) / name, folder / "audio" / name)
        write_json(folder / LABELS_JSON, training.labels.plain())
        is_test = table["filename"].isin([test.name(i) for i in range(len(test))])
        table["filename"] = "audio/" + table["filename"]
        (folder / "split_setup").mkdir()
        two = table[list(COLUMNS[:2])]
        for name, rows in {
            "meta": table,
            "split_setup/split25": two[~is_test],
            "split_setup/test": two[is_test],
        }.items():
            lines = ["\t".join(row) + "\n" for row in [list(rows), *rows.values.tolist()]]
            (folder / f"{name}.csv").write_text("".join(lines), encoding="utf-8")
    several, more = len(_lengths(out)) > 1, []
    try:
        split_by_location(training, 0.1)
    except UserError:
        more = ["--val_fraction", "0"]
        print("a scene has no place to spare for validation: the last epoch's model is kept (--val_fraction 0)")
    print(f"\n{counts(training, test)}\n\n{out}: a data folder of {len(table):,} recordings")
    print(f"check: {command('python', '-m', 'dcase.doctor', '--dataset_dir', out)}")
    if several:
        print("the recordings have several lengths: the doctor says how to train on them, with all flags")
    else:
        print(f"next: {command('python', 'train_base.py', '--dataset_dir', out, '--model', 'aum_nano', *more)}")


def _lengths(folder: Path) -> set[float]:
    """Return the lengths of the recordings, s; those that cannot be read are left to the doctor."""
    lengths = set()
    for path in (folder / "audio").rglob("*"):
        with suppress(soundfile.SoundFileError, TypeError):  # TypeError: soundfile's, for a name in .raw
            if path.is_file():
                lengths.add(round(soundfile.info(path).duration, 3))
    return lengths - {0.0}


if __name__ == "__main__":
    run(main)
