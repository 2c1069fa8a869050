"""Writing files that matter, under a temporary name beside their place, then renamed; reading only regular files; and
locks of folders."""

import errno
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dcase.errors import UserError

_HOST = re.sub(r"\W", "-", platform.node())[:32]  # in names of files: a folder may be shared by several machines
_OLD = 7 * 24 * 3600  # seconds after which nobody writes a file any more


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename that file to ``path``, making its folder first:
    a reader, or a run after a kill, sees the complete old or new file.

    Raises `UserError`, naming the file, where it cannot be written; the old file stays.
    """
    beside = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}")
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
    """Remove what killed processes left beside this file while they wrote it; another machine's after `_OLD`."""
    for half in path.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(path.name)}\.(?:([\w-]*)\.)?(\d+)", half.name)  # before: no host
        with suppress(FileNotFoundError):  # another process was faster
            if found and found[1] in (_HOST, None):
                gone = not _is_running(int(found[2]))
            else:
                gone = found and time.time() - half.lstat().st_mtime > _OLD
            if gone:
                half.unlink()


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


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder, its file ``.lock``. Raises `UserError`, naming ``what`` and the process that holds it.

    The kernel's lock ends with this process, however that ends, and network file systems share it; processes that this
    one starts do not inherit it. On a file system without locks the file's content counts: a process of this machine
    must be running; one of another machine is believed unless its SLURM job is this one, started again. A process must
    not take a lock twice: the end of the second would end the first.
    """
    path, job = folder / ".lock", os.environ.get("SLURM_JOB_ID", "")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): check rights and space there") from error
    try:
        found = re.fullmatch(r"(\d+) (\S+) (\S*)\n", os.pread(file, 1000, 0).decode(errors="replace"))
        pid, host, of_job = found.groups() if found else ("0", "", "")
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except (OSError, ImportError) as error:
            locked = taken = getattr(error, "errno", 0) in (errno.EACCES, errno.EAGAIN)
            if found and not locked:  # there are no locks here; a container may give the same id again
                runs = int(pid) != os.getpid() and _is_running(int(pid))
                taken = runs if host == _HOST else not job or job != of_job
        if taken:
            who, stop = (f"process {pid} on {host}", f"there (kill {pid})") if found else ("another process", "")
            gone = "" if locked and host == _HOST else f"; if it has ended, delete {path}"
            raise UserError(f"{what} is in use by {who}: wait for its end, or stop it {stop}".rstrip() + gone)
        with suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()} {_HOST} {job}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


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
