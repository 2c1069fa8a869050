"""Tiny data folders in TAU22's layout: one of noise, to read and check, and one that a model learns in seconds."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 44100  # Hz
META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")

RATE = 8000  # Hz, of the tones
HERTZ = {"airport": 300, "bus": 700, "park": 1500, "tram": 3000}
SCENES = tuple(HERTZ)

# A front end and a model of a few thousand parameters for the tones: an epoch takes a second.
SMALL = (
    "--model aum_tiny --pos_embed True --head linear --embed_dim 16 --depth 1 --d_state 4 --patch_size 8,4 "
    "--orig_sample_rate 8000 --sample_rate 8000 --window_length 256 --n_fft 256 --hop_length 128 --n_mels 32 --freqm 4 "
    "--timem 4 --num_workers 0 --wandb_mode disabled --accelerator cpu"
).split()
QUIET = "--num_workers 0 --wandb_mode disabled --accelerator cpu".split()  # of SMALL, where a checkpoint has the rest
FIT = "--n_epochs 4 --batch_size 16 --lr 0.01 --warmup_steps 5 --check_val_every_n_epoch 3 --val_fraction 0.34".split()
DEVICE_FIT = "--n_epochs 2 --batch_size 8 --lr 0.003 --warmup_steps 2 --check_val_every_n_epoch 1".split()


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
    if fault in ("nan", "inf", "3e38"):
        samples[3] = float(fault)
    samples = {
        "no samples": np.zeros(0),
        "silent": np.zeros(4410),
        "offset": np.full(4410, 0.25),
        "short": samples[:-1],
    }.get(fault, samples)
    soundfile.write(path, samples, 1 if fault == "rate" else SAMPLE_RATE, subtype="FLOAT")
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


def tone(scene: str, device: str, seed: int, n_samples: int = RATE // 2) -> np.ndarray:
    """(n_samples,) float64: a scene's tone in noise; devices differ in level."""
    rng = np.random.default_rng(seed)
    time = np.arange(n_samples) / RATE
    level = 0.3 if device == "a" else 0.1
    return level * np.sin(2 * np.pi * HERTZ[scene] * time * rng.uniform(0.9, 1.1)) + rng.normal(0, 0.05, len(time))


def write_tones(
    folder: Path,
    places: Sequence[int] = (1, 2, 3),
    n_pieces: int = 2,
    test_devices: Sequence[str] = ("a", "b", "s1", "s4"),
    n_samples: int = RATE // 2,
) -> None:
    """4 scenes at 3 training locations on devices a, b, s1, and at a test location on s4, too: 72 + 32 clips."""
    scenes, pieces = list(enumerate(SCENES)), range(n_pieces)
    train = [
        clip_row(scene, "lyon", 10 * number + place, piece, device)
        for (number, scene), place, piece, device in product(scenes, places, pieces, ("a", "b", "s1"))
    ]
    test = [
        clip_row(scene, "paris", 100 + number, piece, device)
        for (number, scene), piece, device in product(scenes, pieces, test_devices)
    ]
    write_lists(folder, train, test)
    (folder / "audio").mkdir()
    for seed, (name, scene, _, device) in enumerate(train + test):
        soundfile.write(folder / name, tone(scene, device, seed, n_samples), RATE, subtype="PCM_16")
