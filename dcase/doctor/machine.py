"""Checks of the machine, for `dcase.doctor`: Python and packages, GPU, compilers, scan backends, W&B, free disk.

Anything that may be broken is imported inside the check that looks at it. Nothing here waits for a network.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dcase.doctor.findings import Finding
from dcase.errors import one_line

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
INSTALL = f"{sys.executable} -m pip install -r {REQUIREMENTS}"
TESTED_PYTHON = (3, 11)
MALWARE = {"pytorch-lightning": ("2.6.2", "2.6.3")}  # requirements.txt has the source
OPTIONAL = {"huggingface_hub", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "wandb", "tensorboard"}
MODULES = {"pyyaml": "yaml"}  # distribution -> module, where the names differ in more than case and dashes
LOW_DISK, FULL_DISK = 5e9, 5e8  # bytes: a run of AuM-Small keeps 0.7e9, its checkpoints are written beside the old ones
FASTEST = {"cpu": "cpu", "cuda": "triton"}  # device -> scan backend: without it training is several times slower
SCAN_FIXES = {
    "cpu": "apt install gcc libc6-dev",
    "triton": f"apt install gcc libc6-dev; {INSTALL}",
    "mamba_ssm": f"cat {REQUIREMENTS.with_name('requirements-cuda.txt')}",
    "torch": f"{INSTALL} --force-reinstall",
}
_GPU_TIMEOUT, _WANDB_TIMEOUT = 10, 20  # seconds


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
    """Return distribution -> version, as pinned in requirements.txt; empty where that is not beside the code."""
    text = REQUIREMENTS.read_text() if REQUIREMENTS.is_file() else ""
    return dict(re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.MULTILINE))


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution, without a local part such as +cu128."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def packages() -> list[Finding]:
    """Check that the pinned packages are installed in these versions. Nothing is imported."""
    pinned = pins()
    installed = {name: version_of(name) for name in {**pinned, "torch": "", "torchaudio": ""}}
    missing = [name for name in pinned if installed[name] is None]
    other = [
        f"{name} {installed[name]} (tested: {version})"
        for name, version in pinned.items()
        if installed[name] not in (version, None)
    ]
    found = []
    for name, versions in MALWARE.items():
        if installed.get(name) in versions:
            what = f"{name} {installed[name]} on PyPI was malware: it has not been imported here; change your passwords"
            found.append(Finding("packages", "FAIL", what, INSTALL))
    if missing:
        state = "warn" if OPTIONAL.issuperset(missing) else "FAIL"
        found.append(Finding("packages", state, f"not installed: {', '.join(missing)}", INSTALL))
    if other:
        found.append(Finding("packages", "warn", f"not the tested versions: {', '.join(other)}", INSTALL))
    if installed["torch"] is None or installed["torch"] != installed["torchaudio"]:
        what = f"torch {installed['torch']} and torchaudio {installed['torchaudio']}: they must be of one version"
        found.append(Finding("packages", "FAIL", what, INSTALL))
    if not pinned:
        what = f"{REQUIREMENTS} is missing: there is nothing to compare their versions with"
        found.append(Finding("packages", "warn", what))
    return found or [Finding("packages", "ok", f"{len(pinned)} in the versions of {REQUIREMENTS.name}")]


def imports() -> list[Finding]:
    """Import the installed packages: their libraries may not fit this machine or one another."""
    found = []
    for name in filter(version_of, pins() or ("torch", "torchaudio")):
        module = name.replace("-", "_").lower()
        try:
            importlib.import_module(MODULES.get(module, module))
        except Exception as error:  # an OSError where a shared library is missing, and worse
            state = "warn" if name in OPTIONAL else "FAIL"
            what = f"{name} cannot be imported: {type(error).__name__}: {one_line(error)}"
            found.append(Finding("imports", state, what, f"{INSTALL} --force-reinstall --no-cache-dir"))
    return found or [Finding("imports", "ok", "all of them")]


# GPU and compilers


def gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        seen = _nvidia_smi()
        if not seen:
            return Finding("GPU", "warn", "none: training runs on the CPU, many times slower")
        if torch.version.cuda is None:
            what = f"{seen}, but torch {torch.__version__} is a build without CUDA"
            return Finding("GPU", "FAIL", what, f"{INSTALL} --force-reinstall")
        what = (
            f"{seen}, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: the driver is too old, "
            "or this session may not see the GPU"
        )
        return Finding("GPU", "FAIL", what, "nvidia-smi && echo CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
    found = []
    for i in range(torch.cuda.device_count()):
        found.append(f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})")
        try:
            torch.ones(1, device=f"cuda:{i}").add(1).item()
        except RuntimeError as error:
            what = f"{found[-1]} does not run torch {torch.__version__} (CUDA {torch.version.cuda}): {one_line(error)}"
            if "no kernel image" not in str(error):  # out of memory, or used exclusively by another process
                return Finding("GPU", "warn", what, "nvidia-smi")
            what += "; choose a build of torch for it (pytorch.org/get-started)"
            return Finding("GPU", "FAIL", what, "python -m torch.utils.collect_env")
    return Finding("GPU", "ok", f"{', '.join(found)}; CUDA {torch.version.cuda}")


def _nvidia_smi() -> str:
    """Return the GPUs' names and the driver's version, as the driver tells them; "" where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(f"{row} (name, driver)" for row in done.stdout.strip().splitlines())


