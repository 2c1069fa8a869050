"""How every file that matters is written: beside its place, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dcase.errors import UserError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then rename it: a reader, or a run after a kill, sees the old file or
    the new one, never half of one. The folder is made where it is missing.

    Raises `UserError`, naming the file, where it cannot be written; what was there stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be written ({reason}): check rights and space there") from error


def keep_copy(path: Path, copy: Path) -> None:
    """Make ``copy`` the same file as ``path``, without copying where the file system has hard links."""
    beside = copy.with_name(f".{copy.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)
        os.replace(beside, copy)
    except OSError as error:
        raise UserError(f"{copy} cannot be written ({error.strerror}): check rights and space there") from error
    finally:
        beside.unlink(missing_ok=True)
