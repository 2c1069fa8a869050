"""What is disturbed: checking, packing, training and fine-tuning."""

import json
import re
import shutil
from pathlib import Path

from drills.compare import read_checkpoint, read_pack, same_checkpoints, same_files, same_packs, same_weights
from drills.drill import Drill, Failure, Lost
from drills.faults import LogSteps
from drills.folder import PACK_RATE, link_copy
from drills.world import PROJECT, World, read_steps
from drills.zygote import Child, Finished

LISTS = ("meta_clean.csv", "meta_excluded.csv")


class Checking:
    """`dcase.prepare` in a folder that has older lists, other than those to come."""

    def __init__(self, world: World, drill: Drill, folder: Path | None = None):
        self.world, self.drill, self.undisturbed = world, drill, world.checking
        self.seconds, self.named = self.undisturbed.seconds, LISTS
        self.data = (folder or drill.folder) / "data"
        link_copy(world.spoilt, self.data) if folder is None else shutil.copytree(world.spoilt, self.data)
        self.old = {}
        for name in LISTS:
            self.old[name] = b"".join((world.spoilt / name).read_bytes().splitlines(keepends=True)[:5])
            (self.data / name).unlink()  # linked
            (self.data / name).write_bytes(self.old[name])
        self.n_bytes = sum((world.spoilt / name).stat().st_size for name in LISTS)

    def start(self, faults=()) -> Child:
        return Child("dcase.prepare", self.world.check_flags(self.data), self.drill.folder, faults)

    def check_kept(self, done: Finished) -> None:
        new = []
        for name in LISTS:
            content = (self.data / name).read_bytes()
            new.append(content == (self.world.spoilt / name).read_bytes())
            if not new[-1] and content != self.old[name]:
                raise Lost(f"{name} is neither the old list nor the new one")
        if new == [True, False]:
            raise Lost("meta_clean.csv is new, and what it leaves out is not written down")

    def check_end(self, done: Finished) -> None:
        for name in LISTS:
            same_files(self.data / name, self.world.spoilt / name)


class Packing:
    """`dcase.prepare --pack` where there is no pack, or an older one at another rate."""

    def __init__(self, world: World, drill: Drill, folder: Path | None = None):
        self.world, self.drill, self.undisturbed = world, drill, world.packing
        self.seconds = self.undisturbed.seconds
        self.pack = (folder or drill.folder) / "pack"
        self.named = (str(self.pack),)
        self.had_one = drill.rng.random() < 0.5
        if self.had_one:
            shutil.copytree(world.old_pack.folder, self.pack)
        self.n_bytes = sum(path.stat().st_size for path in world.packing.folder.iterdir())
        self.packed = 0  # clips, in blocks that were whole

    def start(self, faults=()) -> Child:
        flags = self.world.pack_flags(self.world.many, PACK_RATE, self.pack)
        return Child("dcase.prepare", flags, self.drill.folder, faults)

    def check_kept(self, done: Finished) -> None:
        self._check_nothing_is_packed_twice(done)
        self.packed = self._journaled()
        if (self.pack / "manifest.json").exists():
            clips = read_pack(self.pack)
            if clips != self.world.clips and not (self.had_one and clips == self.world.old_clips):
                raise Lost("the pack is neither the old one nor the new one")
        elif self.had_one:
            raise Lost("the old pack is gone before there is a new one")

    def check_end(self, done: Finished) -> None:
        self._check_nothing_is_packed_twice(done)
        same_packs(self.pack, self.world.clips)
        remains = sorted(path.name for path in self.pack.glob("[!.]*-*"))  # as large as a pack
        if len(remains) != 2:
            raise Failure(f"remains beside the finished pack: {remains}")

    def _check_nothing_is_packed_twice(self, done: Finished) -> None:
        found = re.search(r"(\d+) of \d+ clips are packed already", done.out)
        if found and int(found[1]) < self.packed:
            raise Lost(f"{self.packed} clips were packed, and it goes on behind {found[1]}")
        if not found and self.packed and "packing:" in done.err:
            raise Lost(f"{self.packed} clips were packed, and it begins anew")

    def _journaled(self) -> int:
        """Clips in blocks that were noted as whole."""
        lines = [line for path in self.pack.glob("journal-*.jsonl") for line in path.read_text().split("\n")[:-1]]
        return sum(len(json.loads(line).get("filename", [])) for line in lines)


