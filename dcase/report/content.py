"""What a page shows of a run, computed once."""

from dataclasses import dataclass
from pathlib import Path

from dcase.data.tau22 import DEVICES
from dcase.report.bootstrap import Figures
from dcase.report.gallery import Gallery
from dcase.report.mistakes import most_confident
from dcase.report.run_files import Finished
from dcase.report.sounds import data_folder
from dcase.runs.config import EvalConfig, from_plain

MISTAKES, MISTAKES_OF_DEVICE = 12, 4  # shown: of all, and of each device


@dataclass(frozen=True, eq=False)
class Content:
    run: Finished
    figures: Figures | None  # None, as the gallery: there are no predictions
    gallery: Gallery | None
    mistakes: list[int]  # rows of the predictions
    device_mistakes: dict[str, list[int]]


def compute(run: Finished, folder: Path | None = None, with_audio: bool = True) -> Content:
    """``folder``: of the data; None: the one that the run's configuration says."""
    p = run.predictions
    if p is None:
        return Content(run, None, None, [], {})
    mistakes = most_confident(p, MISTAKES)
    by_device = {d: most_confident(p, MISTAKES_OF_DEVICE, i) for i, d in enumerate(DEVICES)}
    config = from_plain(EvalConfig, {name: run.config[name] for name in ("data", "logmel") if name in run.config})
    folder = folder or data_folder(config.data, run.results["data"])
    rows = [*mistakes, *(row for rows in by_device.values() for row in rows)]
    gallery = Gallery(p, rows, folder, config.data, config.logmel, with_audio)
    return Content(run, Figures(p), gallery, mistakes, by_device)
