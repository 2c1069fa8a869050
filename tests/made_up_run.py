"""A tested run from nothing: predictions like those of a model, and the files that they are shown from."""

import json
from pathlib import Path

import numpy as np
import torch

from dcase.data.tau22 import DEVICES, SCENES
from dcase.model import metrics
from dcase.report.predictions import PREDICTIONS_CSV, Predictions, write_predictions
from dcase.runs.config import BaseConfig, TrainConfig, to_plain

LOCATIONS = 120
COMPLEXITY = {
    "params": 54_124,
    "total_param_bytes": 109_280,
    "bytes_in_16_bit": 109_280,
    "bytes_in_8_bit": 64_628,
    "macs": 31_459_876,
    "macs_by_part": {"stem": 1_459_876, "scan": 30_000_000},
    "torchinfo_macs": 10_136_804,
    "max_param_bytes": 128_000,
    "max_macs": 30_000_000,
}


def made_up(seed: int = 0, n: int = 1800) -> Predictions:
    """Each second is recorded by all devices; a location's and a device's clips have errors of their own."""
    rng = np.random.default_rng(seed)
    seconds = -(-n // len(DEVICES))
    place = np.repeat(rng.integers(0, LOCATIONS, seconds), len(DEVICES))[:n]
    scene, device = place % len(SCENES), np.tile(np.arange(len(DEVICES)), seconds)[:n]
    logits = rng.normal(0, 1, (n, len(SCENES))) + rng.normal(0, 1, (LOCATIONS, len(SCENES)))[place]
    logits += rng.normal(0, 0.7, (len(DEVICES), len(SCENES)))[device]
    logits[np.arange(n), scene] += 2.5
    location = np.array([f"lisbon-{1000 + i}" for i in place])
    second = np.arange(n) // len(DEVICES)
    names = [
        f"audio/{SCENES[s]}-{where}-{i // 10}-{i % 10}-{DEVICES[d]}.wav"
        for s, where, i, d in zip(scene, location, second, device, strict=True)
    ]
    return Predictions(np.array(names), scene, device, location, np.round(logits, 4))


def write_run(
    folder: Path,
    predictions: Predictions,
    dataset_dir: Path,
    seed: int = 0,
    of: TrainConfig | None = None,
    **run: object,
) -> Path:
    """results.json, config.json, metrics.csv and predictions.csv as a training run leaves them; ``of``: what it was
    begun with, None: stage 1's defaults."""
    p = predictions
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(p, folder / PREDICTIONS_CSV)
    results = {"data": "made up", "note": "Made-up data.", **metrics.results(torch.tensor(p.confusion), p.loss.sum())}
    results |= {"complexity": COMPLEXITY, "tested_on": {"accelerator": "cpu", "scan_backend": "cpu"}}
    (folder / "results.json").write_text(json.dumps(results))
    config = to_plain(of or BaseConfig())
    config["data"] |= {"dataset_dir": str(dataset_dir), "orig_sample_rate": 8000}
    config["logmel"] |= {"sample_rate": 8000, "n_fft": 512, "window_length": 512, "hop_length": 128, "n_mels": 64}
    config["fit"] |= {"seed": seed, "lr": 0.005}
    config["run"] |= run
    made = {"config": config, "versions": {"torch": "2.11.0"}, "commit": "abc123", "command": ["train_base.py"]}
    (folder / "config.json").write_text(json.dumps(made))
    rows = [(step, "train/loss", 2 / (1 + step / 5000)) for step in range(400, 60_000, 400)]
    rows += [(step, "val/macro_avg_acc", 0.5 + step / 200_000) for step in range(4000, 60_000, 4000)]
    rows += [(step, "lr", 0.005 - step / 2e7) for step in range(400, 60_000, 400)]
    lines = "".join(f"{step},{name},{value}\n" for step, name, value in rows)
    (folder / "metrics.csv").write_text("step,name,value\n" + lines)
    return folder