class Training:
    """`train_base.py`, or `train_device_specific.py`, in a project of its own."""

    def __init__(
        self, world: World, drill: Drill, folder: Path | None = None, stage: int = 1, data: Path | None = None
    ):
        """``data``: a copy of the few clips, or of those with a pack, that the drill may damage."""
        self.world, self.drill, self.stage = world, drill, stage
        self.undisturbed = (world.pack if data and (data / "pack").exists() else world.wav, world.devices)[stage - 1]
        self.seconds = self.undisturbed.seconds
        self.data = data or world.few
        self.cwd = folder or drill.folder
        self.project = self.cwd / PROJECT
        self.named = (PROJECT + "/",)
        self.n_bytes = sum(path.stat().st_size for path in self.undisturbed.folder.rglob("*") if path.is_file())
        self.general = world.put_general_model(self.cwd) if stage == 2 else None
        self.steps_log = drill.folder / "steps.log"
        self.steps = {}  # optimiser steps that are saved, by device

    @property
    def run(self) -> Path | None:
        """The run's folder; None before there is one that could be resumed."""
        runs = [path.parent for path in self.project.glob("*/config.json") if path.parent.name != self.general]
        if len(runs) > 1:
            raise Lost("there are two runs")
        return runs[0] if runs else None

    def start(self, faults=()) -> Child:
        self.steps_log.unlink(missing_ok=True)
        script = ("train_base.py", "train_device_specific.py")[self.stage - 1]
        if self.run:
            flags = ["--resume", self.run.name, "--project_name", PROJECT, "--accelerator", "cpu"]
        elif self.stage == 1:
            flags = self.world.train_flags(self.data)
        else:
            flags = self.world.device_flags(self.data, self.general)
        return Child(script, flags, self.cwd, [LogSteps(self.steps_log), *faults])

    def check_kept(self, done: Finished) -> None:
        self._check_it_went_on_where_it_was()
        before, self.steps = self.steps, self._saved_steps()
        for prefix, step in before.items():
            if self.steps.get(prefix, 0) < step:
                raise Lost(f"{prefix or 'the run'} had {step} steps saved, and has {self.steps.get(prefix, 0)}")
        if "saved in epoch" in done.err:  # stopped by a signal
            prefix, epoch, batch = read_steps(self.steps_log)[-1]
            taken = epoch * self.undisturbed.epoch_steps[prefix] + batch + 1
            if self.steps[prefix] != taken:
                raise Lost(f"{taken} steps were taken, and {self.steps[prefix]} were saved")
        if self.run:
            for path in self.run.glob("checkpoints/**/*.ckpt"):
                read_checkpoint(path)
            for path in (*self.run.glob("checkpoints/*/outcome.json"), *self.run.glob("results.json")):
                same_files(path, self.undisturbed.folder / path.relative_to(self.run))
            json.loads((self.run / "config.json").read_text())

    def check_end(self, done: Finished) -> None:
        self._check_it_went_on_where_it_was()
        run, wanted = self.run, self.undisturbed.folder
        for path in sorted(wanted.glob("checkpoints/**/*")):
            if path.name == "last.ckpt":
                same_checkpoints(run / path.relative_to(wanted), path)
            elif path.name == "best.ckpt":
                same_weights(run / path.relative_to(wanted), path)
            elif path.suffix == ".json":
                same_files(run / path.relative_to(wanted), path)
        for name in ("results.json", "metrics.csv"):
            same_files(run / name, wanted / name)

    def _saved_steps(self) -> dict[str, int]:
        """Optimiser steps in last.ckpt, by device prefix."""
        if not self.run:
            return {}
        paths = self.run.glob("checkpoints/**/last.ckpt")
        names = {path: path.parent.name.replace("checkpoints", "") for path in paths}
        return {f"{name}/" if name else "": read_checkpoint(path)["global_step"] for path, name in names.items()}

    def _check_it_went_on_where_it_was(self) -> None:
        begun = {}
        for prefix, epoch, batch in read_steps(self.steps_log):
            begun.setdefault(prefix, epoch * self.undisturbed.epoch_steps[prefix] + batch)
        for prefix, step in begun.items():
            if step != self.steps.get(prefix, 0):
                raise Lost(f"{prefix or 'the run'} had {self.steps.get(prefix, 0)} steps saved and went on at {step}")


def any_task(world: World, drill: Drill, folder: Path | None = None):
    """One of them by chance."""
    kinds = (Checking, Packing, Training, lambda *args: Training(*args, stage=2))
    return drill.rng.choice(kinds)(world, drill, folder)
