"""This machine: its flags and cores, the signals that request a stop, and the processes that train together (DDP).

A process that runs alone is rank 0 of 1, and the functions for several processes cost it nothing.
"""

import atexit
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from dcase.errors import UserError

Value = TypeVar("Value")

# SIGUSR1 is what SLURM can send before a time limit. Windows lacks some of them.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


@dataclass(frozen=True)
class MachineConfig:
    batch_size: int = 64
    """Clips in a batch of each process."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Bits of the matrix products; the scan's state and the residual stream are always 32-bit."""
    num_workers: int = 8
    """Processes that read WAV files, at most one per core; 0: the training process does. A pack takes one at most."""
    accelerator: str = "auto"
    """cpu, gpu, ... or auto: the best there is."""
    devices: str = "1"
    """Accelerators of a machine, a process each, as Lightning's Trainer takes it: 2, or "2," for the third GPU only."""
    num_nodes: int = 1
    """Machines that train together, started by torchrun or SLURM, with --project_name in a folder that all share."""
    strategy: str = "auto"
    """How several processes share the work: ddp, or auto, which is ddp where there are several."""
    scan_backend: Literal["auto", "cpu", "triton", "mamba_ssm", "torch"] = "auto"
    """What computes the selective scan; auto: AUM_SCAN_BACKEND, else the fastest that fits. The log says which."""
    deterministic: bool = False
    """Refuse whatever does not give the same bits every time on one machine: mamba_ssm's scan, some of CUDA."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch_size is at least 1; got {self.batch_size}")
        if self.num_workers < 0:
            raise UserError(f"--num_workers is not below 0; got {self.num_workers}")


def n_cores() -> int:
    """Cores that this process may use: in a container or a SLURM job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name_of(device: torch.device) -> str:
    """Return the name of the GPU, or of this machine's processor, which Linux has only in a file."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


# Several processes


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    return dist.get_rank() if _together() else 0


def process_count() -> int:
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the terminal."""
    return process_rank() == 0


def start_processes(trainer) -> None:
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
