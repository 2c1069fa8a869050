"""Work on many files in several processes: results in order, and few of them in memory."""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

import torch

from dcase.errors import UserError
from dcase.machine import n_cores

Task, Result = TypeVar("Task"), TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def over_all_cores(work: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int | None) -> Iterator[Result]:
    """Yield ``work(task)`` of every task, in order, from ``num_workers`` processes (None: one per core; 0: this one).

    Raises `UserError` where a process is killed, and any error that ``work`` raises.
    """
    workers = min(n_cores() if num_workers is None else num_workers, len(tasks))
    if not workers:
        yield from map(work, tasks)
        return
    # multiprocessing.Pool waits forever where a worker is killed; Executor.map keeps all finished results in memory.
    pool = ProcessPoolExecutor(workers, initializer=_become_worker, initargs=(os.getpid(),))
    try:
        todo = iter(tasks)
        waiting = deque(pool.submit(work, task) for task in islice(todo, 4 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, task) for task in islice(todo, 1))
            yield result
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (short of memory?): try a lower --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if sys.platform == "linux":  # end with the parent, even if that is killed; elsewhere a worker would stay, idle
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    torch.set_num_threads(1)  # there is a process per core
