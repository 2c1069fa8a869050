"""Name the scenes of recordings: files, folders, or a list such as the challenge's.

    python -m dcase.predict street.wav park.flac --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt
    python -m dcase.predict recordings/ --ckpt_path FOLDER --out scenes.csv                 # of dcase.publish
    python -m dcase.predict /data/evaluation --list fold1_test.csv --ckpt_path FOLDER --out scenes.json
    python -m dcase.predict recordings/ --ckpt_path FOLDER --embeddings vectors.npz
    arecord -f S16_LE -r 44100 -c 1 | python -m dcase.predict - --ckpt_path FOLDER          # live

Recordings are WAV, FLAC, OGG, MP3 or AIFF files, or whatever else libsndfile reads, of any rate, length and number of
channels. One that is longer than the model's training clips is cut into windows of their length, and the probabilities
of the windows are averaged; the last window ends with the recording. A shorter one is repeated until it fills a window,
since silence is no scene; a model trained with --target_length reads it padded, and one trained with --batch_lengths at
its own length, as they read their training clips. A file that cannot be read is reported and skipped, and the exit code
is then 2. Ctrl-C keeps what is predicted until then, in scenes.partial.csv for --out scenes.csv. With - in place of
files, sound is read from standard input as it comes. A window begins at least once a second, and each makes a line:
where it ends, its scenes, and those of the mean over the last seconds. At the end of the input, or after Ctrl-C, the
mean over all windows is printed; --out has a row for each window.
"""

import csv
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from aum.allocator import keep_freed_memory
from dcase.cli import parse
from dcase.data.labels import TAU22_LABELS, Labels
from dcase.data.pcm import PcmStream
from dcase.data.sound import MOST_HZ, is_sound, passed_over
from dcase.data.tau22 import leaves_folder
from dcase.deployment import prediction
from dcase.deployment.prediction import UNKNOWN, Prediction, Recording, Skipped, load_module, predict, span_of_module
from dcase.errors import UserError, check_range, printable, run
from dcase.files import regular, replace_file
from dcase.progress import progress
from dcase.report import markdown
from dcase.training.lit import SceneClassifier

TOP = 3  # scenes that are named
SHOWN = 40  # rows on the terminal where --out has all of them
MOST_OVERLAP = 0.99  # reads every sample a hundred times
MANY = 20  # files from which on a progress bar is shown
BEHIND = 2  # seconds from which on it is said


@dataclass(frozen=True)
class PredictConfig:
    """Raises `UserError` for a value out of range."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Sound files, and folders, whose sound files (.wav, .flac, .ogg, .mp3, .aiff ...) are read at every level; or -
    alone: PCM from standard input."""
    ckpt_path: str = ""
    """Checkpoint of either stage, stored model or published folder, as test_only.py takes it."""
    device_id: str = "auto"
    """Device that recorded: a, b, c, s1 ... s6 or one of your own, or unknown for the general model. auto: read it from
    names like TAU22's (airport-lisbon-1000-40000-0-a.wav); other names are unknown. It matters only where devices have
    models."""
    list: str = ""
    """Tab-separated list with the column filename and optionally device_id: read only its files in the folder, with its
    devices where --device_id is auto."""
    overlap: float = 0.0
    """Share of a window that the next window reads again, 0 to 0.99."""
    out: str = ""
    """File to write all probabilities to; its ending, .csv or .json, sets the format."""
    embeddings: str = ""
    """Instead of --out: .npz file for a vector of each recording, the mean over its windows of what the model's last
    layers classify. Device models have spaces of their own: --device_id unknown takes the general model for all."""
    batch_size: int = 64
    """Windows in a batch."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to calculate; auto: on a GPU where there is one."""
    pcm: Literal["s16le", "s24le", "s32le", "f32le"] = "s16le"
    """With -: its samples, integers or float32, little-endian (arecord -f S16_LE, S24_3LE, S32_LE, FLOAT_LE). Where the
    input begins with a WAV header, as arecord's does, that tells --pcm, --rate and --channels."""
    rate: int = 44100
    """With -: its sampling rate, Hz."""
    channels: int = 1
    """With -: its number of channels; their mean is taken."""
    average: float = 10.0
    """With -: seconds of sound whose windows the running average of a line is the mean of."""

    def __post_init__(self):
        check_range(self, "overlap", least=0, most=MOST_OVERLAP)
        for flag, endings in (("out", (".csv", ".json")), ("embeddings", (".npz",))):
            file = getattr(self, flag)
            if file and Path(file).suffix.lower() not in endings:
                raise UserError(f"--{flag} ends in {' or '.join(endings)}; got {file}")
        if self.out and self.embeddings:
            raise UserError("give --out or --embeddings: the .npz file has the probabilities, too")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is at least 1; got {self.batch_size}")
        check_range(self, "rate", least=1, most=MOST_HZ)
        check_range(self, "channels", least=1, most=256)
        check_range(self, "average", above=0, most=86400)
        if self.is_live and len(self.paths) > 1:
            raise UserError("- is standard input, and is read alone: leave out the other files, or -")
        for flag in ("list", "embeddings", "batch_size") if self.is_live else ("pcm", "rate", "channels", "average"):
            if getattr(self, flag) != getattr(PredictConfig, flag):
                of = "files, and - is standard input" if self.is_live else "standard input, - in place of files"
                raise UserError(f"--{flag} is of {of}: leave it out")

    @property
    def is_live(self) -> bool:
        return "-" in self.paths


