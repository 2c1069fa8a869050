"""Name the scenes of recordings: files, folders, or a list such as the challenge's.

    python -m dcase.predict street.wav park.flac --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt
    python -m dcase.predict recordings/ --ckpt_path FOLDER --out scenes.csv                 # of dcase.publish
    python -m dcase.predict /data/evaluation --list fold1_test.csv --ckpt_path FOLDER --out scenes.json

Recordings are WAV, FLAC, OGG, MP3 or AIFF files, or whatever else libsndfile reads, of any rate, length and number of
channels. One that is longer than the model's training clips is cut into windows of their length, and the probabilities
of the windows are averaged; the last window ends with the recording. A shorter one is repeated until it fills a window,
since silence is no scene; a model trained with --target_length reads it padded, as it read its training clips. A file
that cannot be read is reported and skipped, and the exit code is then 2.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from aum.allocator import keep_freed_memory
from dcase.cli import parse
from dcase.data.sound import is_sound, passed_over
from dcase.data.tau22 import DEVICES, SCENES, leaves_folder
from dcase.deployment.prediction import UNKNOWN, Prediction, Recording, Skipped, load_module, predict, span_of_module
from dcase.errors import UserError, run
from dcase.files import replace_file
from dcase.progress import progress
from dcase.report import markdown
from dcase.training.lit import SceneClassifier

TOP = 3  # scenes that are named
SHOWN = 40  # rows on the terminal where --out has all of them
MANY = 20  # files from which on a progress bar is shown
# airport-lisbon-1000-40000-0-a: scene, city, location, segments, device
_TAU_NAME = re.compile(rf"(?:{'|'.join(SCENES)})-[a-z]+-\d+-\d+(?:-\d+)?-({'|'.join(DEVICES)})")


@dataclass(frozen=True)
class PredictConfig:
    """Raises `UserError` for a value out of range."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Sound files, and folders, whose sound files (.wav, .flac, .ogg, .mp3, .aiff ...) are read at every level."""
    ckpt_path: str = ""
    """Checkpoint of either stage, stored model or published folder, as test_only.py takes it."""
    device_id: str = "auto"
    """Device that recorded: a, b, c, s1 ... s6, or unknown for the general model. auto: read it from names like TAU22's
    (airport-lisbon-1000-40000-0-a.wav); other names are unknown. It matters only where devices have models."""
    list: str = ""
    """Tab-separated list with the column filename and optionally device_id: read only its files in the folder, with its
    devices where --device_id is auto."""
    overlap: float = 0.0
    """Share of a window that the next window reads again, 0 to below 1."""
    out: str = ""
    """File to write all probabilities to; its ending, .csv or .json, sets the format."""
    batch_size: int = 64
    """Windows in a batch."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to calculate; auto: on a GPU where there is one."""

    def __post_init__(self):
        if self.device_id not in ("auto", UNKNOWN, *DEVICES):
            raise UserError(f"--device_id is auto, {UNKNOWN}, or one of {', '.join(DEVICES)}; got {self.device_id!r}")
        if not 0 <= self.overlap < 1:
            raise UserError(f"--overlap is at least 0 and below 1; got {self.overlap}")
        if self.out and Path(self.out).suffix.lower() not in WRITERS:
            raise UserError(f"--out ends in {' or '.join(WRITERS)}; got {self.out}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is at least 1; got {self.batch_size}")


def find_recordings(config: PredictConfig) -> list[Recording]:
    """Return the recordings of --list, or of the paths, each once. Raises `UserError` where there is none."""
    if config.list:
        return _listed(config)
    paths = [path for given in config.paths for path in _files(Path(given).expanduser())]
    if not paths:
        where = ", ".join(config.paths)
        none = "which recordings? Give files or folders"
        raise UserError(f"{where} holds no sound file (.wav, .flac, .mp3 ...): check the folder" if where else none)
    return [Recording(path, _device_of(path, config.device_id)) for path in dict.fromkeys(paths)]


def _files(path: Path) -> Iterator[Path]:
    """Yield a file itself, with any name, or a folder's sound files, sorted, without hidden ones."""
    if not path.is_dir():
        yield path  # one that does not exist is skipped like one that cannot be read
        return
    others: list[str] = []
    for folder, names, files in os.walk(path, onerror=_refuse_folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(files) if is_sound(name))
        others += sorted(name for name in files if not is_sound(name))
    if others:
        print(passed_over(others))


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): check its rights") from error


