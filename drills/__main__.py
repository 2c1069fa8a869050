"""Failure drills: disturb the real scripts in every way, and see that nothing finished is lost.

    python -m drills                   # at least 200 faults, about 6 minutes on 2 cores
    python -m drills --faults 12       # one or two of each kind, within a minute
    python -m drills --seed 7 --only "disk"     # a kind of drill again, with the faults of that seed

Each drill starts a script on tiny data, disturbs it, goes on with it as a user would, and compares what it comes to
with what it comes to undisturbed: files and weights, bit for bit.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from drills import damage, disk, kills
from drills.drill import Drill, Failure, Lost
from drills.world import World
from drills.zygote import Child, start_zygote

AT_A_TIME = 2
MOST = 4  # faults in one drill
# Share of the faults, and how they are made: kind(world, drill).
KINDS = {
    "kill -9 while checking": (20, kills.checking),
    "kill -9 while packing": (30, kills.packing),
    "kill -9 while training": (36, kills.training),
    "SIGTERM, SIGINT, SIGUSR1 while training": (24, partial(kills.training, how=kills.Stop)),
    "kill -9 while fine-tuning": (16, partial(kills.training, stage=2)),
    "SIGTERM, SIGINT, SIGUSR1 while fine-tuning": (12, partial(kills.training, stage=2, how=kills.Stop)),
    "kill -9 inside writing": (28, kills.writing),
    "checkpoints and config damaged": (14, damage.written),
    "a disk that fills": (16, disk.fills),
    "recordings that turn bad": (12, damage.recordings),
    "a pack that turns bad": (12, damage.packed),
}  # fmt: skip
FUZZ = "lists and manifests from a fuzzer"


@dataclass
class Tally:
    """Faults that have hit, and of those the ones whose drill did not end well."""

    tried: int = 0
    lost: int = 0
    unclear: int = 0
    failures: list[str] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def row(self, name: str) -> str:
        equal = self.tried - self.lost - self.unclear
        return f"{name:<44} {self.tried:>12} {equal:>14} {self.lost:>6} {self.unclear:>8}"


HEAD = f"{'drill':<44} {'faults tried':>12} {'resumed equal':>14} {'lost':>6} {'unclear':>8}"


def drills_of(kind: str, n_faults: int, seed: str, world: World) -> Tally:
    """Drills of one kind until so many faults have hit."""
    tally = Tally()
    for attempt in range(20 * n_faults):
        if tally.tried >= n_faults:
            break
        tally += _drill(KINDS[kind][1], Drill(
            random.Random(f"{seed} {attempt}"),
            Path(tempfile.mkdtemp(dir=world.folder)),
            min(MOST, n_faults - tally.tried),
        ), f"{kind}, seed {seed} {attempt}", world)  # fmt: skip
    return tally


def _drill(kind: Callable, drill: Drill, name: str, world: World) -> Tally:
    try:
        kind(world, drill)
    except Exception as error:
        problem = str(error) if isinstance(error, Failure) else traceback.format_exc()
        lost = not isinstance(error, Failure) or isinstance(error, Lost)
        n = max(1, len(drill.faults))
        history = "; ".join(drill.faults)
        failure = f"{name}, in {drill.folder}, after: {history}\n    {type(error).__name__}: {problem}"
        return Tally(n, n if lost else 0, 0 if lost else n, [failure])
    shutil.rmtree(drill.folder)
    return Tally(len(drill.faults))


def fuzz(n: int, seed: str, world: World) -> Tally:
    folder = Path(shutil.copytree(world.packed, world.folder / "fuzz"))
    done = Child("drills.lists", [folder, seed, n], world.folder).wait()
    if done.code != 0:
        return Tally(n, 0, n, [f"{FUZZ}: {done}: {done.err[-1500:]}"])
    found = json.loads(done.out.splitlines()[-1])
    return Tally(found["tried"], 0, len(found["failures"]), found["failures"])


def run(n_faults: int, seed: int, only: str, folder: Path) -> bool:
    """Whether all went well."""
    begun = time.monotonic()
    kinds = {name: share for name, (share, _) in KINDS.items() if only in name}
    quota = {name: math.ceil(n_faults * share / sum(kinds.values())) for name, share in kinds.items()}
    if n_faults < 2 * len(kinds):
        quota = dict.fromkeys(kinds, 1)
    total = Tally()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        world = World(folder, pool)
        print(f"everything done once undisturbed: {time.monotonic() - begun:.0f} s; seed {seed}", flush=True)
        print(HEAD, flush=True)
        pieces = {name: list(_pieces(n)) for name, n in quota.items()}
        waiting = {
            name: [pool.submit(drills_of, name, n, f"{seed} {i}", world) for i, n in enumerate(pieces[name])]
            for name in kinds
        }
        fuzzed = pool.submit(fuzz, max(50, 2 * n_faults), str(seed), world) if only in FUZZ else None
        for name, tallies in waiting.items():
            found = sum((tally.result() for tally in tallies), Tally())
            total += found
            print(found.row(name), *found.failures, sep="\n  ", flush=True)
        print(total.row("all faults"))
        if fuzzed:
            print(fuzzed.result().row(FUZZ), *fuzzed.result().failures, sep="\n  ")
    print(f"{time.monotonic() - begun:.0f} s")
    return not total.failures and not (fuzzed and fuzzed.result().failures)


def _pieces(n: int) -> Iterator[int]:
    """A kind's faults in pieces for the threads."""
    while n > 0:
        yield min(n, MOST)
        n -= MOST


def main() -> None:
    parser = argparse.ArgumentParser("drills", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many faults to try, at least (200)")
    parser.add_argument("--seed", type=int, help="number that decides all faults; without it one by chance, printed")
    parser.add_argument("--only", default="", help="only the kinds of drill whose name has this in it")
    parser.add_argument("--keep", type=Path, help="new folder to work in, kept; without it a temporary one")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    start_zygote()
    if given.keep:
        given.keep.mkdir(parents=True)
        well = run(given.faults, seed, given.only, given.keep.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="drills-") as folder:
            well = run(given.faults, seed, given.only, Path(folder))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