def find_recordings(config: PredictConfig, labels: Labels = TAU22_LABELS) -> list[Recording]:
    """Return the recordings of --list, or of the paths, each once. Raises `UserError` where there is none, and where
    --device_id is none of the model's devices."""
    if config.device_id not in ("auto", UNKNOWN, *labels.devices):
        known = ", ".join(labels.devices)
        raise UserError(f"--device_id is auto, {UNKNOWN}, or one of {known}; got {config.device_id!r}")
    if config.is_live:
        return [Recording(Path("-"), _device_of(Path("-"), config.device_id, labels))]
    if config.list:
        return _listed(config, labels)
    paths = [path for given in config.paths for path in _files(Path(given).expanduser())]
    if not paths:
        where = ", ".join(config.paths)
        none = "which recordings? Give files or folders"
        raise UserError(f"{where} holds no sound file (.wav, .flac, .mp3 ...): check the folder" if where else none)
    return [Recording(path, _device_of(path, config.device_id, labels)) for path in dict.fromkeys(paths)]


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
        if not files and not names and is_sound(Path(folder).name):
            yield Path(folder)  # to be skipped: it was taken for a file
    if others:
        print(passed_over(others))


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): check its rights") from error


def _device_of(path: Path, device_id: str, labels: Labels) -> str:
    if device_id != "auto":
        return device_id
    # airport-lisbon-1000-40000-0-a: scene, city, location, segments, device
    scenes, devices = ("|".join(map(re.escape, names)) for names in (labels.scenes, labels.devices))
    found = re.fullmatch(rf"(?:{scenes})-[a-z]+-\d+-\d+(?:-\d+)?-({devices})", path.stem)
    return found[1] if found else UNKNOWN


def _listed(config: PredictConfig, labels: Labels) -> list[Recording]:
    if len(config.paths) != 1:
        raise UserError("--list needs one folder that holds its files, and no other path")
    path, folder = Path(config.list).expanduser(), Path(config.paths[0]).expanduser()
    try:
        rows = list(
            csv.DictReader(regular(path).read_text("utf-8-sig").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        )
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
        Recording(folder / name, device_id or _device_of(Path(name), "auto", labels))
        for name, device_id in zip(names, given, strict=True)
    ]


def table(predictions: list[Prediction]) -> str:
    """Return an aligned Markdown table: file, scene, its probability in percent, second and third scene."""
    rows = []
    for one in predictions:
        (scene, probability), *others = one.best(TOP)
        named = [f"{other} {100 * share:.1f}" for other, share in others]
        named += ["-"] * (TOP - 1 - len(named))
        rows.append([printable(one.recording.path), scene, f"{100 * probability:.1f}", *named])
    return markdown(["File", "Scene", "%", "Second", "Third"], rows)