def _device_of(path: Path, device_id: str) -> str:
    if device_id != "auto":
        return device_id
    found = _TAU_NAME.fullmatch(path.stem)
    return found[1] if found else UNKNOWN


def _listed(config: PredictConfig) -> list[Recording]:
    if len(config.paths) != 1:
        raise UserError("--list needs one folder that holds its files, and no other path")
    path, folder = Path(config.list).expanduser(), Path(config.paths[0]).expanduser()
    try:
        rows = list(csv.DictReader(path.read_text("utf-8-sig").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    except OSError as error:
        raise UserError(f"--list {path} cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"--list {path} is no tab-separated text") from error
    names = [row.get("filename") for row in rows]
    if not names or not all(names):
        raise UserError(
            f"--list {path} has no file, or a line without one: its first line must be filename TAB device_id"
        )
    if out := next(filter(leaves_folder, names), None):
        raise UserError(f"--list {path}: {out!r} leaves the folder {folder}")
    given = [config.device_id if config.device_id != "auto" else row.get("device_id") for row in rows]
    return [
        Recording(folder / name, device_id or _device_of(Path(name), "auto"))
        for name, device_id in zip(names, given, strict=True)
    ]


def table(predictions: list[Prediction]) -> str:
    """Return an aligned Markdown table: file, scene, its probability in percent, second and third scene."""
    rows = []
    for one in predictions:
        (scene, probability), *others = one.best(TOP)
        named = [f"{other} {100 * share:.1f}" for other, share in others]
        rows.append([_shown(one.recording.path), scene, f"{100 * probability:.1f}", *named])
    return markdown(["File", "Scene", "%", "Second", "Third"], rows)


def _shown(path: Path) -> str:
    return os.fsencode(path).decode(errors="replace")  # a file's name may be no text


def _write_csv(file: Path, predictions: list[Prediction], skipped: list[Skipped]) -> None:
    """Write a row per prediction; skipped files are left out."""
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        top = [column for n in range(1, TOP + 1) for column in (f"scene_{n}", f"probability_{n}")]
        writer.writerow(["file", *top, *SCENES, "seconds", "device_id", "windows"])
        for one in predictions:
            best = [value for pair in one.best(TOP) for value in pair]
            last = [one.seconds, one.recording.device_id, one.n_windows]
            writer.writerow([one.recording.path, *best, *one.probabilities, *last])


def _write_json(file: Path, predictions: list[Prediction], skipped: list[Skipped]) -> None:
    """Write {"predictions": [...], "skipped": [...]}, a line per recording."""
    predicted = (
        {
            "file": str(one.recording.path),
            "top": [{"scene": scene, "probability": probability} for scene, probability in one.best(TOP)],
            "probabilities": dict(zip(SCENES, one.probabilities, strict=True)),
            "seconds": one.seconds,
            "device_id": one.recording.device_id,
            "windows": one.n_windows,
        }
        for one in predictions
    )
    left_out = ({"file": str(one.recording.path), "reason": one.reason} for one in skipped)

    def lines(items: Iterable[dict]) -> str:
        return ",".join(f"\n{json.dumps(item, allow_nan=False)}" for item in items)

    content = f'{{"predictions": [{lines(predicted)}],\n"skipped": [{lines(left_out)}]}}\n'
    file.write_text(content, encoding="utf-8")


WRITERS = {".csv": _write_csv, ".json": _write_json}  # by the ending of --out


def _predict_all(module: SceneClassifier, recordings: list[Recording], config: PredictConfig) -> tuple[list, list]:
    """Return (predictions, skipped files) with a progress bar; skipped files are reported on stderr at once."""
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
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no GPU here; use cpu or auto")
    where = "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"
    recordings = find_recordings(config)
    module = load_module(config.ckpt_path).to(where)
    if where == "cpu":
        keep_freed_memory()
    span, rate = span_of_module(module), module.logmel.orig_sample_rate
    seconds = span.window / rate
    own = ", ".join(module.device_models) or "none"
    print(f"{module.config.model.model}: windows of {seconds:.2f} s; devices with a model of their own: {own}")
    predictions, skipped = _predict_all(module, recordings, config)
    rows = predictions[:SHOWN] if config.out else predictions
    if rows:
        print("\n" + table(rows))
    if len(rows) < len(predictions):
        print(f"... and {len(predictions) - len(rows):,} more")
    if config.out:
        path = Path(config.out).expanduser()
        replace_file(path, lambda beside: WRITERS[path.suffix.lower()](beside, predictions, skipped))
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
