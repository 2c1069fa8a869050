"""Writing files that matter: under a temporary name beside their place, then renamed. Reading only regular files."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcase.errors import UserError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename that file to ``path``, making its folder first:
    a reader, or a run after a kill, sees the complete old or new file.

    Raises `UserError`, naming the file, where it cannot be written; the old file stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_halves(path)
        try:
            beside.unlink(missing_ok=True)  # from a killed process that had this one's id
            write(beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|unexpected pos|iostream", str(error)):
            raise  # these are what torch.save makes of a full disk
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be written ({reason}): check rights and space there") from error


def _remove_halves(path: Path) -> None:
    """Remove what killed processes left beside this file while they wrote it."""
    for half in path.parent.iterdir():
        pid = half.name.removeprefix(f".{path.name}.")
        if pid != half.name and pid.isdigit() and not _is_running(int(pid)):
            half.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def regular(path: Path | str) -> Path | str:
    """Return a path to open. Raises OSError where it is no regular file: a FIFO may wait for ever, and a device may
    never end. Where its name is not UTF-8, which neither libsndfile nor a csv file takes, it raises OSError too."""
    mode, name = os.stat(path).st_mode, os.fspath(path)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", name)
    if not stat.S_ISREG(mode):
        kind = "FIFO" if stat.S_ISFIFO(mode) else "device or socket"
        raise OSError(errno.EINVAL, f"it is a {kind}, no regular file", name)
    if name.encode(errors="ignore").decode() != name:
        raise OSError(errno.EILSEQ, "its name is not UTF-8: rename it", name)
    return path


def keep_copy(path: Path, copy: Path) -> None:
    """Make ``copy`` the same file as ``path``, as a hard link where the file system has them."""

    def link(beside: Path) -> None:
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)

    replace_file(copy, link)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda beside: beside.write_text(text))
