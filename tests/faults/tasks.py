"""The commands that are disturbed (checking, packing, training, fine-tuning), and what must hold after each fault."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from random import Random

import numpy as np

import train_base
import train_device_specific
from dcase import prepare
from dcase.data.pack import Pack
from dcase.data.tau22 import DEVICES, SCENES, load_clips
from tests.data_folder import FIT, RATE, SMALL, write_tones
from tests.faults.compare import Lost, Unclear, must_end, must_equal, read_checkpoint, read_pack
from tests.faults.process import Fault, Finished, run

PROJECT = "P"
LISTS = ("meta.csv", "split_setup/split25.csv", "split_setup/test.csv")
PACK_RATE = 16000  # Hz, of the packs of the many clips: resampling gives a kill something to hit
# Small batches, so that a fault finds a run in the middle of an epoch.
_TRAIN = [*SMALL, *FIT, "--project_name", PROJECT, "--batch_size", 2, "--check_val_every_n_epoch", 2]
_FINE_TUNE = (
    f"--project_name {PROJECT} --ckpt_id general --n_epochs 3 --batch_size 2 --lr 0.003 --warmup_steps 2 "
    "--check_val_every_n_epoch 1 --num_workers 0 --wandb_mode disabled --accelerator cpu"
).split()


def check(data: Path) -> list:
    return [prepare.main, "--dataset_dir", data, "--orig_sample_rate", RATE, "--num_workers", 2]


def pack(data: Path, rate: int, pack_dir: Path) -> list:
    return [*check(data), "--pack", "--sample_rate", rate, "--pack_dir", pack_dir]


class World:
    """Data folders (``few`` clips to train on, ``packed``: the same with a pack, ``many`` to pack, ``spoilt`` to check)
    and how each command ended undisturbed: ``done``, by the name of the folder that it ran in."""

    def __init__(self, folder: Path, pool: Executor):
        self.folder = folder
        # results.json holds a data folder's last name: it must be that of a drill's copy.
        self.few, self.packed = folder / "few" / "data", folder / "packed" / "data"
        self.many, self.spoilt = folder / "many", folder / "spoilt"
        write_tones(self.few)
        write_tones(self.many, places=range(5), n_pieces=25, test_devices=("a", "b"), n_samples=RATE // 4)
        shutil.copytree(self.few, self.packed)
        shutil.copytree(self.many, self.spoilt)
        first, *paths = sorted((self.spoilt / "audio").iterdir())
        whole = first.read_bytes()
        first.unlink()
        for i, path in enumerate(paths[::97]):  # cut, empty or silent
            path.write_bytes((whole[: len(whole) // 2], b"", whole[:44] + bytes(len(whole) - 44))[i % 3])
        self.done: dict[str, Finished] = {}
        self._do(pool, {
            "train": [*Training.start, "--dataset_dir", self.few],
            "pack_few": pack(self.packed, RATE, self.packed / "pack"),
            "check": check(self.spoilt),
            "pack": pack(self.many, PACK_RATE, folder / "pack" / "pack"),
            "pack_old": pack(self.many, RATE, folder / "pack_old" / "pack"),
        })  # fmt: skip
        self.put_general_model(folder / "fine_tune")
        self._do(pool, {
            "train_packed": [*Training.start, "--dataset_dir", self.packed],
            "fine_tune": [*FineTuning.start, "--dataset_dir", self.few],
        })  # fmt: skip

    def _do(self, pool: Executor, commands: dict[str, list]) -> None:
        folders = [self.folder / name for name in commands]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        for name, done in zip(commands, pool.map(run, commands.values(), folders), strict=True):
            must_end(done, (0,), ())
            self.done[name] = done

    def put_general_model(self, cwd: Path) -> None:
        """Put the run that fine-tuning starts from into the project in a folder."""
        general = cwd / PROJECT / "general"
        (general / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "checkpoints/best.ckpt"):
            shutil.copy2(run_in(self.folder / "train") / name, general / name)


def run_in(cwd: Path) -> Path | None:
    """Return the folder of the run that a command made; None before there is one that could be resumed."""
    runs = [path.parent for path in (cwd / PROJECT).glob("*/config.json") if path.parent.name != "general"]
    if len(runs) > 1:
        raise Lost("there are two runs")
    return runs[0] if runs else None


class Task:
    """A command that can be interrupted and run again: ``command()`` starts it, or goes on with it."""

    name: str  # of its undisturbed run
    named: Sequence[str]  # one of these must be in its errors
    n_bytes: int  # that it writes

    def __init__(self, world: World, rng: Random, cwd: Path):
        self.world, self.rng, self.cwd, self.undisturbed = world, rng, cwd, world.done[self.name]

    def disturb(self, faults: Iterator[Fault], most: int, hit: list[str]) -> None:
        """Run the command to its end through faults, at most so many. One that it was too quick for does not count."""
        done = None
        while done is None or done.code != 0:
            fault = next(faults, Fault()) if len(hit) < most else Fault()
            done = run(self.command(), self.cwd, fault)
            if fault.text and (done.code != 0 or fault.always_counts):
                hit.append(fault.text)
            must_end(done, fault.codes, fault.named)
            fault.after(done)
            self.check_kept(done)

    def check_kept(self, done: Finished) -> None:
        """Raise `Lost` where something whole is gone, or the command has succeeded with another result than usual."""


class Checking(Task):
    """`dcase.prepare` in a folder that has older lists, which differ from those to come."""

    name, named = "check", ("meta_clean.csv", "meta_excluded.csv")

    def __init__(self, *args):
        super().__init__(*args)
        self.data = shutil.copytree(self.world.spoilt, self.cwd / "data")
        self.new = self._lists()
        self.old = [b"".join(content.splitlines(keepends=True)[:5]) for content in self.new]
        for name, content in zip(self.named, self.old, strict=True):
            (self.data / name).write_bytes(content)
        self.n_bytes = sum(map(len, self.new))

    def _lists(self) -> list[bytes]:
        return [(self.data / name).read_bytes() for name in self.named]

    def command(self) -> list:
        return check(self.data)

    def check_kept(self, done: Finished) -> None:
        interrupted = [self.old, [self.old[0], self.new[1]]]  # what meta_clean.csv leaves out is always written down
        if self._lists() not in ([self.new] if done.code == 0 else [*interrupted, self.new]):
            raise Lost("the lists are neither the old nor the new ones, or left-out clips are not written down")


class Packing(Task):
    """`dcase.prepare --pack` where there is no pack, or an older one at another rate."""

    name = "pack"

    def __init__(self, *args):
        super().__init__(*args)
        self.pack = self.cwd / "pack"
        self.named = (str(self.pack),)
        old, new = (self.world.folder / name / "pack" for name in ("pack_old", "pack"))
        self.old = self.rng.random() < 0.5 and read_pack(shutil.copytree(old, self.pack))
        self.new = read_pack(new)
        self.n_bytes = sum(path.stat().st_size for path in new.iterdir())
        self.packed = 0  # clips, in blocks that were whole

    def command(self) -> list:
        return pack(self.world.many, PACK_RATE, self.pack)

    def check_kept(self, done: Finished) -> None:
        found = re.search(r"(\d+) of \d+ clips are packed already", done.said)
        if (found or "packing:" in done.said) and int(found[1] if found else 0) < self.packed:
            raise Lost(f"{self.packed} clips were packed, and it goes on behind {found[1] if found else 0}")
        journals = [path.read_text().split("\n")[:-1] for path in self.pack.glob("journal-*.jsonl")]
        self.packed = sum(len(json.loads(line).get("filename", [])) for lines in journals for line in lines)
        whole = (self.pack / "manifest.json").exists() and read_pack(self.pack)
        if whole != self.new and (done.code == 0 or whole != self.old):
            raise Lost("the pack is neither the old one nor the new one")
        remains = sorted(path.name for path in self.pack.glob("[!.]*-*"))  # as large as a pack
        if done.code == 0 and len(remains) != 2:
            raise Unclear(f"remains beside the finished pack: {remains}")


class Training(Task):
    """`train_base.py` in a project that has a general model, on a copy of the few clips."""

    name, named, data_of = "train", (PROJECT + "/",), "few"
    start = train_base.main, *_TRAIN

    def __init__(self, *args):
        super().__init__(*args)
        self.data = shutil.copytree(getattr(self.world, self.data_of), self.cwd / "data")
        self.world.put_general_model(self.cwd)
        self.wanted, steps = run_in(self.world.folder / self.name), self.undisturbed.steps
        self.n_bytes = sum(path.stat().st_size for path in self.wanted.rglob("*") if path.is_file())
        self.epoch_steps = {device: 1 + max(b for d, _, b in steps if d == device) for device, _, _ in steps}
        self.saved = dict.fromkeys(self.epoch_steps, 0)  # optimiser steps, by device or ""
        self.previous = {}  # those in previous.ckpt, where last.ckpt has been damaged

    @property
    def run(self) -> Path | None:
        return run_in(self.cwd)

    def command(self) -> list:
        if not self.run:
            return [*self.start, "--dataset_dir", self.data]
        return [self.start[0], "--resume", self.run.name, "--project_name", PROJECT, "--accelerator", "cpu"]

    def check_kept(self, done: Finished) -> None:
        steps = [(device, epoch * self.epoch_steps[device] + batch) for device, epoch, batch in done.steps]
        begun = dict(reversed(steps))  # where each device went on
        saved = self.saved | (self.previous if re.search("WARNING.*last.ckpt", done.said) else {})
        if any(saved[device] != step for device, step in begun.items()):
            raise Lost(f"these steps were saved: {saved}, and it went on at {begun}")
        before, self.saved = self.saved, dict.fromkeys(self.epoch_steps, 0)
        for path in self.run.glob("checkpoints/**/*.ckpt") if self.run else ():
            checkpoint = read_checkpoint(path)
            if path.name == "last.ckpt":
                self.saved[path.parent.name.replace("checkpoints", "")] = checkpoint["global_step"]
        if any(self.saved[device] < step for device, step in before.items()):
            raise Lost(f"these steps were saved: {before}, and now {self.saved}")
        if "saved in epoch" in done.said:  # stopped by a signal
            if steps and self.saved[steps[-1][0]] != steps[-1][1] + 1:
                raise Lost(f"{steps[-1]} was the last step, and {self.saved} were saved")
            if done.code <= 128 or signal.Signals(done.code - 128).name not in done.error:
                raise Unclear(f"it does not say what ended it: {done}")
        if not self.run:
            return
        json.loads((self.run / "config.json").read_text())
        for name in ("results.json", "metrics.csv", "checkpoints/*/outcome.json", "**/last.ckpt", "**/best.ckpt"):
            for wanted in self.wanted.glob(name):
                found = self.run / wanted.relative_to(self.wanted)
                if done.code == 0 or wanted.suffix == ".json" and found.exists():  # written once
                    must_equal(found, wanted)


class FineTuning(Training):
    """`train_device_specific.py` from the general model, on a copy of the few clips."""

    name, start = "fine_tune", (train_device_specific.main, *_FINE_TUNE)


class TrainingFromPack(Training):
    """`train_base.py` on a copy of the few clips with a pack."""

    name, data_of = "train_packed", "packed"


class Reading(Task):
    """Reading the lists and the pack of a data folder: what is read must make sense, or be refused in one line."""

    name = "check"

    def __init__(self, *args):
        super().__init__(*args)
        self.data = shutil.copytree(self.world.packed, self.cwd / "data", ignore=shutil.ignore_patterns("*.wav"))

    def command(self) -> list:
        return [read, self.data]


def read() -> None:
    folder = Path(sys.argv[1])
    for split in ("split25", "test"):
        clips = load_clips(folder, split)
        for name in map(bytes.decode, clips.filenames.tolist()):
            inside = os.path.normpath(os.path.join("/data", name)).startswith("/data/")
            assert inside and name[0] != "/" and not {"\\", "\0"} & set(name), f"{name!r} leaves the folder"
        for column, values in ((clips.scene, SCENES), (clips.device, DEVICES)):
            assert 0 < len(column) == len(clips) and np.isin(column, range(len(values))).all(), "unknown scene/device"
    assert len(Pack(folder / "pack").rows(clips.filenames)) == len(clips), "clips of the pack are lost"