def cxx_compiler() -> Finding:
    command = (os.environ.get("CXX") or "g++").split()[0]
    path = shutil.which(command)
    if path:
        return Finding("C++ compiler", "ok", f"{path}, for --compile on the CPU")
    return Finding("C++ compiler", "-", f"no {command}: --compile does not work on the CPU", "apt install g++")


# The selective scan


def scan_backends() -> list[Finding]:
    """Check each backend by its self-test, forward and backward; the last finding is the one that is taken."""
    import torch

    from aum.scan import backends, choose

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for name, fix in SCAN_FIXES.items():
        backend = backends.BACKENDS[name]
        reason = backend.missing()
        own = [device for device in devices if not backend.devices or device in backend.devices]
        if reason and not own:
            state, what, fix = "-", "for NVIDIA GPUs, and torch sees none here", ""
        elif reason:
            slower = name in [FASTEST[device] for device in devices]
            state, what = "warn" if slower else "-", reason
        elif not own:
            state, what, fix = "-", "can be imported; there is no GPU for it to run on", ""
        else:
            state, what = _self_tests(name, own)
        found.append(Finding(f"scan: {name}", state, what, "" if state == "ok" else fix))
    device = devices[-1]
    try:
        asked = ", as AUM_SCAN_BACKEND says" if os.environ.get("AUM_SCAN_BACKEND") else ""
        taken = Finding("scan: taken", "ok", f"{choose(device, torch.float32)} on {device}{asked}")
    except ValueError as error:
        taken = Finding("scan: taken", "FAIL", one_line(error), "unset AUM_SCAN_BACKEND")
    return [*found, taken]


def _self_tests(name: str, devices: list[str]) -> tuple[str, str]:
    """Return a finding's state and text."""
    import torch

    import aum
    from aum.scan.backends import use_backend

    passed = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                with use_backend(name):
                    aum.self_test(device, dtype)
            except (aum.SelfTestFailed, ValueError) as error:
                built = "built for another GPU's architecture: " if "no kernel image" in str(error) else ""
                return "FAIL", f"self-test: {built}{one_line(error)}"
            passed.append(f"{str(dtype).removeprefix('torch.')} on {device}")
    return "ok", f"self-test passed: {', '.join(passed)}"


# W&B


def wandb_login() -> Finding:
    """Check for credentials on this machine; whether W&B accepts them is not asked."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("W&B", "ok", f"WANDB_MODE={mode}")
    # In another process, and silent: to greet a user by name, W&B would ask its server.
    program = "import sys, wandb; sys.exit(0 if wandb.login(prompt=False, verify=False) else 3)"
    command, env = [sys.executable, "-c", program], {**os.environ, "WANDB_SILENT": "true"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_WANDB_TIMEOUT)
    except subprocess.TimeoutExpired:
        return Finding("W&B", "warn", f"no answer in {_WANDB_TIMEOUT} s; --wandb_mode offline never waits for it")
    if done.returncode == 0:
        return Finding("W&B", "ok", "logged in (not verified: no network was used)")
    if done.returncode == 3:
        return Finding("W&B", "warn", "not logged in: runs are kept offline, for `wandb sync`", "wandb login")
    last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
    return Finding("W&B", "warn", f"cannot be used: {last}", INSTALL)


# Disk


def disk(name: str, folder: Path, fix: str) -> Finding:
    """Check the free space of a folder that need not exist yet, and whether it may be written to."""
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
