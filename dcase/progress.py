"""Progress bars, redrawn often in a terminal and rarely in a log file (nohup, SLURM)."""

import sys
from typing import TextIO

from tqdm import tqdm

IN_A_FILE = 30  # seconds between two drawings of a bar


def on_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def progress(*args, **kwargs) -> tqdm:
    """Return tqdm's bar, on stderr."""
    rarely = {} if on_terminal(sys.stderr) else {"mininterval": IN_A_FILE, "maxinterval": IN_A_FILE}
    return tqdm(*args, **rarely, **kwargs)
