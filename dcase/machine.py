"""This machine: its flags and cores, the signals that request a stop, and the processes that train together (DDP).

A single process has rank 0 of 1, and the functions for several processes cost it nothing.
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

from dcase.errors import UserError, check_range

Value = TypeVar("Value")

# SIGUSR1 is what SLURM can send before a time limit, SIGHUP what a terminal or an ssh session sends that is closed.
# Windows lacks some of them.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class MachineConfig:
    batch_size: int = 64
    """Clips per batch in each process."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Precision of matrix products; the scan's state and the residual stream are always 32-bit."""
    float32_matmul: Literal["highest", "high", "medium"] = "highest"
    """On a GPU, how float32 matrix products and convolutions are rounded: highest: in float32; high: TF32 (10 bits of
    mantissa, faster on tensor cores); medium: bfloat16 products where there are any. A CPU always takes float32."""
    num_workers: int = 8
    """Processes that read WAV files, at most one per core; 0: the training process reads. A pack needs at most one."""
    accelerator: str = "auto"
    """Hardware to run on: cpu, gpu, ..., or auto for the best available."""
    devices: str = "1"
    """Accelerators per machine, one process each, as Lightning's Trainer takes them: 2, or "2," for the third GPU."""
    num_nodes: int = 1
    """Machines that train together, started by torchrun or SLURM; --project_name is in a folder that they share."""
    strategy: str = "auto"
    """How several processes share the work: ddp, or auto, which is ddp for more than one process."""
    scan_backend: Literal["auto", "cpu", "triton", "mamba_ssm", "torch"] = "auto"
    """Backend of the selective scan; auto: AUM_SCAN_BACKEND, or the fastest that fits. The log says which."""
    deterministic: bool = False
    """Refuse operations that are not bit-reproducible on one machine: mamba_ssm's scan, some of CUDA's."""

    def __post_init__(self):
        check_range(self, "batch_size num_nodes", least=1, most=10**6)
        check_range(self, "num_workers", least=0, most=10**6)


def n_cores() -> int:
    """Return how many cores this process may use: a container or a SLURM job may have fewer than the machine."""
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
    """Return whether this is the process that writes files and prints."""
    return process_rank() == 0


def start_processes(trainer) -> None:
    """Start the other processes of a Lightning Trainer and connect them; once per script, before a run exists.

    They run this same script from its beginning. Where torchrun or SLURM started them already, only connect them.
    Raises `UserError` for a strategy other than DDP.
    """
    from pytorch_lightning.strategies import DDPStrategy

    launcher = trainer.strategy.launcher
    starts_scripts = hasattr(launcher, "cluster_environment")  # ddp_spawn's launcher, of functions, has none
    if not isinstance(trainer.strategy, DDPStrategy) or not starts_scripts:
        raise UserError(f"--strategy: several processes train with ddp, not with {type(trainer.strategy).__name__}")
    try:
        launcher.launch(trainer.strategy.setup_environment)
    except ValueError as error:
        raise UserError(f"--devices and --num_nodes do not fit the processes that were started: {error}") from error
    atexit.register(dist.destroy_process_group)  # otherwise its threads may abort the program's end
    # Where this process fails, the others may wait for it and ignore gentler signals.
    atexit.register(launcher.kill, getattr(signal, "SIGKILL", signal.SIGTERM))
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process prints
        logging.getLogger("aum").setLevel(logging.WARNING)


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others, which find what it has made."""
    if _together() and not is_main():
        dist.barrier()
    yield
    if _together() and is_main():
        dist.barrier()


def from_main(value: Value) -> Value:
    """Return the main process's ``value`` in every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def same_everywhere(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite these tensors with the main process's values, in every process."""
    for tensor in tensors if _together() else ():
        dist.broadcast(tensor, src=0)


def sum_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's tensor, in every process."""
    if not _together():
        return tensor
    on_gpu = dist.get_backend() == "nccl"  # which takes no other tensors
    total = tensor.to("cuda") if on_gpu else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def largest_of_all(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers, in every process."""
    if not _together():
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
