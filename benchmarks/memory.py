"""What a block needs of memory."""

import argparse
import concurrent.futures
import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import aum
from benchmarks.contenders import BOTH, Block, block_calls, contenders, make_mixer


def bytes_to_keep(mixer: aum.BiMamba, b: int, l: int, dtype: torch.dtype) -> int:
    """Bytes of the activations that any implementation must keep, or recompute, for the backward.

    The inputs of the products and of what is not linear, 5,872 values per token of AuM-Small: hidden, xz, u, x_proj's
    output and delta of both directions, y.
    """
    d = mixer.d_inner
    per_token = mixer.d_model + 2 * d + 2 * d + 2 * (mixer.dt_rank + 2 * mixer.d_state) + 2 * d + d
    return b * l * per_token * dtype.itemsize


def bytes_saved(
    block: Block, hidden: Tensor, parameters: Sequence[Tensor], autocast: contextlib.AbstractContextManager
) -> int:
    """Bytes that autograd saves in the block's forward: each storage once and whole, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        y = block(hidden)
    del y
    return sum(storage.nbytes() for storage in storages.values())


def peak_on_gpu(call: Callable) -> int:
    """Bytes that a call adds at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(*job) -> int | None:
    """The same of a contender's block, in a process of its own: freed memory that malloc keeps would hide new needs."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(peak_in_this_process, *job).result()


def peak_in_this_process(name: str, b: int, l: int, dtype: torch.dtype, args: argparse.Namespace) -> int:
    mixer = make_mixer(args)
    block = {x.name: x.block for x in contenders(mixer, args.device, dtype, args.mamba_ref)[0]}[name]
    parameters = list(mixer.parameters())
    block_calls(block, parameters, 1, 9, dtype, args)[BOTH]()  # loads and compiles the code that it needs
    call = block_calls(block, parameters, b, l, dtype, args)[BOTH]
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
