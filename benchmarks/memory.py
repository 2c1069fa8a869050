"""Measure the memory that one call of a contender's block needs. scan.py prints the table."""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import BOTH, D_MODEL, Case


def bytes_to_keep(case: Case, b: int, l: int) -> int:
    """Return the bytes of the activations that any implementation must keep, or recompute, for the backward.

    They are the inputs of the products and of the nonlinear operations, 5,872 values per token of AuM-Small: hidden,
    xz, u, x_proj's output and delta of both directions, y.
    """
    mixer, d = case.mixer, case.mixer.d_inner
    per_token = mixer.d_model + 2 * d + 2 * d + 2 * (mixer.dt_rank + 2 * mixer.d_state) + 2 * d + d
    return b * l * per_token * case.dtype.itemsize


def bytes_saved(case: Case, name: str, b: int, l: int) -> int:
    """Return the bytes that autograd saves in the block's forward: each storage once and whole, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in case.mixer.parameters()}
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return x

    hidden = torch.randn(b, l, D_MODEL, device=case.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), case.autocast():
        case.blocks[name](hidden)
    return sum(storage.nbytes() for storage in storages.values())


def peak_on_gpu(call) -> int:
    """Return the bytes that a call adds at its peak. It must have run before, as its first run may compile."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak(case: Case, name: str, b: int, l: int) -> int | None:
    """Return the bytes that forward and backward add at their peak; None where the system cannot tell.

    On the CPU they run in a fresh process: freed memory that malloc keeps would hide new needs.
    """
    if case.device == "cuda":
        call = case.calls(name, b, l)[BOTH]
        call()
        return peak_on_gpu(call)
    if not Path("/proc/self/clear_refs").exists():
        return None
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), case.dtype, case.mamba_ref, name, b, l).result()


def _peak(threads: int, dtype: torch.dtype, mamba_ref: Path | None, name: str, b: int, l: int) -> int:
    torch.set_num_threads(threads)
    case = Case("cpu", dtype, mamba_ref)
    case.calls(name, 1, 9)[BOTH]()  # loads and compiles the code that it needs
    call = case.calls(name, b, l)[BOTH]
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
