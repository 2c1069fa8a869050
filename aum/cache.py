"""The cache folder for files that are made once per machine: compiled kernels, the synthetic data set."""

import os
import shlex
import stat
from pathlib import Path


def cache_folder() -> Path:
    """Return ``audio_mamba`` below $AUDIO_MAMBA_CACHE, $XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    base = os.environ.get("AUDIO_MAMBA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "audio_mamba"


def make_cache_folder() -> Path:
    """Return `cache_folder`; it and those of its parents that are missing are made for this user alone."""
    folder = cache_folder()
    for place in (*reversed(folder.parents), folder):
        place.mkdir(0o700, exist_ok=True)  # parents=True would make the parents with the umask's rights
    found = folder.lstat()  # with a umask of 002, earlier versions let the group write; the files are looked at, too
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o022 == 0o020:
        folder.chmod(0o700)
    return folder


def refuse_others(path: Path) -> None:
    """Raise PermissionError where another user could have put a file in the place of ``path``, an absolute one without
    links: where it or a folder above it is not this user's or root's, or others can write it.

    A folder above it that is sticky, as /tmp is, may be writable. In a user namespace, as Apptainer's, root's folders
    seem to be another user's: whoever owns / counts as root.
    """
    for place in (path, *path.parents):
        found, above = place.lstat(), place != path
        if not stat.S_ISDIR(found.st_mode) and (above or not stat.S_ISREG(found.st_mode)):
            raise PermissionError(f"{place} is a link, or no regular file")
        if found.st_uid not in {os.geteuid(), 0, *([os.stat("/").st_uid] if above else [])}:
            raise PermissionError(f"{place} belongs to another user")
        if found.st_mode & 0o022 and not (above and found.st_mode & stat.S_ISVTX):
            raise PermissionError(f"other users can write to {place}: chmod go-w {shlex.quote(str(place))}")
