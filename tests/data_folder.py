"""A tiny data folder in TAU22's layout, its clips noise: what the tests of reading and checking need, no more."""

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 44100  # Hz
META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")


def noise(seed: int, n_samples: int = 4410) -> np.ndarray:
    """(n_samples,) float64, level about -20 dBFS."""
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).clip(-0.9, 0.9)


def write_list(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + end for row in (columns, *rows)), newline="")


def write_lists(folder: Path, train: list[tuple[str, ...]], test: list[tuple[str, ...]], end: str = "\n") -> None:
    """meta.csv, split25.csv and test.csv of rows in meta.csv's columns."""
    write_list(folder / "meta.csv", META_COLUMNS, train + test, end)
    for split, rows in (("split25", train), ("test", test)):
        write_list(folder / "split_setup" / f"{split}.csv", META_COLUMNS[:2], [row[:2] for row in rows], end)


def clip_row(scene: str, city: str, location: int, piece: int, device: str) -> tuple[str, str, str, str]:
    """A row of meta.csv."""
    name = f"audio/{scene}-{city}-{location}-{location * 10}-{piece}-{device}.wav"
    return name, scene, f"{city}-{location}", device


def write_data_folder(folder: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Two scenes at two places on two devices each in split25, each scene once on s4 in test: 16 + 2 clips of 0.1 s."""
    train = [
        clip_row(scene, "lisbon", 100 * number + place, piece, device)
        for number, scene in enumerate(("airport", "tram"), start=1)
        for place in (1, 2)
        for piece in (0, 1)
        for device in ("a", "s1")
    ]
    test = [clip_row("airport", "lyon", 7, 0, "s4"), clip_row("tram", "lyon", 8, 0, "s4")]
    write_lists(folder, train, test)
    (folder / "audio").mkdir()
    for seed, (name, *_) in enumerate(train + test):
        soundfile.write(folder / name, noise(seed), SAMPLE_RATE, subtype="PCM_24")
    return train, test


def write_fault(path: Path, fault: str) -> None:
    """A sound file of 0.1 s with one fault."""
    samples = noise(99)
    if fault in ("nan", "inf"):
        samples[3] = float(fault)
    samples = {
        "no samples": np.zeros(0),
        "silent": np.zeros(4410),
        "offset": np.full(4410, 0.25),
        "stereo": np.stack([samples, samples], axis=1),
        "short": samples[:-1],
    }.get(fault, samples)
    soundfile.write(path, samples, 32000 if fault == "rate" else SAMPLE_RATE, subtype="FLOAT")
    if fault == "missing":
        path.unlink()
    elif fault == "text":
        path.write_bytes(b"Not Found\n" * 100)
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "truncated header":
        path.write_bytes(path.read_bytes()[:30])
    elif fault == "no bytes":
        path.write_bytes(b"")