def _write_csv(file: Path, results: Iterable[Prediction | Skipped], scenes: Sequence[str]) -> None:
    """Write a row per prediction, as they come; skipped files are left out."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        named = range(1, min(TOP, len(scenes)) + 1)
        top = [column for n in named for column in (f"scene_{n}", f"probability_{n}")]
        writer.writerow(["file", *top, *scenes, "seconds", "device_id", "windows"])
        for one in results:
            if isinstance(one, Skipped):
                continue
            best = [value for pair in one.best(TOP) for value in pair]
            last = [one.seconds, one.recording.device_id, one.n_windows]
            writer.writerow([one.recording.path, *best, *one.probabilities, *last])


def _write_json(file: Path, results: Iterable[Prediction | Skipped], scenes: Sequence[str]) -> None:
    """Write {"predictions": [...], "skipped": [...]}, a line per recording, as they come; whole after a Ctrl-C too."""
    skipped = []

    def line(content: dict) -> str:
        return f"\n{json.dumps(content, allow_nan=False)}"

    with open(file, "w", encoding="utf-8") as opened:
        opened.write('{"predictions": [')
        comma = ""
        try:
            for one in results:
                if isinstance(one, Skipped):
                    skipped.append(line({"file": str(one.recording.path), "reason": one.reason}))
                    continue
                top = [{"scene": scene, "probability": probability} for scene, probability in one.best(TOP)]
                content = {
                    "file": str(one.recording.path),
                    "top": top,
                    "probabilities": dict(zip(scenes, one.probabilities, strict=True)),
                    "seconds": one.seconds,
                    "device_id": one.recording.device_id,
                    "windows": one.n_windows,
                }
                opened.write(comma + line(content))
                comma = ","
        finally:
            opened.write(f'],\n"skipped": [{",".join(skipped)}]}}\n')


def _write_npz(file: Path, results: Iterable[Prediction | Skipped], scenes: Sequence[str]) -> None:
    """Write arrays for `numpy.load`: embeddings (n, width) and probabilities (n, scenes), float32, and the names files
    (n,), device_ids (n,), scenes. Rows wait in a file until their number is known; whole after a Ctrl-C too."""
    names: list[tuple[str, str]] = []
    width = len(scenes)
    with TemporaryFile(dir=file.parent) as rows:
        try:
            for one in results:
                if isinstance(one, Prediction):
                    row = np.array([*one.probabilities, *one.embedding], np.float32)
                    width = len(row)
                    rows.write(row.tobytes())
                    names.append((str(one.recording.path), one.recording.device_id))
        finally:
            rows.flush()
            shape = len(names), width
            values = np.memmap(rows, np.float32, "r", shape=shape) if names else np.zeros(shape, np.float32)
            files, device_ids = zip(*names, strict=True) if names else ((), ())
            text = {"files": files, "device_ids": device_ids, "scenes": scenes}
            arrays = {name: np.array(column, str) for name, column in text.items()}
            with open(file, "wb") as opened:  # to a name, numpy would add .npz
                np.savez(opened, embeddings=values[:, len(scenes) :], probabilities=values[:, : len(scenes)], **arrays)


WRITERS = {".csv": _write_csv, ".json": _write_json, ".npz": _write_npz}  # by the file's ending


@dataclass
class Summary:
    """What is printed at the end. With a file, results are written as they come, and only the first ones are held."""

    most: float  # rows to hold
    seconds: float  # of a window
    rows: list[Prediction] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # names
    n_predicted: int = 0
    n_padded: int = 0
    n_skipped: int = 0
    end: BaseException | None = None  # what ended standard input, but for its end

    def add(self, one: Prediction) -> None:
        self.n_predicted += 1
        if len(self.rows) < self.most:
            self.rows.append(one)
        if one.is_repeated:
            self.repeated.append(printable(one.recording.path))
        elif one.seconds < self.seconds:
            self.n_padded += 1


def _results(
    module: SceneClassifier, recordings: list[Recording], config: PredictConfig, summary: Summary
) -> Iterator[Prediction | Skipped]:
    """Yield the results, with a progress bar; skipped files are reported on stderr at once.

    Raises `UserError`, naming the checkpoint, where the model's output is not finite.
    """
    if config.is_live:
        found = _live(module, recordings[0], config, summary)
    else:
        found = predict(module, recordings, config.batch_size, config.overlap, bool(config.embeddings))
    with progress(total=len(recordings), desc="predicting", unit=" files", disable=len(recordings) < MANY) as bar:
        try:
            for one in found:
                if isinstance(one, Skipped):
                    summary.n_skipped += 1
                    bar.write(f"skipped: {printable(one.reason)}", file=sys.stderr)
                else:
                    summary.add(one)
                yield one
                bar.update()
        except FloatingPointError as error:
            what = "its weights are damaged, or too large; take another checkpoint"
            raise UserError(f"--ckpt_path {config.ckpt_path}: {printable(error)}: {what}") from error


def _named(one: Prediction) -> str:
    return ", ".join(f"{scene} {100 * share:.1f} %" for scene, share in one.best(2))


def _live(
    module: SceneClassifier, recording: Recording, config: PredictConfig, summary: Summary
) -> Iterator[Prediction]:
    """Yield a prediction of each window of standard input and print its line; at the end, print the mean over all.

    A Ctrl-C or an error after the first window is kept in ``summary``: --out is written whole, like at another end.
    """
    rate, window = module.logmel.orig_sample_rate, span_of_module(module).window
    hop = min(rate, max(1, round(window * (1 - config.overlap))))
    last = deque(maxlen=max(1, round(config.average * rate / hop)))
    n, total = 0, 0.0  # of windows
    done = busy = behind = 0.0  # seconds: of sound, of computing, of sound that waits
    try:
        stream = PcmStream(sys.stdin.fileno(), config.pcm, config.rate, config.channels)
        print(f"{stream}: a line every {hop / rate:.2f} s", flush=True)
        start = time.monotonic() - stream.waited
        for one in prediction.predict_live(module, stream.pieces(rate), recording, hop):
            yield one  # first: a line that is seen is in --out, too
            n, total = n + 1, total + np.array(one.probabilities)
            last.append(one.probabilities)
            mean = _named(replace(one, probabilities=tuple(np.mean(last, 0))))
            span = f"mean of {len(last) * hop / rate:.1f} s"
            print(f"{one.seconds:9.2f} s  {_named(one):<44} | {span}: {mean}", flush=True)
            now = time.monotonic() - start - stream.waited
            if n > 1 and behind <= BEHIND:  # the first window warms up; it is said once
                behind = max(0.0, behind + now - busy - (one.seconds - done))
                if behind > BEHIND:
                    slow = f"slower than the sound comes: {behind:.1f} s behind at {one.seconds:.1f} s"
                    print(f"WARNING: {slow}, and recorders lose sound; take a faster model", file=sys.stderr)
            busy, done = now, one.seconds
        if n > 1 and (round(one.seconds * rate) - window) % hop:
            print("the input ended within a window: the last line is of its end")
        if stream.held:
            print(f"the input ended within a sample: {len(stream.held)} bytes are left out")
    except (KeyboardInterrupt, OSError, UserError) as error:
        if not n:
            raise
        summary.end = error
    with suppress(BrokenPipeError):
        mean = _named(replace(one, probabilities=tuple(total / n)))
        print(f"mean over {one.seconds:.2f} s, {n:,} windows: {mean}", flush=True)


def _write(path: Path, results: Iterable[Prediction | Skipped], scenes: Sequence[str]) -> None:
    """Write the results as they come, beside ``path``, which is replaced at the end; after a Ctrl-C, what there is goes
    to a file of another name."""

    def write(beside: Path) -> None:
        try:
            WRITERS[path.suffix.lower()](beside, results, scenes)
        except KeyboardInterrupt:
            partial = path.with_name(f"{path.stem}.partial{path.suffix}")
            os.replace(beside, partial)
            raise KeyboardInterrupt(f"stopped by the keyboard; what was predicted is in {partial}") from None

    replace_file(path, write)


def main() -> None:
    config = parse(PredictConfig, __doc__)
    if not config.ckpt_path:
        raise UserError("--ckpt_path is missing: give a checkpoint, or the folder of a stored or published model")
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch finds no GPU here; use cpu or auto")
    if config.is_live and (sys.stdin is None or sys.stdin.isatty()):
        how = "arecord -f S16_LE -r 44100 -c 1 | python -m dcase.predict - --ckpt_path ..."
        raise UserError(f"- reads sound from a pipe, and standard input is none: {how}")
    where = "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"
    module = load_module(config.ckpt_path).to(where)
    recordings = find_recordings(config, module.labels)
    if where == "cpu":
        keep_freed_memory()
    span, rate = span_of_module(module), module.logmel.orig_sample_rate
    seconds = span.window / rate
    own = ", ".join(module.device_models) or "none"
    print(
        f"{module.config.model.model}: windows of {seconds:.2f} s; devices with a model of their own: {own}", flush=True
    )
    nobody_tells = config.device_id == "auto" and all(one.device_id == UNKNOWN for one in recordings)
    if module.device_models and nobody_tells:
        print("no name tells the device, so the general model predicts all; --device_id or --list name devices")
    out = config.out or config.embeddings
    summary = Summary(0 if config.is_live else SHOWN if out else math.inf, seconds)
    results = _results(module, recordings, config, summary)
    if out:
        _write(Path(out).expanduser(), results, module.labels.scenes)
    else:
        deque(results, maxlen=0)
    if summary.rows:
        print("\n" + table(summary.rows))
    if summary.most and len(summary.rows) < summary.n_predicted:
        print(f"... and {summary.n_predicted - len(summary.rows):,} more")
    if out:
        print(f"\n{summary.n_predicted:,} {'windows' if config.is_live else 'recordings'}: {out}")
    if repeated := summary.repeated:
        names = ", ".join(repeated[:3]) + (", ..." if len(repeated) > 3 else "")
        print(
            f"WARNING: shorter than the {span.least / rate:.2f} s that the model needs, and repeated to fill them: "
            f"{names} (recordings: {len(repeated):,})",
            file=sys.stderr,
        )
    if padded := summary.n_padded:
        as_trained = "padded, as by --target_length in training"
        if module.config.logmel.batch_lengths:
            as_trained = "read at their own length, as by --batch_lengths in training"
        print(f"\nshorter than {seconds:.2f} s, and {as_trained}: {padded:,} recordings")
    if summary.end:
        raise summary.end
    if n := summary.n_skipped:
        raise UserError(f"{n:,} of {len(recordings):,} files were skipped; the lines above say why")


if __name__ == "__main__":
    run(main)
