"""How every file that matters is written: beside its place, then renamed."""

import os
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
