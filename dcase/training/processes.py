"""Several processes that train one model together (DDP): who this one is, and what they agree on.

A process that is alone is rank 0 of 1, and everything here costs it nothing.
"""

import atexit
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from dcase.errors import UserError

Value = TypeVar("Value")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _together() else 0


def count() -> int:
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the terminal."""
    return rank() == 0


def start(trainer) -> None:
    """Start the other processes of a Lightning Trainer and meet them; once per script, before there is a run.

    They run this same script from its beginning. Where torchrun or SLURM started them already, this only meets them.
    Raises `UserError` for a strategy other than DDP.
    """
    from pytorch_lightning.strategies import DDPStrategy
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    if not isinstance(trainer.strategy, DDPStrategy) or not isinstance(launcher, _SubprocessScriptLauncher):
        raise UserError(f"--strategy: several processes train with ddp, not with {type(trainer.strategy).__name__}")
    try:
        launcher.launch(trainer.strategy.setup_environment)
    except ValueError as error:
        raise UserError(f"--devices and --num_nodes do not fit the processes that were started: {error}") from error
    atexit.register(dist.destroy_process_group)  # else its threads may abort the program's end
    # The others may wait for this one where it fails, deaf to gentler signals.
    atexit.register(launcher.kill, getattr(signal, "SIGKILL", signal.SIGTERM))
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks
        logging.getLogger("aum").setLevel(logging.WARNING)


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through alone, then the others: they find made what it has made."""
    if _together() and not is_main():
        dist.barrier()
    yield
    if _together() and is_main():
        dist.barrier()


def from_main(value: Value) -> Value:
    """The main process's ``value``, in every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def same_everywhere(tensors: Iterable[torch.Tensor]) -> None:
    """Give the main process's values to these tensors, in place, in every process."""
    for tensor in tensors if _together() else ():
        dist.broadcast(tensor, src=0)


def sum_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, in every process."""
    if not _together():
        return tensor
    on_gpu = dist.get_backend() == "nccl"  # which knows no other tensors
    total = tensor.to("cuda") if on_gpu else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def largest_of_all(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers, in every process."""
    if not _together():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
