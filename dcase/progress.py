"""Progress bars: in a terminal often, in a log file (nohup, SLURM) seldom."""

import sys
from functools import partial

from tqdm import tqdm


def on_terminal() -> bool:
    return sys.stderr.isatty()


# Seconds between two drawings of a bar. In a file each is a line of its own.
progress = partial(tqdm, mininterval=0.1 if on_terminal() else 30)
