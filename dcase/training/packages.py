"""Logits of clips from a challenge's inference package, another's or `dcase.submit`'s, in a process of its own.

A package is what the challenge calls: a module with ``predict(file_paths, device_ids, ...)``, which returns the logits
of each file and the scenes in their order. Calling it runs its authors' code.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dcase.data.tau22 import Clips, check_files
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.training import call_package

SYSTEM = "*_task1_[1-9].py"  # of a package's folder


def find_package(given: str) -> Path | None:
    """Return the file of a package's module, given as PATH/Doe_Uni_task1_1.py, as a folder that holds one system, or as
    the name of an installed module such as Doe_Uni_task1.Doe_Uni_task1_1. None for what looks like none of these.

    Raises `UserError` where there is no such file or module, and where a folder holds several systems.
    """
    path = Path(given)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError("is no file")
        return path
    if path.is_dir():
        systems = sorted([*path.glob(SYSTEM), *path.glob(f"*_task1/{SYSTEM}")])
        if len(systems) > 1:
            raise UserError(f"holds {len(systems)} systems: give one, {', '.join(map(str, systems))}")
        return systems[0] if systems else None
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", given):
        return None
    top, *rest = given.split(".")
    spec = importlib.util.find_spec(top)  # which imports nothing, as long as it has no dot
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place, *rest).with_suffix(".py")).is_file():
            return path
    raise UserError("is no installed module")


def content_of(module: Path) -> str:
    """Return the SHA-256 of a package's files, code and weights; of a module outside any package, that file's."""
    root, name = _root_and_name(module)
    sha256 = hashlib.sha256(name.encode())
    files = sorted((root / name.split(".")[0]).rglob("*")) if "." in name else [module.absolute()]
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts:
            sha256.update(str(path.relative_to(root)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return sha256.hexdigest()


def write_outputs(module: Path, clips: Clips, use_cuda: bool, out: Path) -> None:
    """Write the package's logits of clips, computed from their WAV files, to an .npz file that `read_logits` takes.

    Raises `UserError` where the package fails.
    """
    check_files(clips)
    root, name = _root_and_name(module)
    job = {
        "root": str(root.absolute()),
        "module": name,
        "folder": str(clips.folder.absolute()),
        "filenames": [clips.name(i) for i in range(len(clips))],
        "device_ids": [clips.labels.devices[device] for device in clips.device.tolist()],
        "use_cuda": use_cuda,
    }
    with TemporaryDirectory() as folder:
        file, found = Path(folder) / "job.json", Path(folder) / "found.npz"
        file.write_text(json.dumps(job | {"out": str(found)}))
        # Its stderr stays: progress bars are there.
        done = subprocess.run([sys.executable, "-P", call_package.__file__, str(file)], stdout=subprocess.DEVNULL)
        if done.returncode or not found.is_file():
            raise UserError(f"predict() of {module} failed, as the lines above say; install what the package needs")
        replace_file(out, lambda beside: shutil.copyfile(found, beside))


def _root_and_name(module: Path) -> tuple[Path, str]:
    """Return the folder from which a module is imported, and its dotted name there."""
    root = module.absolute().parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return root, ".".join(module.absolute().relative_to(root).with_suffix("").parts)
