"""What the report's page costs for a test of TAU22's size: seconds to make, bytes, and seconds to open.

    python benchmarks/report.py [--folder FOLDER]

Predictions are made up, of 29,680 clips under names and with places and devices like TAU22's, and so are recordings of
those clips that are shown. With Chromium on the PATH the page is opened, too.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import LAPTOP, Browser, find_browser  # noqa: E402
from made_up_run import made_up, write_run  # noqa: E402

from dcase.data.tau22 import TEST_CLIPS  # noqa: E402
from dcase.report import gallery, markdown  # noqa: E402
from dcase.report.page import write_page  # noqa: E402
from dcase.report.run_files import read_finished  # noqa: E402
from dcase.report.sounds import Recordings  # noqa: E402

RATE = 44_100  # Hz


class MadeUpRecordings(Recordings):
    """Writes a recording where it is asked for, so that reading it costs what it does."""

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
    predictions = made_up(n=TEST_CLIPS)
    write_run(folder / "run", predictions, folder / "data")
    gallery.Recordings = MadeUpRecordings
    write_page(read_finished(folder / "run"))  # makes the recordings
    gallery.Recordings = Recordings
    rows = []
    for with_audio in (False, True):
        start = time.perf_counter()
        path = write_page(read_finished(folder / "run"), with_audio=with_audio)
        seconds, size = time.perf_counter() - start, path.stat().st_size
        name = "with sound" if with_audio else "without sound"
        rows.append([name, f"{seconds:.2f} s", f"{size / 1e6:.2f} MB", opened(path)])
    return markdown([f"Page of {len(predictions):,} clips", "made in", "size", "opened in"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to leave the run; a temporary folder without it")
    folder = parser.parse_args().folder
    if folder:
        print(measure(folder))
    else:
        with tempfile.TemporaryDirectory() as place:
            print(measure(Path(place)))


if __name__ == "__main__":
    main()
