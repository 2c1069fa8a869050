"""Programs that data.py runs in fresh processes: python benchmarks/data_programs.py NAME FOLDER PACK_DIR

Each prints a line of JSON at its end. Functions import what they need: the imports are part of what is measured.
"""

import atexit
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def report() -> None:
    """Print seconds (clock, CPU time) and bytes (peak, memory without files' pages, the largest worker's peak)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, workers = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {
        "clock": time.monotonic(),
        "cpu": own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime,
        "peak": 1024 * int(status["VmHWM"].split()[0]),  # getrusage's would include the process this was forked from
        "anonymous": 1024 * int(status["RssAnon"].split()[0]),
        "worker_peak": 1024 * workers.ru_maxrss,
    }
    print(json.dumps(figures))


def import_torch(folder: Path, pack_dir: Path) -> None:
    import torch  # noqa: F401


def first_batch(folder: Path, pack_dir: Path) -> None:
    """Open both splits as the training scripts do, and read a batch."""
    import numpy as np

    data = data_sets(folder, pack_dir)[0]
    data.__getitems__(np.random.default_rng(0).permutation(len(data))[:64].tolist())


def every_clip(folder: Path, pack_dir: Path) -> None:
    for data in data_sets(folder, pack_dir):
        for i in range(0, len(data), 64):
            data.__getitems__(range(i, min(i + 64, len(data))))


def data_sets(folder: Path, pack_dir: Path) -> list:
    """Return both splits' data sets, after the check that no recording has changed since it was packed."""
    from dcase.data.dataset import TAU22, Sound
    from dcase.data.pack import Pack
    from dcase.data.tau22 import load_splits

    pack = Pack(pack_dir)
    sets = [TAU22(clips, Sound(pack.rates.sample_rate, pack=pack)) for clips in load_splits(folder, "split25", "test")]
    assert not any(pack.changed_sources(folder, data.rows) for data in sets)
    return sets


def read_and_resample(folder: Path, pack_dir: Path) -> None:
    """Read and resample the clips as `prepare --pack` does, over all cores, and write nothing."""
    from concurrent.futures import ProcessPoolExecutor

    import torch

    from dcase.data.tau22 import check_files, load_splits

    paths = set()
    for clips in load_splits(folder, "split25", "test"):
        check_files(clips)
        paths |= {folder / name.decode() for name in clips.filenames.tolist()}
    paths = sorted(paths)
    chunks = [paths[i : i + 32] for i in range(0, len(paths), 32)]  # as packing does
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(resample_chunk, chunks))


def resample_chunk(paths: list[Path]) -> None:
    import torch

    from dcase.data.sound import read_wav, resampler

    waveforms = torch.stack([read_wav(path, 44100) for path in paths])
    resampler(44100, 32000)(waveforms)  # the defaults of prepare


def pack(folder: Path, pack_dir: Path) -> None:
    from dcase.prepare import main

    sys.argv[1:] = ["--pack", "--dataset_dir", str(folder), "--pack_dir", str(pack_dir)]
    main()


if __name__ == "__main__":
    atexit.register(report)  # after the workers have ended
    program, *places = sys.argv[1:]
    globals()[program](*map(Path, places))
