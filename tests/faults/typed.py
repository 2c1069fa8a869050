"""Files whose values are of a wrong type or size: checkpoints, stored and published models, run files, packs, lists.

    python -m tests.faults.typed                        # 2,000 mutations, about half an hour on one core
    python -m tests.faults.typed --n 100 --seed 7 --only stored

Each mutation changes one value of one file that is otherwise whole (checksums are computed anew), and one command that
reads such a file runs on it, with `SECONDS` of CPU time and `MEMORY`. It must succeed, or refuse the file in one line,
and nothing but what it writes itself may be gone afterwards.
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import test_only
import train_base
import train_device_specific
from dcase import compare, errors, export, predict, prepare, publish, submit
from dcase.cli import parse
from dcase.data import pack
from dcase.data.labels import SCENES
from dcase.doctor import data as doctor_data
from dcase.report import __main__ as report
from dcase.runs import stored
from dcase.runs.checkpoints import save_checkpoint
from dcase.training.lit import SceneClassifier
from tests.data_folder import RATE, SMALL, write_tones
from tests.faults.process import Fault, run
from tests.stored_files import with_device_models

SECONDS, PATIENCE = 10, 300  # of CPU time; of waiting for a command that no signal ends
TOGETHER = 25  # mutations in one process
MEMORY = 3 << 30  # bytes, beyond those that the imports take
LONGEST = 2000  # characters of a clear message
WORKS, CLEAR, UNCLEAR, TRACEBACK, HANG, LOST = OUTCOMES = "works", "clear", "unclear", "traceback", "hang", "lost"
GOOD = WORKS, CLEAR
STEP = SceneClassifier.training_step
_fork = multiprocessing.get_context("fork")

DATA = ["--dataset_dir", "data"]
FIT = "--n_epochs 2 --batch_size 8 --lr 0.01 --warmup_steps 2 --check_val_every_n_epoch 1 --val_fraction 0.5".split()
ONCE = ["--n_epochs", "1", "--num_workers", "0", "--wandb_mode", "disabled", "--accelerator", "cpu"]
TRAIN = [train_base.main, *DATA, "--project_name", "P", *SMALL, *FIT, "--report_audio", "False"]
BEST, DEVICES, STORED = "P/general/checkpoints/best.ckpt", "P/tuned/checkpoints/best.ckpt", "P/tuned/stored"

# ---- mutations of plain values ---------------------------------------------------------------------------------------

_ODD = [
    None, True, -1, 0, 1, 1.5, 10**7, 10**9, 2**70, math.nan, math.inf, -math.inf, "", "12", "x" * 100_000,
    "\x1b[31mred\n\0\r", "../../x", [], {}, [[[[[1]]]]], [None] * 50_000, [1, "a", None], {"a": {"b": None}},
]  # fmt: skip


def mutate(tree: object, rng: random.Random) -> tuple[object, str]:
    """Return a copy of a tree of plain values and tensors with one change, and what was changed."""
    node = top = [copy.deepcopy(tree)]
    key, place = 0, []
    while isinstance(node[key], dict | list) and node[key] and (not place or rng.random() < 0.7):
        node = node[key]
        key = rng.choice([*node] if isinstance(node, dict) else range(len(node)))
        place.append(str(key))
    old, ways = node[key], [_replace, _replace, _replace, _replace]
    if isinstance(node, dict):
        ways += [_remove, _add]
    how = rng.choice(ways)(node, key, old, rng)
    return top[0], f"{'/'.join(place) or 'all of it'} {how}"


def _replace(node, key, old, rng: random.Random) -> str:
    own = [str(old)[:50], [old], {"x": old}]
    if isinstance(old, torch.Tensor):
        own += [old.double(), old.to(torch.int64), old[None], old.reshape(-1)[:0], old.to(torch.complex64)]
        own += [torch.zeros(1).expand(10**12), old.tolist()] * 2
    elif isinstance(old, dict | list):
        own += [list(old), [*old, *old], dict.fromkeys(map(str, old))]
    elif isinstance(old, int | float):
        own += [-old, old + 1, old * 1000, float(old), str(old)]
    node[key] = rng.choice([*_ODD, *own, *own])
    return f"is {type(node[key]).__name__} {str(node[key])[:30]!r}"


def _remove(node: dict, key, old, rng: random.Random) -> str:
    del node[key]
    return "is missing"


def _add(node: dict, key, old, rng: random.Random) -> str:
    node["more"] = rng.choice(_ODD)
    return "has a neighbour more"


_TEXTS = [
    b"", b"null", b"[" * 200_000, b'{"a":' * 200_000, b"NaN", b"1" * 10_000, b"\xff\xfe", b'{"config": {}}', b"\0" * 99
]  # fmt: skip


# ---- kinds of files: (content, random numbers) -> (new content, what was changed) ------------------------------------

Mutation = Callable[[Path, random.Random], str]


def in_json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.1:
        path.write_bytes(text := rng.choice(_TEXTS))
        return f"is {text[:20]!r}"
    tree, how = mutate(json.loads(path.read_text()), rng)
    path.write_text(json.dumps(tree))
    return how


def in_checkpoint(path: Path, rng: random.Random) -> str:
    tree, how = mutate(torch.load(path, weights_only=True), rng)
    torch.save(tree, path)
    return how


def in_stored(path: Path, rng: random.Random) -> str:
    """The header, with a checksum that is right."""
    tensors, header = safetensors.torch.load(path.read_bytes()), stored.load_model(path)[1]
    content = {"format": stored.FORMAT, "crc32": 0, "header": header}
    if rng.random() < 0.9:
        content["header"], how = mutate(header, rng)
        if isinstance(content["header"], dict):
            content["crc32"] = stored._checksum(tensors, content["header"])
    else:
        content, how = mutate(content, rng)
    path.write_bytes(safetensors.torch.save(tensors, {stored.KEY: json.dumps(content)}))
    return how


def in_manifest(path: Path, rng: random.Random) -> str:
    manifest, how = mutate(pack.read_manifest(path.parent), rng)
    if isinstance(manifest, dict):
        manifest["manifest_sha256"] = pack.checksum(manifest)
    path.write_text(json.dumps(manifest))
    return how


def in_arrays(path: Path, rng: random.Random) -> str:
    """Of an .npz; a pack's manifest has the checksum of it."""
    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    old, how = arrays[name], rng.choice(("missing", "objects", "no numbers", "another", "empty", "claims", "odd"))
    arrays[name] = {
        "missing": None,
        "objects": old.astype(object),
        "no numbers": np.full(old.shape, "x"),
        "another": old[..., None],
        "empty": old[:0],
        "claims": old,
        "odd": np.full(old.shape, rng.choice((-1, np.nan, np.inf, 2**62, 1e30, True))),
    }[how]
    with open(path, "wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    if how == "claims":  # a header with more rows than there are bytes
        path.write_bytes(_claiming(path.read_bytes()))
    manifest = path.with_name("manifest.json")
    if manifest.exists():
        content = pack.read_manifest(path.parent) | {"index_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        manifest.write_text(json.dumps(content | {"manifest_sha256": pack.checksum(content)}))
    return f"{path.suffix} {name}: {how}"


def _claiming(content: bytes) -> bytes:
    """Return an .npz whose arrays claim 10**11 rows. Its checksums are wrong; numpy allocates before it reads them."""
    return re.sub(rb"'shape': \((\d+)(.*?)\), \}( +)", lambda found: _shape(*found.groups()), content)


def _shape(rows: bytes, rest: bytes, spaces: bytes) -> bytes:
    claimed = b"1" + b"0" * 11
    return b"'shape': (%s%s), }%s" % (claimed, rest, spaces[len(claimed) - len(rows) :])


def in_tensor(path: Path, rng: random.Random) -> str:
    tree, how = mutate(torch.load(path, weights_only=True), rng)
    torch.save(tree, path)
    return how


_CELLS = [
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0.5",
    "9" * 400,
    "[" * 1000,
    "x" * 100_000,
    "\x1b[31m",
    "é",
    '"',
    "\t",
    ",",
]


def in_table(path: Path, rng: random.Random) -> str:
    separator = "\t" if b"\t" in path.read_bytes() else ","
    if rng.random() < 0.05:
        path.write_bytes(text := rng.choice(_TEXTS))
        return f"is {text[:20]!r}"
    rows = [line.split(separator) for line in path.read_text().splitlines()]
    row, column = rng.randrange(len(rows)) if rng.random() < 0.8 else 0, rng.randrange(len(rows[0]))
    how = rng.choice(
        ("cell", "cell", "cell", "cell", "column missing", "column twice", "column", "row twice", "row short")
    )
    cell = rng.choice(_CELLS)
    if how == "cell":
        rows[row][column] = cell
    elif how == "column":
        rows[1:] = [[*line[:column], cell, *line[column + 1 :]] for line in rows[1:]]
    elif how.startswith("column"):
        rows = [
            [*line[:column], *([line[column]] * 2 if how.endswith("twice") else []), *line[column + 1 :]]
            for line in rows
        ]
    else:
        rows[row : row + 1] = [rows[row]] * 2 if how.endswith("twice") else [rows[row][:column]]
    path.write_text("".join(separator.join(line) + "\n" for line in rows))
    return f"row {row}, column {column}: {how} {cell[:20]!r}"


# ---- the kinds, their files, and the commands that read them ---------------------------------------------------------


def _model(path: str, *names: str) -> dict[str, list]:
    """Return commands that take a model, by name."""
    commands = {
        "test_only": [test_only.main, *DATA, "--project_name", "P", *ONCE[2:], "--report_audio", "False"],
        "predict": [predict.main, "clip.wav", "--out", "x.json"],
        "export": [export.main, *DATA, "--format", "safetensors", "--out", "x.safetensors"],
        "publish": [publish.main, "--out", "new"],
        "submit": [submit.main, "--label", "Doe_Uni", *DATA],
    }
    return {name: [*commands[name], "--ckpt_path", path] for name in names or commands}


def doctor() -> None:
    """Look at the data folder, as dcase.doctor does behind its checks of the machine."""
    print(*doctor_data.places(parse(doctor_data.DoctorConfig, "")), sep="\n")


_REPORT = [report.main, "--project_name", "P", "--report_audio", "False"]
_READ = {
    "report": [*_REPORT, "general"],
    "report of two": [*_REPORT, "other", "general"],
    "compare": [compare.main, "--all", "--project_name", "P", "--csv", "x.csv"],
}
_PAGES = {name: _READ[name] for name in ("report", "report of two")}
_RESUME = {"--resume": [train_base.main, "--resume", "halted", "--project_name", "P", "--accelerator", "cpu"]}
_STAGE_2 = [train_device_specific.main, *DATA, "--project_name", "P", *ONCE, "--only_devices", "a", "--ckpt_id"]
_OF_DATA = {
    "train": TRAIN,
    "prepare": [prepare.main, *DATA, "--orig_sample_rate", RATE, "--num_workers", 0],
    "pack": [prepare.main, *DATA, "--orig_sample_rate", RATE, "--sample_rate", RATE, "--pack", "--num_workers", 0],
    "doctor": [doctor, *DATA, "--orig_sample_rate", RATE, "--sample_rate", RATE],
}


@dataclass(frozen=True)
class Kind:
    files: tuple[str, ...]
    mutation: Mutation
    commands: dict[str, list]


KINDS = {
    "checkpoint": Kind(
        (BEST,),
        in_checkpoint,
        _model(BEST)
        | {
            "stage 2": [*_STAGE_2, "general"],
            "--init_from": [*TRAIN, "--init_from", "general"],
            "--teacher": [*TRAIN, "--teacher", "general"],
            "--pretrained": [*TRAIN, "--pretrained", BEST],
        },
    ),
    "checkpoint, devices": Kind((DEVICES,), in_checkpoint, _model(DEVICES)),
    "checkpoint, interrupted": Kind(("P/halted/checkpoints/last.ckpt",), in_checkpoint, _RESUME),
    "stored model": Kind((f"{STORED}/general.safetensors",), in_stored, _model(STORED)),
    "published model": Kind(
        ("published/general/config.json",), in_json, _model("published", "test_only", "predict", "export")
    ),
    "config.json": Kind(("P/general/config.json",), in_json, _READ | _model(BEST, "test_only", "submit", "publish")),
    "config.json, interrupted": Kind(("P/halted/config.json",), in_json, _RESUME),
    "results.json": Kind(("P/general/results.json",), in_json, _READ | _model(BEST, "submit", "publish")),
    "metrics.csv": Kind(("P/general/metrics.csv",), in_table, _PAGES),
    "predictions.csv": Kind(("P/general/predictions.csv",), in_table, _PAGES),
    "pack": Kind(("data/pack/manifest.json",), in_manifest, {n: _OF_DATA[n] for n in ("train", "pack", "doctor")}),
    "pack, index": Kind(("data/pack/index-*.npz",), in_arrays, {n: _OF_DATA[n] for n in ("train", "pack", "doctor")}),
    "lists": Kind(("data/meta.csv", "data/split_setup/split25.csv", "data/split_setup/test.csv"), in_table, _OF_DATA),
    "logits": Kind(("logits.npz",), in_arrays, {"--teacher": [*TRAIN, "--teacher", "logits.npz"]}),
    "logits, csv": Kind(("logits.csv",), in_table, {"--teacher": [*TRAIN, "--teacher", "logits.csv"]}),
    "logits, pt": Kind(("logits.pt",), in_tensor, {"--teacher": [*TRAIN, "--teacher", "logits.pt"]}),
}  # fmt: skip


def make_world(folder: Path) -> None:
    """Make whole files of every kind: data with a pack, runs, models."""

    def do(command: list, fault: Fault = Fault()) -> None:  # noqa: B008  it is not changed
        done = run(command, folder, fault)
        assert done.code in fault.codes, done

    write_tones(folder / "data", places=(1, 2), n_pieces=1, test_devices=("a", "s4"))
    do([*TRAIN, "--run_id", "general"])
    do([*TRAIN, "--run_id", "other", "--seed", "1"])
    stop = Fault(codes=(128 + signal.SIGTERM,), call=("training_step", 3), instead=_terminated)
    do([*TRAIN, "--run_id", "halted"], stop)
    shutil.copytree(folder / "P/general", folder / "P/tuned")
    checkpoint = with_device_models(folder / BEST, {"a": 0.9, "s1": 1.1}, bits=16)
    save_checkpoint(checkpoint, folder / DEVICES)
    stored.save_stored(checkpoint, folder / STORED, 16)
    do([publish.main, "--ckpt_path", DEVICES, "--out", "published"])
    do(_OF_DATA["pack"])
    shutil.copy(next((folder / "data/audio").iterdir()), folder / "clip.wav")
    names, scenes = np.array(
        [line.split("\t") for line in (folder / "data/split_setup/split25.csv").read_text().splitlines()[1:]]
    ).T
    columns = list(SCENES)
    logits = np.where(scenes[:, None] == np.array(columns), 3.0, 0.0).astype(np.float32)
    np.savez(folder / "logits.npz", filename=names, scenes=columns, logits=logits)
    torch.save(torch.from_numpy(logits), folder / "logits.pt")
    with open(folder / "logits.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["filename", *columns], *([n, *row] for n, row in zip(names, logits.tolist(), strict=True))]
        )


def _terminated(original: Callable, *args):
    signal.raise_signal(signal.SIGTERM)
    return original(*args)


def contents(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


class Enough(BaseException):
    """A command has read all that it reads, and would now only calculate."""


class Hung(BaseException):
    """A command has taken `SECONDS` of CPU time."""


def _raise(kind: type[BaseException], *_, **__) -> None:
    raise kind


def call(command: list, folder: Path, to_the_end: bool) -> tuple[int | None, str]:
    """Run a command in this process. Return its exit code, None where it hung, and what it said."""
    main, *flags = command
    os.chdir(folder)
    sys.argv, said, code = [f"{main.__module__}.py", *map(str, flags)], io.StringIO(), 0
    SceneClassifier.training_step = STEP if to_the_end else partial(_raise, Enough)
    SceneClassifier.test_step = partial(_raise, Enough)
    signal.signal(signal.SIGPROF, partial(_raise, Hung))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            errors.run(main)
    except SystemExit as end:
        code = end.code or 0
    except Hung:
        code = None
    except Enough:
        pass
    except BaseException:
        traceback.print_exc(file=said)
        code = 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return code, said.getvalue()


def outcome(code: int | None, said: str, lost: bool) -> str:
    if code is None:
        return HANG
    if "Traceback" in said:
        return TRACEBACK
    if code and lost:
        return LOST
    line = said.replace("\r", "\n").strip().rpartition("\n")[2]
    if code == 2 and (len(re.findall("(?:^|\n)error: ", said)) != 1 or len(line) > LONGEST):
        return UNCLEAR
    return CLEAR if code else WORKS


def one(world: Path, pairs: list[tuple[str, str]], i: int, seed: int, whole: bool) -> tuple[str, str]:
    """Return the outcome of mutation ``i``, and what happened."""
    rng, (kind, name) = random.Random(f"{seed} {i}"), pairs[i % len(pairs)]
    with tempfile.TemporaryDirectory(dir=world.parent) as beside:
        folder = shutil.copytree(world, Path(beside) / "work")
        path = rng.choice(sorted(found for pattern in KINDS[kind].files for found in folder.glob(pattern)))
        how = "whole" if whole else KINDS[kind].mutation(path, rng)
        before = contents(folder)
        code, said = call(KINDS[kind].commands[name], folder, to_the_end=name == "--resume")
        lost = bool(before - contents(folder))
        return outcome(code, said, lost), f"{i}: {path.name}: {how}\n{said[-6000:]}"


def _work(pipe: Connection, *what) -> None:
    """In a child: the outcomes of some mutations, one after another."""
    *given, numbers, seed, whole = what
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for i in numbers:
        pipe.send(one(*given, i, seed, whole))


def mutations(
    world: Path, n: int, seed: int, only: str = "", whole: bool = False
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (kind, command, outcome, what happened) of ``n`` mutations, the kinds and their commands in turn.

    With ``whole`` nothing is changed, and every command runs once.
    """
    pairs = [(kind, name) for kind in KINDS if only in kind for name in KINDS[kind].commands]
    n = len(pairs) if whole else n
    done = 0
    while done < n:  # in children, of some mutations each: what a command leaves in a process does not add up
        reader, writer = _fork.Pipe(duplex=False)
        work = world, pairs, range(done, min(n, done + TOGETHER)), seed, whole
        child = _fork.Process(target=_work, args=(writer, *work))
        child.start()
        writer.close()
        for i in work[2]:
            try:
                ended = reader.recv() if reader.poll(PATIENCE) else (HANG, f"{i}: not even a signal ended it")
            except EOFError:
                ended = TRACEBACK, f"{i}: the process died"
            done = i + 1
            yield *pairs[i % len(pairs)], *ended
            if "\n" not in ended[1]:
                break
        child.kill()
        child.join()


def counted(world: Path, n: int, seed: int, only: str = "", details: Path | None = None) -> Counter:
    """Print a table by kind and command; return how many mutations ended how."""
    found, log = Counter(), details.open("w") if details else io.StringIO()
    for kind, name, ended, what in mutations(world, n, seed, only):
        found[kind, name, ended] += 1
        if ended not in GOOD or details:
            print(f"==== {ended}: {kind}, {name}, {what}", file=log if details else sys.stdout, flush=True)
    rows = dict.fromkeys((kind, name) for kind, name, _ in found)
    print(f"{'file':<26}{'command':<16}", *(f"{ended:>9}" for ended in OUTCOMES))
    for kind, name in rows:
        print(f"{kind:<26}{name:<16}", *(f"{found[kind, name, ended]:>9}" for ended in OUTCOMES))
    total = Counter()
    for (*_, ended), times in found.items():
        total[ended] += times
    print(f"{'all':<42}", *(f"{total[ended]:>9}" for ended in OUTCOMES))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        "tests.faults.typed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=2000, help="mutations (2000)")
    parser.add_argument("--seed", type=int, default=18, help="number that decides them all (18)")
    parser.add_argument("--only", default="", help="only the kinds of files whose name has this in it")
    parser.add_argument("--log", type=Path, help="file for what every command said")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="typed-") as folder:
        world = Path(folder).resolve() / "world"
        make_world(world)
        print(f"whole files made: {time.monotonic() - began:.0f} s", flush=True)
        total = counted(world, given.n, given.seed, given.only, given.log)
    print(f"{time.monotonic() - began:.0f} s")
    if any(total[ended] for ended in OUTCOMES if ended not in GOOD):
        sys.exit(1)


if __name__ == "__main__":
    main()
