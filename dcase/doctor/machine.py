"""Checks of the machine, for `dcase.doctor`: Python and packages, GPU, compilers, scan backends, W&B, free disk.

Whatever may be broken is imported inside the check that looks at it. Nothing here waits for a network.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from dcase.doctor.findings import Finding
from dcase.errors import one_line

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
TESTED_PYTHON = (3, 11)
MALWARE = {"pytorch-lightning": ("2.6.2", "2.6.3")}  # requirements.txt has the source
ONLY_SOME_COMMANDS = {"huggingface_hub", "onnx", "onnxscript", "onnxruntime", "wandb", "tensorboard"}  # need these
LOW_DISK, FULL_DISK = 5e9, 5e8  # bytes: a run of AuM-Small keeps 0.7e9, its checkpoints are written beside the old ones
FASTEST = {"cpu": "cpu", "cuda": "triton"}  # device -> scan backend: without it training is several times slower
_GPU_TIMEOUT, _WANDB_TIMEOUT = 10, 20  # seconds


def _install() -> str:
    return f"{sys.executable} -m pip install -r {REQUIREMENTS}"


# Python and its packages


def python() -> Finding:
    version, tested = sys.version.split()[0], ".".join(map(str, TESTED_PYTHON))
    found = f"{version} ({sys.executable})"
    fix = f"python{tested} -m venv .venv && .venv/bin/pip install -r {REQUIREMENTS}"
    if sys.version_info[:2] == TESTED_PYTHON:
        return Finding("Python", "ok", found)
    if sys.version_info[:2] < TESTED_PYTHON:
        return Finding("Python", "FAIL", f"{found}: {tested} is needed", fix)
    return Finding("Python", "warn", f"{found}: tested with {tested} only", fix)


def pins() -> dict[str, str]:
    """Distribution -> version, as requirements.txt pins it; empty where that is not beside the code."""
    text = REQUIREMENTS.read_text() if REQUIREMENTS.is_file() else ""
    return dict(re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.MULTILINE))


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> list[Finding]:
    """Whether what is pinned is installed, in these versions. Nothing is imported."""
    pinned = pins()
    if not pinned:
        return [Finding("packages", "warn", f"{REQUIREMENTS} is not there: nothing to compare their versions with")]
    installed = {name: version_of(name) for name in pinned}
    missing = [name for name, version in installed.items() if version is None]
    needed = [name for name in missing if name not in ONLY_SOME_COMMANDS]
    other = [
        f"{name} {version} (tested: {pinned[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != pinned[name]
    ]
    found = []
    for name, versions in MALWARE.items():
        if installed.get(name) in versions:
            what = f"{name} {installed[name]} on PyPI was malware: it has not been imported here; change your passwords"
            found.append(Finding("packages", "FAIL", what, _install()))
    if missing:
        what = f"not installed: {', '.join(missing)}"
        found.append(Finding("packages", "FAIL" if needed else "warn", what, _install()))
    if other:
        found.append(Finding("packages", "warn", f"not the tested versions: {', '.join(other)}", _install()))
    return found or [Finding("packages", "ok", f"{len(pinned)} in the versions of {REQUIREMENTS.name}")]


def torch_pair() -> Finding:
    """torch and torchaudio must be of one version. Nothing is imported."""
    torch, torchaudio = version_of("torch"), version_of("torchaudio")
    found = f"{torch} and {torchaudio}"
    if None in (torch, torchaudio) or torch.partition("+")[0] != torchaudio.partition("+")[0]:
        return Finding("torch, torchaudio", "FAIL", f"{found}: they must be of one version", _install())
    return Finding("torch, torchaudio", "ok", found)


def imports() -> list[Finding]:
    """Whether the installed packages can be imported: their libraries may not fit this machine or one another."""
    found = []
    for name in pins() or ("torch", "torchaudio"):
        if version_of(name) is None:
            continue
        try:
            importlib.import_module(name.replace("-", "_"))
        except Exception as error:  # an OSError where a shared library is missing, and worse
            state = "warn" if name in ONLY_SOME_COMMANDS else "FAIL"
            what = f"{name} cannot be imported: {type(error).__name__}: {one_line(error)}"
            found.append(Finding("imports", state, what, f"{_install()} --force-reinstall --no-cache-dir"))
    return found or [Finding("imports", "ok", "all of them")]


# GPU and compilers


def gpu() -> Finding:
    import torch

    seen = _nvidia_smi()
    if not torch.cuda.is_available():
        if not seen:
            return Finding("GPU", "warn", "none: training runs on the CPU, many times slower", "")
        if torch.version.cuda is None:
            what = f"{seen}, but torch {torch.__version__} is a build without CUDA"
            return Finding("GPU", "FAIL", what, f"{_install()} --force-reinstall")
        what = (
            f"{seen}, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: the driver is too old, "
        )
        what += "or this session may not see the GPU"
        return Finding("GPU", "FAIL", what, "nvidia-smi && echo CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
    made_for = torch.cuda.get_arch_list()
    shown, strange = [], []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        shown.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
        if not runs_on(made_for, major, minor):
            strange.append(shown[-1])
    found = f"{', '.join(shown)}; CUDA {torch.version.cuda}, torch made for {' '.join(made_for)}"
    if strange:
        found += f"; not for {', '.join(strange)}: choose a build of torch that is (pytorch.org/get-started)"
        return Finding("GPU", "FAIL", found, "python -m torch.utils.collect_env")
    return Finding("GPU", "ok", found)


def runs_on(made_for: list[str], major: int, minor: int) -> bool:
    """Whether kernels for these architectures (sm_90, compute_90, ...) run on a GPU of a compute capability: machine
    code on later ones of the same major version, PTX (compute_) on all later ones."""
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(made_for)):
        arch = divmod(int(digits), 10)
        if arch <= (major, minor) and (kind == "compute" or arch[0] == major):
            return True
    return False


def _nvidia_smi() -> str:
    """Names of GPUs, and the driver's version, as the driver tells them; "" where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (
        ", ".join(f"{row} (name, driver)" for row in done.stdout.strip().splitlines()) if done.returncode == 0 else ""
    )


