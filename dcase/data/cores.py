"""Work over all cores, in order, with little of it in memory."""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from dcase.errors import UserError
from dcase.machine import n_cores

Task, Result = TypeVar("Task"), TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_AHEAD = 4  # tasks per process that are handed out before their results are asked for


def over_all_cores(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int | None,
    prepare: Callable[[], object] = bool,
) -> Iterator[Result]:
    """``work(task)`` of every task, in order, from ``num_workers`` processes (None: one per core), each of which calls
    ``prepare()`` first.

    Raises `UserError` where a process is killed, and whatever ``work`` raises.
    """
    # Not multiprocessing.Pool: that waits forever where a worker is killed (for its memory, or by a broken file). Not
    # Executor.map: it would let all results that are done wait in memory.
    workers = num_workers or n_cores()
    pool = ProcessPoolExecutor(workers, initializer=_become_worker, initargs=(os.getpid(), prepare))
    try:
        tasks = iter(tasks)
        waiting = deque(pool.submit(work, task) for task in islice(tasks, _AHEAD * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, task) for task in islice(tasks, 1))
            yield result
    except BrokenProcessPool as error:
        raise UserError("a process that read files was killed (short of memory?): try a lower --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(parent: int, prepare: Callable[[], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    if sys.platform == "linux":  # end with the parent, even where that is killed; elsewhere a worker would stay, idle
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    import torch

    torch.set_num_threads(1)  # there is a process per core
    prepare()
