"""Files that are damaged: a run's after a stop, recordings and packs while they are trained on."""

import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

from drills.compare import read_checkpoint, same_packs
from drills.drill import Disturbance, Drill, Lost, Unclear, disturb, must_be_orderly, must_name
from drills.faults import AtStep, Damage, Raise
from drills.folder import RATE
from drills.tasks import Training
from drills.world import World
from drills.zygote import Child, Finished

_OF_WRITTEN = ("truncated", "emptied", "with a flipped bit")
_OF_RECORDINGS = ("removed", "replaced by text", "truncated", "emptied", "with NaN")


class DamagedAtStep(Disturbance):
    """A file that is read in every epoch is damaged in a training step, and put back when the run has ended."""

    must_hit = True

    def __init__(self, damage: Damage, number: int):
        self.path, self.kept = damage.path, damage.path.parent.parent / "kept"
        shutil.copy2(self.path, self.kept)
        self.faults = [AtStep(number, damage)]
        self.text = str(self.faults[0])

    def check(self, done: Finished) -> None:
        must_name(done, self.path.name)

    def undo(self) -> None:
        shutil.copy2(self.kept, self.path)


def _in_time(task: Training, damage: Callable[[], Damage]) -> Iterator[Disturbance]:
    """Damage in steps after which at least a whole epoch is to come."""
    while True:
        last = task.undisturbed.n_steps - max(task.undisturbed.epoch_steps.values()) - sum(task.steps.values())
        yield DamagedAtStep(damage(), task.drill.rng.randint(1, last)) if last > 0 else Disturbance()


def recordings(world: World, drill: Drill) -> None:
    """WAV files that turn bad while they are trained on."""
    data = Path(shutil.copytree(world.few, drill.folder / "data"))
    paths = sorted((data / "audio").iterdir())
    rng = drill.rng
    task = Training(world, drill, data=data)
    disturb(task, _in_time(task, lambda: Damage(rng.choice(paths), rng.choice(_OF_RECORDINGS), rng.randrange(2**32))))


def packed(world: World, drill: Drill) -> None:
    """A pack that turns bad while it is trained from, or before that goes on."""
    rng, data = drill.rng, Path(shutil.copytree(world.packed, drill.folder / "data"))
    task, pack = Training(world, drill, data=data), data / "pack"
    (samples,) = pack.glob("samples-*")
    if rng.random() < 0.3:
        disturb(task, _in_time(task, lambda: Damage(samples, "truncated", rng.randrange(2**32))))
        return
    _stop_at_a_step(task)
    wav = rng.choice(sorted((data / "audio").iterdir()))
    path = rng.choice([samples, *pack.glob("index-*"), pack / "manifest.json", wav])
    how = rng.choice((*_OF_WRITTEN, "removed", "replaced by text"))

    def expect(done: Finished) -> None:
        if done.code != 0 or path.name != "manifest.json" or how != "with a flipped bit":  # which may mean nothing
            must_name(done, wav.name if path == wav else str(pack))

    def mend() -> None:
        done = Child("dcase.prepare", world.pack_flags(data, RATE, pack), drill.folder).wait()
        if done.code != 0:
            raise Lost(f"packing does not mend the pack: {done}: {done.err[-1500:]}")
        same_packs(pack, world.few_clips)

    kept = _damage(task, [Damage(path, how, rng.randrange(2**32))])
    if path == samples and how == "with a flipped bit":  # training does not look at the samples' checksums
        mend()
        disturb(task, repeat(Disturbance()))
    else:
        mended = path != wav and (how == "with a flipped bit" or rng.random() < 0.5)
        _go_on(task, kept, expect, mend if mended else None)


def written(world: World, drill: Drill) -> None:
    """Files of a run that are damaged after a stop."""
    rng = drill.rng
    task = Training(world, drill, stage=rng.choice((1, 2)))
    _stop_at_a_step(task)
    lasts = task.run.glob("checkpoints/**/last.ckpt")
    (last,) = (path for path in lasts if not (path.parent / "outcome.json").exists())
    previous, bests = last.with_name("previous.ckpt"), sorted(task.run.glob("checkpoints/**/best.ckpt"))
    path = rng.choice([last, last, last, *bests[:1], task.run / "config.json"])
    damages = [Damage(path, rng.choice(_OF_WRITTEN), rng.randrange(2**32))]
    falls_back = path == last and previous.exists()
    if falls_back and rng.random() < 0.3:
        damages.append(Damage(previous, damages[0].how, damages[0].seed))
        falls_back = False
    content = _members(path)

    def expect(done: Finished) -> None:
        if done.code != 0:
            if falls_back:
                raise Lost(f"it does not go on from previous.ckpt: {done}")
            must_name(done, *(damage.path.name for damage in damages))
        elif unreadable and not ("WARNING" in done.out and "last.ckpt" in done.out):
            raise Unclear(f"it goes on from previous.ckpt and does not say so: {done.out[-1500:]}")

    kept = _damage(task, damages)
    unreadable = falls_back and _members(path) != content  # a flipped bit of a zip file's padding means nothing
    if unreadable:
        task.steps["" if task.stage == 1 else f"{last.parent.name}/"] = read_checkpoint(previous)["global_step"]
    _go_on(task, kept, expect)


def _members(path: Path) -> dict[str, bytes] | None:
    """What a checkpoint's zip file holds; None where that cannot be read."""
    try:
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}
    except Exception:  # a damaged file can make zipfile raise anything
        return None


def _stop_at_a_step(task: Training) -> None:
    """SIGTERM in a training step: the run is saved there."""
    number = task.drill.rng.randint(1, task.undisturbed.n_steps - 1)
    done = task.start([AtStep(number, Raise(signal.SIGTERM))]).wait()
    if done.code != 128 + signal.SIGTERM:
        raise Unclear(f"not stopped by SIGTERM in step {number}: {done}: {done.err[-1500:]}")
    task.check_kept(done)


def _damage(task: Training, damages: Sequence[Damage]) -> dict[Path, Path]:
    """Damage files; what they were is kept, and returned."""
    kept = {damage.path: task.drill.folder / f"kept-{damage.path.name}" for damage in damages}
    for path, copy in kept.items():
        shutil.copy2(path, copy)
    for damage in damages:
        damage()
    task.drill.faults.append(" and ".join(f"{damage.path.parent.name}/{damage}" for damage in damages))
    return kept


def _go_on(
    task: Training,
    kept: dict[Path, Path],
    expect: Callable[[Finished], None],
    mend: Callable[[], None] | None = None,
) -> None:
    """Go on with a run some of whose files are damaged, then with all of them mended or put back, if it has refused."""
    bad = {path: path.read_bytes() if path.exists() else None for path in kept}
    done = task.start().wait()
    must_be_orderly(done)
    expect(done)
    if mend:
        mend()
    else:
        for path, copy in kept.items():
            if (path.read_bytes() if path.exists() else None) == bad[path]:  # and not written anew
                shutil.copy2(copy, path)
    if done.code != 0:
        task.check_kept(done)
        done = task.start().wait()
        if done.code != 0:
            raise Lost(f"it does not go on: {done}: {done.err[-1500:]}")
    task.check_end(done)
