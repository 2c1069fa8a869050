"""Measure the report's page for a test of TAU22's size: seconds to make it, its bytes, and seconds to open it.

    python benchmarks/report.py [--folder FOLDER]

It makes up predictions of 29,680 clips, with names, places and devices like TAU22's, and recordings of the clips that
the page shows. With Chromium on the PATH it opens the page, too.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from browser import LAPTOP, Browser, find_browser
from made_up_run import made_up, write_run

from dcase import cli
from dcase.data.tau22 import TEST_CLIPS
from dcase.errors import run
from dcase.report import gallery, markdown
from dcase.report.page import write_page
from dcase.report.run_files import read_finished
from dcase.report.sounds import Recordings

RATE = 44_100  # Hz


@dataclass(frozen=True)
class ReportBenchmark:
    folder: Path | None = None
    """Folder to leave the run in; None: a temporary one."""


class MadeUpRecordings(Recordings):
    """Writes each recording when it is first read, so that the timed pages read real files."""

    def read(self, filename: str):
        path = self.folder / filename
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.random.default_rng(0).normal(0, 0.05, RATE), RATE, subtype="PCM_24")
        return super().read(filename)


def opened(path: Path) -> str:
    found = find_browser()
    if found is None:
        return "no Chromium here"
    with Browser(found) as browser:
        browser.screen(LAPTOP)
        times = [browser.open(path.as_uri()) for _ in range(3)]
    return f"{min(times):.2f} s (first time {times[0]:.2f} s)"


def measure(folder: Path) -> str:
    """Return the table."""
    predictions = made_up(n=TEST_CLIPS)
    write_run(folder / "run", predictions, folder / "data")
    gallery.Recordings = MadeUpRecordings
    write_page(read_finished(folder / "run"))
    gallery.Recordings = Recordings
    rows = []
    for with_audio in (False, True):
        start = time.perf_counter()
        path = write_page(read_finished(folder / "run"), with_audio=with_audio)
        made, size = f"{time.perf_counter() - start:.2f} s", f"{path.stat().st_size / 1e6:.2f} MB"
        rows.append(["with sound" if with_audio else "without sound", made, size, opened(path)])
    return markdown([f"Page of {len(predictions):,} clips", "made in", "size", "opened in"], rows)


def main() -> None:
    folder = cli.parse(ReportBenchmark, __doc__).folder
    with tempfile.TemporaryDirectory() as place:
        print(measure(folder or Path(place)))


if __name__ == "__main__":
    run(main)
