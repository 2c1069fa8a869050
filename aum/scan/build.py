"""Compile the C kernels once per machine, at first use, load them and call them."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.nn.functional as F  # torch brings the OpenMP runtime that the kernels then share
from torch import Tensor

from aum.cache import cache_folder, make_cache_folder, refuse_others

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("cpu_kernels.c", "grid_kernels.c", "short_kernels.c")]
HEADERS = [Path(__file__).with_name(name) for name in ("vectors.h", "products.h")]
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")  # -O2 makes slower code by half
MACHINE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler knows
TIMEOUT = 300  # seconds; 3 to 7 are usual


class NotAvailable(Exception):
    """Why a backend cannot be used on this machine, in words for its user."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises `NotAvailable` where there is no compiler, or it fails.

    The file is kept in `aum.cache.cache_folder`. Its name is made of the source, the compiler and the
    processor's instruction set, so that machines can share a home folder, and by its content,
    because loading a damaged library would end the process. Loading one runs its code: where another
    user could have put it there, this process compiles its own.
    """
    compiler = find_compiler()
    machine, built_for = _instruction_set(compiler)
    made_of = [*(path.read_bytes() for path in (*SOURCES, *HEADERS)), *map(str.encode, (*compiler, *FLAGS)), built_for]
    name = f"cpu_kernels-{_digest(b' '.join(made_of))}"
    folder = cache_folder()
    try:
        folder = make_cache_folder().resolve()
        refuse_others(folder)
        for path in folder.glob(f"{name}-*.so"):
            refuse_others(path)
            if path.stem.endswith(_digest(path.read_bytes())):
                return _load(path)
            log.warning("%s is damaged: compiling it again", path)
        return _load(_compile(compiler, machine, folder, name))
    except OSError as error:  # not writable, full, mounted noexec, or not safe: compile only for this process
        log.warning(
            "the compiled CPU kernels cannot be kept in %s (%s): compiling them for this run only. "
            "AUDIO_MAMBA_CACHE names another folder",
            folder,
            error,
        )
    with tempfile.TemporaryDirectory(prefix="audio_mamba-") as private:
        try:
            return _load(_compile(compiler, machine, Path(private), name))
        except OSError as error:
            raise NotAvailable(f"the compiled kernels cannot be loaded from {private}: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    if not kernels.aum_has_threads():
        log.warning(
            "the CPU kernels use one thread: the compiler knew no -fopenmp. Delete %s when it does; CC names another",
            path,
        )
    return kernels


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the command of the C compiler: ``CC``, or what Linux systems call it."""
    asked = os.environ.get("CC")
    for command in [shlex.split(asked)] if asked else (["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise NotAvailable(
        f"CC is {asked}, which is not on PATH"
        if asked
        else "no C compiler on PATH: install one (apt install gcc libc6-dev, or conda install gcc)"
    )


def _instruction_set(compiler: list[str]) -> tuple[tuple[str, ...], bytes]:
    """Flags for this processor, and the macros that the compiler then sets, which say what code it will make."""
    for flags in MACHINE:
        done = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
        if done.returncode == 0:
            return flags, done.stdout
    raise NotAvailable(f"the C compiler does not work: {' '.join(compiler)}: {_complaint(done.stderr)}")


def _compile(compiler: list[str], machine: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile into ``folder``, beside its place and then renamed: several processes may compile at once."""
    log.info("compiling the CPU kernels of the selective scan, once (about 5 s), into %s", folder)
    handle, beside = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory(prefix="audio_mamba-") as private, ThreadPoolExecutor() as pool:
            objects = [f"{private}/{source.stem}.o" for source in SOURCES]
            for threads in (("-fopenmp",), ()):
                start = [*compiler, *FLAGS, *machine, *threads]
                each = [[*start, "-c", str(source), "-o", made] for source, made in zip(SOURCES, objects, strict=True)]
                stages = each, [[*start, *objects, "-o", beside, "-lm"]]  # the files at the same time, then the library
                failed = next((done for stage in stages for done in pool.map(_run, stage) if done.returncode), None)
                if failed is None:
                    break
            else:
                raise NotAvailable(f"the C compiler fails: {shlex.join(failed.args)}: {_complaint(failed.stderr)}")
        os.chmod(beside, 0o755)
        path = folder / f"{name}-{_digest(Path(beside).read_bytes())}.so"
        os.replace(beside, path)
        return path
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(
            f"the C compiler {compiler[0]} took more than {TIMEOUT} s: try again when the machine is less busy"
            ", or name another one in CC"
        ) from error
    finally:
        Path(beside).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT)


def _complaint(stderr: bytes) -> str:
    """The first line that says what is wrong, or the last one."""
    lines = stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1])


# Calls


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """Return a C struct. ``fields``: each ``type:name``, with i (int64), p (pointer), f (float) or I (two int64)."""
    types = {"i": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float, "I": ctypes.c_int64 * 2}
    return type(
        name, (ctypes.Structure,), {"_fields_": [(n, types[t]) for t, n in (x.split(":") for x in fields.split())]}
    )


def fill(kind: type[ctypes.Structure], **values) -> ctypes.Structure:
    """Return a struct of numbers, tensors for pointers, and None for null. It keeps the tensors alive."""
    filled = kind(**{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()})
    filled.tensors = values
    return filled


def padded(x: Tensor) -> Tensor:
    """Return x with its last axis padded with zeros to whole vectors, contiguous."""
    return F.pad(x, (0, -x.shape[-1] % library().aum_vector_lanes())).contiguous()


def call(function: str, arguments: ctypes.Structure, backward: bool) -> None:
    """Call a kernel. Raises MemoryError where there is no memory for its scratch."""
    if getattr(library(), function)(ctypes.byref(arguments), int(backward)):
        raise MemoryError(f"no memory for the scratch of {function}")
