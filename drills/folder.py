"""Data folders that are read in seconds, and the flags of runs on them."""

import os
import shutil
from pathlib import Path

import numpy as np
import soundfile

RATE = 8000  # Hz
PACK_RATE = 16000  # Hz, of the packs of the many clips: resampling gives a kill something to hit
SCENES = {"airport": 300, "bus": 700, "park": 1500, "tram": 3000}  # Hz of a scene's tone
DEVICES = ("a", "b", "s1")

# A model of a few thousand parameters, and many small batches, so that a fault finds a run in the middle of an epoch.
SMALL = (
    "--model aum_tiny --pos_embed True --head linear --embed_dim 16 --depth 1 --d_state 4 --patch_size 8,4 "
    f"--orig_sample_rate {RATE} --sample_rate {RATE} --window_length 256 --n_fft 256 --hop_length 128 --n_mels 32 "
    "--freqm 4 --timem 4"
).split()
QUIET = "--num_workers 0 --wandb_mode disabled --accelerator cpu".split()
FIT = "--n_epochs 4 --batch_size 2 --lr 0.01 --warmup_steps 5 --check_val_every_n_epoch 2 --val_fraction 0.34".split()
DEVICE_FIT = "--n_epochs 3 --batch_size 2 --lr 0.003 --warmup_steps 2 --check_val_every_n_epoch 1".split()


def write_few_clips(folder: Path) -> None:
    """72 clips to train on and 32 to test, each half a second of its scene's tone in noise."""
    train = [
        (scene, "lyon", 10 * number + place, piece, device)
        for number, scene in enumerate(SCENES)
        for place in (1, 2, 3)
        for piece in (0, 1)
        for device in DEVICES
    ]
    test = [
        (scene, "paris", 100 + number, piece, device)
        for number, scene in enumerate(SCENES)
        for piece in (0, 1)
        for device in (*DEVICES, "s4")
    ]
    _write(folder, train, test, RATE // 2)


def write_many_clips(folder: Path) -> None:
    """1,500 clips to train on and 200 to test, a quarter of a second each: checking and packing take a while."""
    train = [
        (scene, "lyon", 10 * number + place, piece, device)
        for number, scene in enumerate(SCENES)
        for place in range(5)
        for piece in range(25)
        for device in DEVICES
    ]
    test = [
        (scene, "paris", 500 + n, piece, device)
        for n, scene in enumerate(SCENES)
        for piece in range(25)
        for device in "ab"
    ]
    _write(folder, train, test, RATE // 4)


def _write(folder: Path, train: list[tuple], test: list[tuple], n_samples: int) -> None:
    (folder / "audio").mkdir(parents=True)
    rows = {}
    for seed, (scene, city, location, piece, device) in enumerate(train + test):
        name = f"audio/{scene}-{city}-{location}-{10 * location}-{piece}-{device}.wav"
        rows[name] = f"{name}\t{scene}\t{city}-{location}\t{device}\n"
        rng = np.random.default_rng(seed)
        tone = np.sin(2 * np.pi * SCENES[scene] * rng.uniform(0.9, 1.1) * np.arange(n_samples) / RATE)
        level = 0.3 if device == "a" else 0.1
        soundfile.write(folder / name, level * tone + rng.normal(0, 0.05, n_samples), RATE, subtype="PCM_16")
    names = list(rows)
    (folder / "meta.csv").write_text("filename\tscene_label\tidentifier\tsource_label\n" + "".join(rows.values()))
    (folder / "split_setup").mkdir()
    for split, part in (("split25", names[: len(train)]), ("test", names[len(train) :])):
        lines = ["filename\tscene_label\n", *("\t".join(rows[name].split("\t")[:2]) + "\n" for name in part)]
        (folder / "split_setup" / f"{split}.csv").write_text("".join(lines))


def link_copy(folder: Path, copy: Path) -> Path:
    """A copy whose files may be replaced but not written to: they are the same files."""
    return Path(shutil.copytree(folder, copy, copy_function=os.link, ignore=shutil.ignore_patterns("pack")))


def spoil(folder: Path) -> None:
    """Make some clips of a folder faulty, in every way that checking knows."""
    names = sorted(path for path in (folder / "audio").iterdir())
    for i, path in enumerate(names[::97]):
        content = path.read_bytes()
        path.unlink()
        if i % 4 == 0:
            path.write_bytes(content[: len(content) // 2])
        elif i % 4 == 1:
            path.write_bytes(b"")
        elif i % 4 == 2:
            soundfile.write(path, np.zeros(RATE // 4), RATE)
        # the fourth stays missing
