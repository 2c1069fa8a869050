"""Fault drills: disturb the real commands, and see that nothing that was whole is lost.

    python -m tests.faults                              # at least 200 faults, about 5 minutes on 2 cores
    python -m tests.faults --n 1                        # one of each kind, within a minute
    python -m tests.faults --seed 7 --only disk --n 50  # one kind of fault, with the faults of that seed

Each drill starts a command on tiny data, disturbs it, goes on with it as a user would, and compares the result with
that of an undisturbed run: files and weights, bit for bit. Every list that is damaged is read, or refused in one line.
"""

import argparse
import math
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path

from tests.faults.compare import Lost, Unclear
from tests.faults.kinds import bad_checkpoints, bad_lists, bad_pack, bad_recordings, full_disk, in_writing, signalled
from tests.faults.tasks import Checking, FineTuning, Packing, Reading, Training, TrainingFromPack, World

MOST = 4  # faults in one drill
ANY = (Checking, Packing, Training, FineTuning)
kill = partial(signalled, numbers=(signal.SIGKILL,))
stop = partial(signalled, numbers=(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
# Share of the --n faults (0: they take milliseconds, and come in addition), the tasks to choose from, and the faults.
KINDS = {
    "kill -9 while checking": (20, (Checking,), kill),
    "kill -9 while packing": (30, (Packing,), kill),
    "kill -9 while training": (36, (Training,), kill),
    "SIGTERM, SIGINT, SIGUSR1 while training": (24, (Training,), stop),
    "kill -9 while fine-tuning": (16, (FineTuning,), kill),
    "SIGTERM, SIGINT, SIGUSR1 while fine-tuning": (12, (FineTuning,), stop),
    "kill -9 inside writing": (28, ANY, in_writing),
    "checkpoints and config damaged": (14, (Training, FineTuning), bad_checkpoints),
    "a disk that fills": (16, ANY, full_disk),
    "recordings that turn bad": (12, (Training,), bad_recordings),
    "a pack that turns bad": (12, (TrainingFromPack,), bad_pack),
    "lists and manifests from a fuzzer": (0, (Reading,), bad_lists),
}


def drills(name: str, n: int, seed: str, world: World) -> tuple[Counter, list[str]]:
    """Run drills of one kind until ``n`` faults have hit; return how many ended how, and what went wrong."""
    ended, messages, (_, tasks, faults_of) = Counter(), [], KINDS[name]
    for attempt in range(20 * n):
        if ended["tried"] >= n:
            break
        rng, folder, hit = random.Random(f"{seed} {attempt}"), Path(tempfile.mkdtemp(dir=world.folder)), []
        try:
            task = rng.choice(tasks)(world, rng, folder)
            with closing(faults_of(task)) as faults:
                task.disturb(faults, n - ended["tried"], hit)
            shutil.rmtree(folder)
            ended += {"tried": len(hit), "equal": len(hit)}
        except Exception as error:
            problem = str(error) if isinstance(error, Lost | Unclear) else traceback.format_exc()
            messages.append(f"{name}, seed {seed} {attempt}, in {folder}, after: {'; '.join(hit)}\n    {problem}")
            n_hit = max(1, len(hit))
            ended += {"tried": n_hit, "unclear" if isinstance(error, Unclear) else "lost": n_hit}
    return ended, messages


def print_row(name: str, ended: Counter, messages: Iterable[str] = ()) -> None:
    row = f"{name:<44} {ended['tried']:>12} {ended['equal']:>14} {ended['lost']:>6} {ended['unclear']:>8}"
    print(row, *messages, sep="\n  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="try at least this many faults (200)")
    parser.add_argument("--seed", type=int, help="number that decides all faults; without it a random one, printed")
    parser.add_argument("--only", default="", help="only the kinds of faults whose name has this in it")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    shares = {name: share for name, (share, *_) in KINDS.items() if given.only in name}
    began, jobs, total = time.monotonic(), {}, Counter()
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        world = World(folder, pool)
        print(f"everything done once undisturbed: {time.monotonic() - began:.0f} s; seed {seed}")
        print(f"{'fault':<44} {'faults tried':>12} {'resumed equal':>14} {'lost':>6} {'unclear':>8}", flush=True)
        for name, share in shares.items():
            quota = math.ceil(given.n * share / sum(shares.values())) if share else max(50, 2 * given.n)
            pieces = enumerate(range(quota, 0, -MOST))
            jobs[name] = [pool.submit(drills, name, min(MOST, left), f"{seed} {i}", world) for i, left in pieces]
        for name, waiting in jobs.items():
            results = [job.result() for job in waiting]
            ended = sum((ended for ended, _ in results), Counter())
            print_row(name, ended, chain(*(messages for _, messages in results)))
            total += ended
    print_row("all faults", total)
    print(f"{time.monotonic() - began:.0f} s")
    if total["tried"] != total["equal"]:
        sys.exit(f"{folder} is kept")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