def cxx_compiler() -> Finding:
    command = (os.environ.get("CXX") or "g++").split()[0]
    path = shutil.which(command)
    if path:
        return Finding("C++ compiler", "ok", f"{path}, for --compile on the CPU")
    return Finding("C++ compiler", "-", f"no {command}: --compile does not work on the CPU", "apt install g++")


# The selective scan


def scan_backends() -> list[Finding]:
    """Each backend with its self-test, forward and backward, and why the others do not work; then which is taken."""
    import torch

    from aum.scan import backends

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for name in ("cpu", "triton", "mamba_ssm", "torch"):
        backend = backends.BACKENDS[name]
        reason = backend.missing()
        own = [device for device in devices if not backend.devices or device in backend.devices]
        if reason and not own:
            found.append(Finding(f"scan: {name}", "-", "for NVIDIA GPUs, and torch sees none here"))
        elif reason:
            slower = name in [FASTEST[device] for device in devices]
            found.append(Finding(f"scan: {name}", "warn" if slower else "-", reason, _fix_of(name)))
        elif not own:
            found.append(Finding(f"scan: {name}", "-", "can be imported; there is no GPU for it to run on"))
        else:
            found.append(_self_tests(name, own))
    return [*found, _choice(devices[-1])]


def _self_tests(name: str, devices: list[str]) -> Finding:
    import torch

    import aum
    from aum.scan.backends import use_backend

    begun, passed = time.monotonic(), []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                with use_backend(name):
                    aum.self_test(device, dtype)
            except (aum.SelfTestFailed, ValueError) as error:
                message = one_line(error)
                if "no kernel image" in message:
                    message = f"built for another GPU's architecture: {message}"
                return Finding(f"scan: {name}", "FAIL", f"self-test: {message}", _fix_of(name))
            passed.append(f"{str(dtype).removeprefix('torch.')} on {device}")
    seconds = time.monotonic() - begun
    return Finding(f"scan: {name}", "ok", f"self-test passed: {', '.join(passed)} ({seconds:.1f} s)")


def _fix_of(name: str) -> str:
    return {
        "cpu": "apt install gcc libc6-dev",
        "triton": f"apt install gcc libc6-dev; {_install()}",
        "mamba_ssm": f"cat {REQUIREMENTS.with_name('requirements-cuda.txt')}",
        "torch": f"{_install()} --force-reinstall",
    }[name]


def _choice(device: str) -> Finding:
    import torch

    from aum.scan import choose

    try:
        name = choose(device, torch.float32)
    except ValueError as error:
        return Finding("scan: taken", "FAIL", one_line(error), "unset AUM_SCAN_BACKEND")
    asked = ", as AUM_SCAN_BACKEND says" if os.environ.get("AUM_SCAN_BACKEND") else ""
    return Finding("scan: taken", "ok", f"{name} on {device}{asked}")


# W&B


def wandb_login() -> Finding:
    """Whether there are credentials on this machine; whether W&B accepts them is not asked."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("W&B", "ok", f"WANDB_MODE={mode}")
    asked = "import sys, wandb; sys.exit(0 if wandb.login(prompt=False, verify=False) else 3)"
    # In a process of its own, and silent: to greet a user by name, it would ask its server.
    try:
        done = subprocess.run(
            [sys.executable, "-c", asked],
            env={**os.environ, "WANDB_SILENT": "true"},
            capture_output=True,
            text=True,
            timeout=_WANDB_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return Finding("W&B", "warn", f"no answer in {_WANDB_TIMEOUT} s; --wandb_mode offline never waits for it")
    if done.returncode == 0:
        return Finding("W&B", "ok", "logged in (not verified: no network was used)")
    if done.returncode == 3:
        return Finding("W&B", "warn", "not logged in: runs are kept offline, for `wandb sync`", "wandb login")
    last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
    return Finding("W&B", "warn", f"cannot be used: {last}", _install())


# Disk


def disk(name: str, folder: Path, fix: str) -> Finding:
    """Free space where ``folder`` is, or will be made, and whether it may be written to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "FAIL", f"{folder} cannot be written: {there} is no folder or may not be changed", fix)
    free = shutil.disk_usage(there).free
    found = f"{free / 1e9:,.1f} GB free at {folder}"
    if free < FULL_DISK:
        return Finding(name, "FAIL", f"{found}: too little for a run's checkpoints", fix)
    if free < LOW_DISK:
        return Finding(name, "warn", f"{found}: little for a run's checkpoints", fix)
    return Finding(name, "ok", found)
