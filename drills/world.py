"""The data folders of all drills, and every task done once undisturbed."""

import shutil
from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from drills import folder as folders
from drills.compare import read_pack
from drills.faults import LogCalls, LogSteps
from drills.folder import DEVICE_FIT, FIT, PACK_RATE, QUIET, RATE, SMALL
from drills.zygote import Child

PROJECT = "P"


@dataclass
class Undisturbed:
    """What a task comes to where nothing happens to it."""

    folder: Path  # of the run, or what was written
    seconds: float
    calls: Counter  # of `faults.CALLS`
    n_steps: int  # training steps
    epoch_steps: dict[str, int]  # training steps of an epoch, by prefix


class World:
    """``few`` clips to train on, ``packed`` (the same with a pack), ``many`` clips to pack, ``spoilt`` to check."""

    def __init__(self, folder: Path, pool: Executor):
        self.folder = folder
        self.few, self.packed = folder / "few" / "data", folder / "packed" / "data"  # results.json has the last name
        self.many, self.spoilt = folder / "many", folder / "spoilt"
        folders.write_few_clips(self.few)
        folders.write_many_clips(self.many)
        folders.spoil(folders.link_copy(self.many, self.spoilt))
        shutil.copytree(self.few, self.packed)
        work = {
            "wav": partial(self._do, "wav", "train_base.py", *self.train_flags(self.few)),
            "pack": self._packed,
            "checking": partial(self._do, "checking", "dcase.prepare", *self.check_flags(self.spoilt)),
            "packing": partial(self._do, "packing", "dcase.prepare", *self.pack_flags(self.many, PACK_RATE)),
            "old_pack": partial(self._do, "old_pack", "dcase.prepare", *self.pack_flags(self.many, RATE)),
        }
        done = {name: pool.submit(task) for name, task in work.items()}
        self.wav, self.pack, self.checking, self.packing, self.old_pack = (done[name].result() for name in work)
        self.checking.folder = self.spoilt
        for packing in (self.packing, self.old_pack):
            packing.folder = packing.folder / "pack"
        self.clips, self.old_clips, self.few_clips = map(
            read_pack, (self.packing.folder, self.old_pack.folder, self.packed / "pack")
        )
        general = self.put_general_model(folder / "devices")
        flags = self.device_flags(self.few, general)
        self.devices = self._do("devices", "train_device_specific.py", *flags)

    def train_flags(self, data: Path) -> list:
        return ["--dataset_dir", data, "--project_name", PROJECT, *SMALL, *FIT, *QUIET]

    def device_flags(self, data: Path, general: str) -> list:
        return ["--dataset_dir", data, "--project_name", PROJECT, "--ckpt_id", general, *DEVICE_FIT, *QUIET]

    def check_flags(self, data: Path) -> list:
        return ["--dataset_dir", data, "--orig_sample_rate", RATE, "--num_workers", 2]

    def pack_flags(self, data: Path, rate: int, pack_dir: Path | str = "pack") -> list:
        return [*self.check_flags(data), "--pack", "--sample_rate", rate, "--pack_dir", pack_dir]

    def put_general_model(self, folder: Path) -> str:
        """Put the run that fine-tuning starts from into the project in a folder; its id."""
        general = folder / PROJECT / "general"
        (general / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "checkpoints/best.ckpt"):
            shutil.copy2(self.wav.folder / name, general / name)
        return general.name

    def _packed(self) -> Undisturbed:
        """Pack the few clips, and train from that."""
        self._do("few_pack", "dcase.prepare", *self.pack_flags(self.packed, RATE, self.packed / "pack"))
        return self._do("pack", "train_base.py", *self.train_flags(self.packed))

    def _do(self, name: str, script: str, *args) -> Undisturbed:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        calls, steps = folder / "calls.log", folder / "steps.log"
        done = Child(script, args, folder, [LogCalls(calls), LogSteps(steps)]).wait()
        if done.code != 0:
            raise SystemExit(f"{script} does not work even undisturbed: {done.err}")
        runs = [path.parent for path in folder.glob(f"{PROJECT}/*/config.json") if path.parent.name != "general"]
        found = read_steps(steps)
        return Undisturbed(
            folder=runs[0] if runs else folder,
            seconds=done.seconds,
            calls=Counter(calls.read_text().split()) if calls.exists() else Counter(),
            n_steps=len(found),
            epoch_steps={prefix: 1 + max(b for p, _, b in found if p == prefix) for prefix, _, _ in found},
        )


def read_steps(path: Path) -> list[tuple[str, int, int]]:
    """What `faults.LogSteps` wrote: prefix, epoch and batch of every training step."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(prefix.replace("-", ""), int(epoch), int(batch)) for prefix, epoch, batch in map(str.split, lines)]
