"""Name the scenes of recordings: files, folders, or a list such as the challenge's.

    python -m dcase.predict street.wav park.flac --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt
    python -m dcase.predict recordings/ --ckpt_path FOLDER --out scenes.csv                 # of dcase.publish
    python -m dcase.predict /data/evaluation --list fold1_test.csv --ckpt_path FOLDER --out scenes.json

WAV, FLAC and OGG files of any rate, length and number of channels. A recording that is longer than the model's training
clips is heard in windows of their length, and the windows' probabilities are averaged; the last window ends with the
recording. A shorter one is repeated until it fills a window, since zeros sound like no scene at all; a model trained
with --target_length hears it padded, as it heard its training clips. A file that cannot be read is reported and
skipped, and the exit code is then 2.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from aum.allocator import keep_freed_memory
from dcase.cli import parse
from dcase.data.tau22 import DEVICES, SCENES, leaves_folder
from dcase.deployment.prediction import UNKNOWN, Prediction, Recording, Skipped, load_module, predict, span_of_module
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress
from dcase.report import markdown
from dcase.training.lit import SceneClassifier

ENDINGS = (".wav", ".flac", ".ogg")
TOP = 3  # scenes that are named
SHOWN = 40  # rows on the terminal where --out has them all
MANY = 20  # files from which on a progress bar is shown
# airport-lisbon-1000-40000-0-a: scene, city, location, segments, device
_TAU_NAME = re.compile(rf"(?:{'|'.join(SCENES)})-[a-z]+-\d+-\d+(?:-\d+)?-({'|'.join(DEVICES)})")


@dataclass(frozen=True)
class PredictConfig:
    """Raises `UserError` for a value that makes no sense."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """sound files, and folders, which are searched through all their levels for .wav, .flac and .ogg files"""
    ckpt_path: str = ""
    """checkpoint of either stage, stored model or published folder: whatever test_only.py takes"""
    device_id: str = "auto"
    """device that recorded: a, b, c, s1 ... s6, or unknown, which is the general model's; auto: from names like TAU22's
    (airport-lisbon-1000-40000-0-a.wav), unknown for others. It matters only where devices have models of their own"""
    list: str = ""
    """tab-separated list with the columns filename and, where there is one, device_id: only its files in the folder are
    read, and its devices count where --device_id is auto"""
    overlap: float = 0.0
    """share of a window that the next one hears again, 0 to below 1"""
    out: str = ""
    """file to write all probabilities to, by its ending .csv or .json"""
    batch_size: int = 64
    """windows in a batch"""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU where there is one"""

    def __post_init__(self):
        if self.device_id not in ("auto", UNKNOWN, *DEVICES):
            raise UserError(f"--device_id is auto, {UNKNOWN}, or one of {', '.join(DEVICES)}; got {self.device_id!r}")
        if not 0 <= self.overlap < 1:
            raise UserError(f"--overlap is at least 0 and below 1; got {self.overlap}")
        if self.out and Path(self.out).suffix.lower() not in WRITERS:
            raise UserError(f"--out ends in {' or '.join(WRITERS)}; got {self.out}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is at least 1; got {self.batch_size}")


# Which files


def find_recordings(config: PredictConfig) -> list[Recording]:
    """Those of --list, or of the paths given, each once. Raises `UserError` where there is none."""
    if config.list:
        return _listed(config)
    paths = [path for given in config.paths for path in _files(Path(given).expanduser())]
    if not paths:
        where = ", ".join(config.paths)
        raise UserError(
            f"{where} holds no .wav, .flac or .ogg file: check the folder"
            if where
            else "which recordings? Give files or folders"
        )
    return [Recording(path, _device_of(path, config.device_id)) for path in dict.fromkeys(paths)]


def _files(path: Path) -> Iterator[Path]:
    """A file itself, whatever its name, or the sound files of a folder, sorted, hidden ones left out."""
    if not path.is_dir():
        yield path  # one that does not exist is skipped like one that cannot be read
        return
    for folder, names, files in os.walk(path, onerror=_refuse_folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                yield Path(folder) / name


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): check its rights") from error


def _device_of(path: Path, device_id: str) -> str:
    if device_id != "auto":
        return device_id
    found = _TAU_NAME.fullmatch(path.stem)
    return found[1] if found else UNKNOWN


