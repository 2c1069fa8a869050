"""The ways to compute the scan, and the choice between them: by the tensors' device and dtype, at the time of the call
(or, for a model that is compiled, of the compilation).

| name | runs on | what it is | same bits every time |
|---|---|---|---|
| ``cpu`` | CPU, float32 and bfloat16 | C, compiled at first use (the .c files here) | yes, with any number of threads |
| ``triton`` | NVIDIA GPUs, float32, bfloat16, float16 | Triton (triton_kernels.py) | yes |
| ``mamba_ssm`` | NVIDIA GPUs, the same | the published CUDA kernels, where they are installed | no: atomic additions |
| ``torch`` | everything, float64 too | plain PyTorch, the reference (torch_scan.py) | yes |
| ``loop`` | everything, in torch.export only | torch's scan operator, which can be exported (loop_scan.py) | yes |
"""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from aum.scan import build, cuda_kernels

log = logging.getLogger(__name__)

_16_AND_32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    name: str
    devices: tuple[str, ...] | None
    """Types of device; None: any."""
    dtypes: tuple[torch.dtype, ...] | None
    """Dtypes of the data; the state is float32. None: any dtype."""
    deterministic: bool
    fused: bool
    """Whether it provides the kernels of `aum.scan.fused`."""
    missing: Callable[[], str | None]
    """Why it cannot be used on this machine; None where it can."""

    def why_not(self, device: str, dtype: torch.dtype, deterministic: bool = False) -> str | None:
        """Why it does not serve these tensors; None where it does."""
        if self.devices and device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(map(_short, self.dtypes))} only"
        if deterministic and not self.deterministic:
            return "does not give the same bits every time, and deterministic algorithms were asked for"
        return self.missing()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _cpu_missing() -> str | None:
    try:
        build.library()
    except build.NotAvailable as error:
        return str(error)
    except Exception as error:  # an unexpected failure costs speed, not the run
        return f"the CPU kernels cannot be compiled: {type(error).__name__}: {error}"
    return None


@functools.cache
def _triton_missing() -> str | None:
    try:
        from aum.scan import triton_kernels  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    if not (_interpreted() or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start its kernels: install one (apt install gcc libc6-dev)"
    return None


def _interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _loop_missing() -> str | None:
    return None if torch.compiler.is_exporting() else "it is for torch.export, where it is chosen by itself"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",), (torch.float32, torch.bfloat16), True, True, _cpu_missing),
        Backend("triton", ("cpu", "cuda") if _interpreted() else ("cuda",), _16_AND_32, True, True, _triton_missing),
        Backend("mamba_ssm", ("cuda",), _16_AND_32, False, False, cuda_kernels.missing),
        Backend("torch", None, None, True, False, lambda: None),
        Backend("loop", None, None, True, True, _loop_missing),
    )
}
_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "mamba_ssm", "torch")}  # the fastest first

_forced: ContextVar[str | None] = ContextVar("use_backend", default=None)
_passed_over: dict[tuple[str, str, torch.dtype], str] = {}  # (backend, type of device, dtype) -> why


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every scan in this context and thread use the backend ``name``; it overrides AUM_SCAN_BACKEND.

    A model that torch.compile has compiled keeps the backend it was compiled with.
    """
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Return whether `use_backend` or AUM_SCAN_BACKEND names a backend."""
    return bool(_forced.get() or os.environ.get("AUM_SCAN_BACKEND"))


def pass_over(name: str, device: str, dtype: torch.dtype, why: str) -> None:
    """Let `choose`, where nothing is asked for by name, take another backend for this type of device and dtype."""
    _passed_over[name, device, dtype] = why
    _choose.cache_clear()


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` and the environment variable ``AUM_SCAN_BACKEND`` take on this machine.

    To know, this compiles the CPU kernels where that has not been done yet (about 5 s, once).
    """
    return tuple(name for name, backend in BACKENDS.items() if not backend.missing())


def choose(device: str, dtype: torch.dtype, asked: str | None = None) -> str:
    """The backend for tensors on a type of device, of a dtype; says once which, and why not another.

    ``asked`` and `use_backend` decide, in this order; in torch.export it is "loop"; else the environment variable
    ``AUM_SCAN_BACKEND`` decides, and without it the fastest that fits is taken. Raises ValueError where what was asked
    for does not exist or does not fit.
    """
    name, who = asked, "backend="
    if name is None and _forced.get() is not None:
        name, who = _forced.get(), "use_backend"
    if name is None and torch.compiler.is_exporting():
        return "loop"
    if name is None:
        name, who = os.environ.get("AUM_SCAN_BACKEND") or None, "AUM_SCAN_BACKEND"
    return _choose(device, dtype, name, who, torch.are_deterministic_algorithms_enabled())


# What torch.compiler.assume_constant_result sets; the decorator itself would import torch._dynamo, a second and more.
choose._dynamo_marked_constant = True


@functools.cache
def _choose(device: str, dtype: torch.dtype, name: str | None, who: str, deterministic: bool) -> str:
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"no scan backend {name!r} ({who}); there is {', '.join(BACKENDS)}")
        reason = BACKENDS[name].why_not(device, dtype, deterministic)
        if reason:
            raise ValueError(f"scan backend {name!r} ({who}) cannot be used for {_short(dtype)} on {device}: {reason}")
        level = logging.DEBUG if who == "use_backend" else logging.INFO
        log.log(level, "selective scan: backend %r for %s on %s, by %s", name, _short(dtype), device, who)
        return name
    passed = {}
    for name in _ORDER.get(device, ("torch",)):
        reason = _passed_over.get((name, device, dtype)) or BACKENDS[name].why_not(device, dtype, deterministic)
        if reason is None:
            break
        passed[name] = reason
    reasons = "".join(f"; not {other!r}: {reason}" for other, reason in passed.items())
    failed = any((other, device, dtype) in _passed_over for other in passed)
    slower = failed or name == "torch" and any(BACKENDS[other].missing() for other in passed)
    level = logging.WARNING if slower else logging.INFO
    log.log(level, "selective scan: backend %r for %s on %s%s", name, _short(dtype), device, reasons)
    return name
