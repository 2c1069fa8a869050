"""A disk that fills: a small file system of its own, or a limit on files' sizes (always, where none may be mounted)."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drills.drill import Disturbance, Drill, disturb, must_name
from drills.faults import LimitFileSize
from drills.tasks import any_task
from drills.world import World
from drills.zygote import Finished

_ROOM = 200 << 20  # bytes


class Disk:
    """A file system in memory, or an ordinary folder."""

    def __init__(self, folder: Path, mounted: bool):
        self.folder = folder
        folder.mkdir()
        self.mounted = mounted and self._mount(f"size={_ROOM}", "-t", "tmpfs", "drills")

    def leave(self, n_bytes: int) -> list[LimitFileSize]:
        """Make the disk so small that there is this much room; the fault to put into a process where that cannot be."""
        if not self.mounted:
            return [LimitFileSize(n_bytes)]
        blocks = [path.stat().st_blocks * 512 for path in self.folder.rglob("*")]
        self._mount(f"remount,size={sum(blocks) + n_bytes}")
        return []

    def _mount(self, options: str, *more: str) -> bool:
        try:
            done = subprocess.run(["mount", "-o", options, *more, str(self.folder)], capture_output=True)
        except OSError:
            return False
        return done.returncode == 0

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@contextmanager
def disk(folder: Path, mounted: bool) -> Iterator[Disk]:
    made = Disk(folder, mounted)
    try:
        yield made
    finally:
        made.close()


class FullDisk(Disturbance):
    """Less room than a task needs."""

    def __init__(self, disk: Disk, n_bytes: int, named: tuple[str, ...]):
        self.disk, self.named = disk, named
        self.faults = disk.leave(n_bytes)
        self.text = f"a disk with {n_bytes} bytes free ({'limited' if self.faults else 'mounted'})"

    def check(self, done: Finished) -> None:
        must_name(done, *self.named)

    def undo(self) -> None:
        self.disk.leave(_ROOM)


def fills(world: World, drill: Drill) -> None:
    with disk(drill.folder / "disk", drill.rng.random() < 0.6) as small:
        task = any_task(world, drill, small.folder)

        def disturbances() -> Iterator[Disturbance]:
            while True:
                most = task.n_bytes // (1 if small.mounted else 3)  # a limit is for a single file
                yield FullDisk(small, drill.rng.randrange(1000, most), task.named)

        try:
            disturb(task, disturbances())
        finally:
            small.leave(_ROOM)