def _listed(config: PredictConfig) -> list[Recording]:
    if len(config.paths) != 1:
        raise UserError("--list needs one folder, in which its files are: give that alone")
    path, folder = Path(config.list).expanduser(), Path(config.paths[0]).expanduser()
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    except OSError as error:
        raise UserError(f"--list {path} cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"--list {path} is no tab-separated text") from error
    if not rows or not all(row.get("filename") for row in rows):
        raise UserError(
            f"--list {path} has no file, or a line without one: its first line must be filename TAB device_id"
        )
    recordings = []
    for row in rows:
        if leaves_folder(row["filename"]):
            raise UserError(f"--list {path}: {row['filename']!r} leaves the folder {folder}")
        listed = config.device_id if config.device_id != "auto" else row.get("device_id")
        recordings.append(Recording(folder / row["filename"], listed or _device_of(Path(row["filename"]), "auto")))
    return recordings


# What comes out


def table(predictions: list[Prediction]) -> str:
    """Markdown that also lines up on a terminal: file, scene, its probability in percent, second and third scene."""
    rows = []
    for one in predictions:
        (scene, probability), *others = one.best(TOP)
        named = [f"{other} {100 * share:.1f}" for other, share in others]
        rows.append([_shown(one.recording.path), scene, f"{100 * probability:.1f}", *named])
    return markdown(["File", "Scene", "%", "Second", "Third"], rows)


def _shown(path: Path) -> str:
    return os.fsencode(path).decode(errors="replace")  # a name need not be text


def write_csv(path: Path, predictions: list[Prediction], skipped: list[Skipped]) -> None:
    """A row per recording; what was skipped is not in it."""
    top = [column for n in range(1, TOP + 1) for column in (f"scene_{n}", f"probability_{n}")]

    def write(beside: Path) -> None:
        with open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *top, *SCENES, "seconds", "device_id", "windows"])
            for one in predictions:
                best = [value for pair in one.best(TOP) for value in pair]
                last = [one.seconds, one.recording.device_id, one.n_windows]
                writer.writerow([one.recording.path, *best, *one.probabilities, *last])

    replace_file(path, write)


def write_json(path: Path, predictions: list[Prediction], skipped: list[Skipped]) -> None:
    """{"predictions": [...], "skipped": [...]}, a line per recording."""

    def write(beside: Path) -> None:
        with open(beside, "w", encoding="utf-8") as file:
            file.write('{"predictions": [')
            _write_lines(file, map(_as_plain, predictions))
            file.write('],\n"skipped": [')
            _write_lines(file, ({"file": str(one.recording.path), "reason": one.reason} for one in skipped))
            file.write("]}\n")

    replace_file(path, write)


def _as_plain(one: Prediction) -> dict:
    return {
        "file": str(one.recording.path),
        "top": [{"scene": scene, "probability": probability} for scene, probability in one.best(TOP)],
        "probabilities": dict(zip(SCENES, one.probabilities, strict=True)),
        "seconds": one.seconds,
        "device_id": one.recording.device_id,
        "windows": one.n_windows,
    }


def _write_lines(file, items: Iterator[dict]) -> None:
    for n, item in enumerate(items):
        file.write(f"{',' if n else ''}\n{json.dumps(item, allow_nan=False)}")


WRITERS = {".csv": write_csv, ".json": write_json}  # by the ending of --out


def _place(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no GPU here; use cpu or auto")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def hear(
    module: SceneClassifier, recordings: list[Recording], config: PredictConfig
) -> tuple[list[Prediction], list[Skipped]]:
    """All predictions, and what was skipped, which is reported on stderr at once; with a progress bar."""
    predictions, skipped = [], []
    with progress(total=len(recordings), desc="predicting", unit=" files", disable=len(recordings) < MANY) as bar:
        for one in predict(module, recordings, config.batch_size, config.overlap):
            if isinstance(one, Skipped):
                skipped.append(one)
                bar.write(f"skipped: {one.reason.encode(errors='replace').decode()}", file=sys.stderr)
            else:
                predictions.append(one)
            bar.update()
    return predictions, skipped


def main() -> None:
    config = parse(PredictConfig, __doc__)
    if not config.ckpt_path:
        raise UserError("--ckpt_path is missing: give a checkpoint, or the folder of a stored or published model")
    where = _place(config.accelerator)
    recordings = find_recordings(config)
    module = load_module(config.ckpt_path).to(where)
    if where.type == "cpu":
        keep_freed_memory()
    span, rate = span_of_module(module), module.logmel.orig_sample_rate
    seconds = span.window / rate
    own = ", ".join(module.device_models) or "none"
    print(f"{module.config.model.model}: windows of {seconds:.2f} s; devices with a model of their own: {own}")
    predictions, skipped = hear(module, recordings, config)
    rows = predictions[:SHOWN] if config.out else predictions
    if rows:
        print("\n" + table(rows))
    if len(rows) < len(predictions):
        print(f"... and {len(predictions) - len(rows):,} more")
    if config.out:
        WRITERS[Path(config.out).suffix.lower()](Path(config.out).expanduser(), predictions, skipped)
        print(f"\n{len(predictions):,} recordings: {config.out}")
    if repeated := [one for one in predictions if one.is_repeated]:
        names = ", ".join(_shown(one.recording.path) for one in repeated[:3]) + (", ..." if len(repeated) > 3 else "")
        print(
            f"WARNING: shorter than the {span.least / rate:.2f} s that the model needs, and repeated to fill them: "
            f"{names} (recordings: {len(repeated):,})",
            file=sys.stderr,
        )
    if padded := sum(not one.is_repeated and one.seconds < seconds for one in predictions):
        print(f"\nshorter than {seconds:.2f} s, and padded, as by --target_length in training: {padded:,} recordings")
    if skipped:
        raise UserError(f"{len(skipped):,} of {len(recordings):,} files were skipped; the lines above say why")


if __name__ == "__main__":
    run(main)
