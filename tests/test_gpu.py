"""The scripts on an NVIDIA GPU; skipped without one. `make gpu` runs them, with all else that a GPU is needed for.

In its dry run (TRITON_INTERPRET=1), a CPU stands in for the GPU.
"""

import os

import numpy as np
import pytest
import torch
from conftest import FIT, SMALL, only_run, read_results

import train_base
from dcase.report.predictions import PREDICTIONS_CSV, read_predictions
from dcase.training.lit import SceneClassifier

STAND_IN = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (STAND_IN or torch.cuda.is_available()), reason="no GPU here")
ACCELERATOR, DEVICE, BACKEND = ("cpu", "cpu", "cpu") if STAND_IN else ("gpu", "cuda", "triton")
MACHINE = ("--logger", "none", "--accelerator", ACCELERATOR)
ON_GPU = [*SMALL[: SMALL.index("--wandb_mode")], *MACHINE, *FIT, "--report_audio", "False"]


@pytest.fixture
def train(learnable, script, tmp_path):
    """Train the small model on the GPU, in a project of that name; the run's folder."""

    def run(project: str, *args):
        script("train_base.py", *ON_GPU, "--dataset_dir", learnable, "--project_name", project, *args).succeeded()
        return only_run(tmp_path / project)

    return run


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"] if STAND_IN else ["32", "bf16-mixed", "16-mixed"])
def test_it_learns_by_triton_and_the_cpu_predicts_the_same(train, learnable, script, tmp_path, precision):
    run = train("P", "--precision", precision)
    on_gpu = read_results(run)
    assert on_gpu["macro_avg_acc"] > 0.4  # chance is 0.25 of these four scenes
    assert on_gpu["tested_on"]["accelerator"] == DEVICE and on_gpu["tested_on"]["scan_backend"] == BACKEND
    best = run / "checkpoints" / "best.ckpt"
    script("test_only.py", "--ckpt_path", best, "--dataset_dir", learnable, "--project_name", "Q",
           "--accelerator", "cpu", "--precision", "32", "--num_workers", 0, "--logger", "none").succeeded()  # fmt: skip
    predicted = [read_predictions(folder / PREDICTIONS_CSV).logits for folder in (run, only_run(tmp_path / "Q"))]
    np.testing.assert_allclose(*predicted, rtol=0, atol=1e-3 if precision == "32" else 0.1)


def test_compiled_it_trains_and_its_checkpoint_keeps_the_names(train):
    run = train("P", "--compile", "--precision", "bf16-mixed")
    assert read_results(run)["macro_avg_acc"] > 0.4
    names = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert "model.layers.0.mixer.A_b_log" in names and not [name for name in names if "_orig_mod" in name]


def test_deterministic_means_the_same_bits_twice(train):
    first, second = (
        torch.load(train(project, "--deterministic") / "checkpoints" / "last.ckpt", weights_only=True)
        for project in ("P", "Q")
    )
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


@pytest.mark.skipif(STAND_IN, reason="only CUDA knows what waits")
def test_the_host_does_not_wait_within_a_step(call_main, learnable, monkeypatch):
    step = SceneClassifier.training_step

    def strict(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if self.global_step else "default")  # at first, kernels are compiled
        try:
            return step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(SceneClassifier, "training_step", strict)
    done = call_main(train_base.main, *ON_GPU, "--dataset_dir", learnable, "--project_name", "P")
    done.succeeded()


def test_stage_2_and_what_it_stores(train, learnable, script, tmp_path):
    run = train("P")
    machine = ["--num_workers", 0, *MACHINE]
    fit = ["--n_epochs", 2, "--batch_size", 8, "--warmup_steps", 2, *machine]
    more = ["--only_devices", "a,b", "--dataset_dir", learnable, "--project_name", "P"]
    script("train_device_specific.py", "--ckpt_id", run.name, *more, *fit).succeeded()
    (tuned,) = [path.parent for path in (tmp_path / "P").glob("*/config.json") if path.parent != run]
    assert (tuned / "checkpoints" / "best.ckpt").is_file()
    test = ["--dataset_dir", learnable, *machine]
    script("test_only.py", "--ckpt_path", tuned / "checkpoints" / "best.ckpt", *test, "--weight_bits", "8",
           "--project_name", "Q").succeeded()  # fmt: skip
    assert (only_run(tmp_path / "Q") / "stored" / "general.safetensors").is_file()
