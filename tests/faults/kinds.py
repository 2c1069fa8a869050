"""The kinds of faults: ``kind(task)`` yields the faults of a task, drawn from its random numbers."""

import io
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import soundfile

from tests.data_folder import RATE
from tests.faults.compare import Lost, must_end, read_checkpoint, read_pack
from tests.faults.process import Fault, run
from tests.faults.tasks import LISTS, Reading, Task, Training, TrainingFromPack, pack

_ROOM = 200 << 20  # bytes on a disk that is not full
_OUTSIDE = b"../outside.wav /etc/passwd C:\\sound.wav audio/../../x.wav audio\\..\\x.wav audio/a\0.wav ..".split(b" ")


def signalled(task: Task, numbers: Sequence[signal.Signals]) -> Iterator[Fault]:
    """Send one of some signals at a random moment; now and then Ctrl-C twice."""
    rng = task.rng
    while True:
        number, after = rng.choice(numbers), rng.uniform(0, task.undisturbed.seconds)
        times = 2 if number == signal.SIGINT and rng.random() < 0.3 else 1
        codes = (0, -number) if number == signal.SIGKILL else (0, -number, 128 + number)  # caught in training only
        text = f"{number.name}{' twice' * (times - 1)} after {after:.3f} s"
        yield Fault(text, codes, signals=[(after + 0.002 * i, number) for i in range(times)])


def in_writing(task: Task) -> Iterator[Fault]:
    """kill -9 before or after one of the calls that write, rename and remove, or with a part of a file written."""
    rng, calls = task.rng, task.undisturbed.calls
    while True:
        name = rng.choice([name for name, times in calls.items() for _ in range(min(times, 10))])
        when = rng.choice(("before", "after", "torn") if name == "torch.save" else ("before", "after"))
        number, die = rng.randint(1, calls[name]), partial(_die, when, rng.random())
        text = f"kill -9 at call {number} of {name} ({when})"
        yield Fault(text, (0, -signal.SIGKILL), call=(name, number), instead=die)


def _die(when: str, part: float, original: Callable, *args, **kwargs) -> None:
    if when != "before":
        original(*args, **kwargs)
    if when == "torn":
        os.truncate(args[1], int(part * os.path.getsize(args[1])))
    os.kill(os.getpid(), signal.SIGKILL)


def _before(do: Callable[[], object], original: Callable, *args):
    do()
    return original(*args)


