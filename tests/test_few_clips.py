"""Own recordings, few of them: the rate that files say, warnings where chance decides, and how to train on."""

import json

import pytest
from conftest import FIT, SMALL, only_run
from data_folder import RATE

from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import BaseConfig, FitConfig
from dcase.training.fit import too_few

OWN_RATE = [flag for i, flag in enumerate(SMALL) if "--orig_sample_rate" not in (flag, SMALL[i - 1])]


def warnings(n_train: int, n_val: int, **fit) -> list[str]:
    return too_few(n_train, n_val, BaseConfig(fit=FitConfig(**fit)))


def test_few_steps_and_validation_clips_are_told_with_flags_that_help():
    """What a newcomer's 54 clips were trained with: one step an epoch, 5 clips, a validation that never came due."""
    steps, val, every = warnings(49, 5, n_epochs=8)
    assert steps == "49 training clips make only 1 optimiser step an epoch, 8 in all: --batch_size 4 makes more"
    assert val.startswith("only 5 validation clips choose the best epoch, and a clip is 20 points: --val_fraction 0.3")
    assert every.startswith("--check_val_every_n_epoch 10 is more than --n_epochs 8: only the last epoch is validated")


@pytest.mark.parametrize("n_val", [50, 0])
def test_enough_clips_and_none_that_are_held_out_are_no_warning(n_val):
    assert warnings(10 * 64, n_val) == []
    assert len(warnings(9 * 64, n_val)) == len(warnings(10 * 64, n_val, accumulate_grad_batches=2)) == 1


def test_a_run_on_recordings_of_another_rate_without_a_flag_for_it(script, learnable, tmp_path):
    few = ["--n_epochs", "1", "--batch_size", "64", "--project_name", "P"]
    begun = ["--dataset_dir", learnable, *OWN_RATE, *FIT, *few, "--sample_rate", "16000", "--run_id", "own"]
    done = script("train_base.py", *begun).succeeded()
    assert "WARNING: recordings of 8000 Hz end at 4000 Hz" in done.out and "--sample_rate 8000" in done.out
    assert "WARNING: 48 training clips make only 1 optimiser step an epoch, 1 in all" in done.out
    assert (
        "WARNING: only 24 validation clips" in done.out and "(24 clips, 1 step an epoch; best epoch so far)" in done.out
    )
    run = only_run(tmp_path / "P")
    for config in (json.loads((run / "config.json").read_text()), load_checkpoint(run / "checkpoints/best.ckpt")):
        assert config["config"]["data"]["orig_sample_rate"] == RATE

    resumed = ["--resume", "own", "--project_name", "P", "--n_epochs", "3"]
    done = script("train_base.py", *resumed)
    done.refused(
        "--n_epochs 3: run own ends after 1 epochs, over which its learning rate falls to 0", "--init_from own"
    )
    assert done.error.endswith("with --init_from own --n_epochs 2 and the other flags of P/own/config.json")