def full_disk(task: Task) -> Iterator[Fault]:
    """A small file system of the task's folder, or (always, without the rights) a limit on the size of files."""
    rng, folder = task.rng, task.cwd

    def mount(options: str) -> bool:
        return not subprocess.call(["mount", "-t", "tmpfs", "-o", options, "disk", folder], stderr=subprocess.DEVNULL)

    def leave(n_bytes: int, *_) -> None:
        used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
        assert mount(f"remount,size={used + n_bytes}"), "a mounted disk can be mounted again"

    content = shutil.copytree(folder, f"{folder}-content")
    mounted = rng.random() < 0.6 and bool(shutil.which("mount")) and mount(f"size={_ROOM}")
    try:
        shutil.copytree(content, folder, dirs_exist_ok=True)
        while True:
            n_bytes = rng.randrange(1000, task.n_bytes // (1 if mounted else 3))  # a limit is for a single file
            text = f"{n_bytes} bytes free ({'mounted' if mounted else 'limited'})"
            if mounted:
                leave(n_bytes)
                yield Fault(text, (0, 2), task.named, after=partial(leave, _ROOM))
            else:
                yield Fault(text, (0, 2), task.named, max_file=n_bytes)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def _flipped(content: bytes, rng: Random, n_bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(n_bits):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _with_nan(content: bytes, rng: Random) -> bytes:
    samples, rate = soundfile.read(io.BytesIO(content))
    samples[rng.randrange(len(samples))] = np.nan
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


# What the content of a file becomes; None where the file is removed.
_DAMAGES = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
    "with a flipped bit": _flipped,
    "removed": lambda content, rng: None,
    "replaced by text": lambda content, rng: b"404: not found\n",
    "with NaN": _with_nan,
}
_OF_RECORDINGS = [how for how in _DAMAGES if how != "with a flipped bit"]


def bad_recordings(task: Training, files: str = "audio/*", ways: Sequence[str] = _OF_RECORDINGS) -> Iterator[Fault]:
    """Files that every epoch reads turn bad in steps with at least one whole epoch to come, and are put back."""
    rng, n_steps = task.rng, len(task.undisturbed.steps) - max(task.epoch_steps.values())
    while (left := n_steps - sum(task.saved.values())) > 0:
        path, how, number = rng.choice(sorted(task.data.glob(files))), rng.choice(ways), rng.randint(1, left)
        whole = path.read_bytes()
        damage = partial(_before, partial(_write, path, _DAMAGES[how](whole, rng)))
        after, text = partial(_write, path, whole), f"{path.name} {how} at step {number}"
        yield Fault(text, (2,), (path.name,), call=("training_step", number), instead=damage, after=after)


def _stopped_at_a_step(task: Training) -> Fault:
    """SIGTERM in a training step: the run is saved there. This does not count: the damage that follows does."""
    number = task.rng.randint(1, len(task.undisturbed.steps) - 1)
    stop = partial(_before, partial(signal.raise_signal, signal.SIGTERM))
    return Fault(codes=(128 + signal.SIGTERM,), call=("training_step", number), instead=stop)


def _damaged(damaged: dict[Path, bytes | None], how: str, codes: Sequence[int], named: Sequence[str]) -> Fault:
    """Damage files between two runs of a command. Those that it does not write anew are put back afterwards."""
    kept = {path: shutil.copy2(path, f"{path}.kept") for path in damaged}  # with its time of change, which packs know
    for path, content in damaged.items():
        _write(path, content)

    def put_back(*_) -> None:
        for path, content in damaged.items():
            if (path.read_bytes() if path.exists() else None) == content:
                shutil.copy2(kept[path], path)

    text = " and ".join(f"{path.parent.name}/{path.name}" for path in damaged)
    return Fault(f"{text} {how}", codes, named, after=put_back, always_counts=True)


def _write(path: Path, content: bytes | None, *_) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def bad_pack(task: TrainingFromPack) -> Iterator[Fault]:
    """A pack, or a recording beside it, that turns bad while it is trained from, or between a stop and going on."""
    rng, folder = task.rng, task.data / "pack"
    if rng.random() < 0.3:
        yield from bad_recordings(task, "pack/samples-*", ["truncated"])
        return
    yield _stopped_at_a_step(task)
    wav, how = rng.choice(sorted(task.data.glob("audio/*"))), rng.choice([how for how in _DAMAGES if how != "with NaN"])
    (samples,) = folder.glob("samples-*")
    path = rng.choice([samples, *folder.glob("index-*"), folder / "manifest.json", wav])
    one_bit = how == "with a flipped bit"

    def pack_again(*_) -> None:
        must_end(run(pack(task.data, RATE, folder), task.cwd), (0,), ())
        if read_pack(folder) != read_pack(task.world.packed / "pack"):
            raise Lost("packing again does not mend the pack")

    codes = (0, 2) if one_bit and path.name == "manifest.json" else (2,)  # a bit there may mean nothing
    named = wav.name if path == wav else str(folder)
    fault = _damaged({path: _DAMAGES[how](path.read_bytes(), rng)}, how, codes, [named])
    if path == samples and one_bit:  # training does not look at the samples' checksums
        pack_again()
        fault.codes = (0,)
    elif path != wav and (one_bit or rng.random() < 0.5):
        fault.after = pack_again
    yield fault


def bad_checkpoints(task: Training) -> Iterator[Fault]:
    """Checkpoints and config.json that are damaged between a stop and going on."""
    yield _stopped_at_a_step(task)
    rng, lasts = task.rng, task.run.glob("checkpoints/**/last.ckpt")
    (last,) = (path for path in lasts if not (path.parent / "tuned.ckpt").exists())
    previous, bests = last.with_name("previous.ckpt"), sorted(task.run.glob("checkpoints/**/best.ckpt"))
    paths = [rng.choice([last, last, last, *bests[:1], task.run / "config.json"])]
    how = rng.choice(("truncated", "emptied", "with a flipped bit"))
    falls_back = paths == [last] and previous.exists()
    if falls_back and rng.random() < 0.3:
        paths, falls_back = [last, previous], False
    if falls_back:  # where it goes on there, it must say so
        task.previous = {last.parent.name.replace("checkpoints", ""): read_checkpoint(previous)["global_step"]}
    damaged = {path: _DAMAGES[how](path.read_bytes(), rng) for path in paths}
    yield _damaged(damaged, how, (0,) if falls_back else (0, 2), [path.name for path in paths])


def bad_lists(task: Reading) -> Iterator[Fault]:
    """A list, or a pack's manifest, with a random mutation; now and then a clip outside the folder in all lists."""
    rng, lists = task.rng, {task.data / name: (task.data / name).read_bytes() for name in LISTS}
    manifest = task.data / "pack" / "manifest.json"
    while True:
        path = rng.choice([*lists, manifest])
        how, content = rng.choice(list(_mutations(path.read_bytes(), rng).items()))
        if rng.random() < 0.9:
            yield _damaged({path: content}, how, (0, 2), ["pack" if path == manifest else path.name])
        else:  # if only one list had it, the others would refuse it
            clip, outside = rng.choice(re.findall(rb"audio/\S+", lists[task.data / LISTS[1]])), rng.choice(_OUTSIDE)
            everywhere = {path: content.replace(clip, outside) for path, content in lists.items()}
            yield _damaged(everywhere, "with a clip outside", (0, 2), [".csv"])


def _mutations(content: bytes, rng: Random) -> dict[str, bytes]:
    """Return what a list, or the manifest of a pack, becomes by each way of damaging it."""
    lines, place = content.split(b"\n"), rng.randrange(len(content))
    i = rng.randrange(len(lines))
    line, fields = lines[i], lines[i].split(b"\t")

    def with_line(*new: bytes) -> bytes:
        return b"\n".join([*lines[:i], *new, *lines[i + 1 :]])

    inserted = {"NUL": b"\0", "CR": b"\r", "no UTF-8": b"\xff\xfe\x80", "odd line breaks": "\u2028\x85é".encode()}
    return {f"with {name}": content[:place] + piece + content[place:] for name, piece in inserted.items()} | {
        "flipped": _flipped(content, rng, rng.choice((1, 1, 3, 30))),
        "truncated": content[:place],
        "with commas": content.replace(b"\t", b","),
        "with CRLF": content.replace(b"\n", b"\r\n"),
        "with mixed line ends": b"\n".join(line + rng.choice((b"", b"\r", b" ")) for line in lines),
        "with a BOM": b"\xef\xbb\xbf" + content,
        "emptied": rng.choice((b"", b"\n", b"\n\n\n", lines[0], lines[0] + b"\n")),
        "with a line twice": with_line(line, line),
        "with a line moved": b"\n".join([line, *lines[:i], *lines[i + 1 :]]),
        "with a line cut": with_line(line[: rng.randrange(len(line) + 1)]),
        "with a long line": with_line(line + rng.choice((b"x", b"\t", b"\ty", b'"')) * rng.choice((1000, 300_000))),
        "with quotes": with_line(b'"' + line.replace(b"\t", rng.choice((b"\t", b'"\t"'))) + rng.choice((b"", b'"'))),
        "with columns swapped": b"\n".join(b"\t".join(reversed(line.split(b"\t"))) for line in lines),
        "with fields swapped": with_line(b"\t".join(rng.sample(fields, len(fields)))),
        "with a field less": with_line(b"\t".join(fields[:-1])),
        "with a field more": with_line(b"\t".join([*fields, b"more"])),
        "with a path outside": with_line(b"\t".join([rng.choice(_OUTSIDE), *fields[1:]])),
    }
