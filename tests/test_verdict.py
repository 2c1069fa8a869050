"""Stage 2's verdict, on made-up losses and on planted models, and the weights between two models."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import refusal

from dcase.data.dataset import Sound
from dcase.data.labels import TRAIN_DEVICES
from dcase.data.loading import with_sound
from dcase.data.tau22 import load_splits, split_by_location
from dcase.model.averaging import interpolated
from dcase.runs.checkpoints import FORMAT, load_checkpoint, save_checkpoint
from dcase.runs.config import DeviceConfig, TrainConfig, defaults_from, from_plain
from dcase.runs.folder import Run
from dcase.training.fine_tuning import FineTuning
from dcase.training.lit import SceneClassifier
from dcase.training.verdict import judge

# Made-up losses


def fall_of(gains: dict[str, float], seed: int = 0, deviation: float = 0.1, places: int = 15) -> tuple[dict, dict]:
    """(falls, locations) of ten clips at each of some places."""
    rng = np.random.default_rng(seed)
    noise = {d: np.repeat(rng.normal(0, deviation, places), 10) + rng.normal(0, 0.2, 10 * places) for d in gains}
    return {d: gain + noise[d] for d, gain in gains.items()}, {d: np.repeat(np.arange(places), 10) for d in gains}


def test_a_gain_that_no_device_shows_alone_is_used_for_all_and_a_loss_is_not():
    gains = dict.fromkeys(TRAIN_DEVICES, 0.06)
    verdicts = [judge(*fall_of(gains, seed, 0.25)) for seed in range(50)]
    alone = [own.mean > 2 * own.error for verdict in verdicts for own in verdict.of_device.values()]
    assert np.mean(alone) < 0.3 and np.mean([verdict.is_gain for verdict in verdicts]) > 0.8
    losses = [judge(*fall_of(dict.fromkeys(TRAIN_DEVICES, -0.03), seed, 0.25)) for seed in range(50)]
    assert np.mean([verdict.is_gain for verdict in losses]) < 0.1


def test_a_device_whose_own_clips_say_the_opposite_is_left_out():
    verdict = judge(*fall_of({"a": 0.2, "b": 0.2, "c": -0.3}))
    assert [verdict.uses(device_id) for device_id in "abc"] == [True, True, False]
    assert verdict.contradicts("c") and not verdict.contradicts("a")
    assert verdict.uses("s1")  # no validation clip of its own: it follows the others


def test_every_device_counts_the_same_and_a_place_counts_once():
    falls, locations = fall_of({"a": 0.1, "b": 0.3})
    few = {"a": falls["a"], "b": falls["b"][:20]}, {"a": locations["a"], "b": locations["b"][:20]}
    verdict = judge(*few)
    assert verdict.together.mean == pytest.approx((few[0]["a"].mean() + few[0]["b"].mean()) / 2)
    twice = judge({"a": falls["a"], "b": falls["a"]}, {"a": locations["a"], "b": locations["a"]})
    assert twice.together.error == pytest.approx(twice.of_device["a"].error)  # the second device adds nothing
    apart = judge({"a": falls["a"], "b": falls["a"]}, {"a": locations["a"], "b": locations["a"] + 100})
    assert apart.together.error == pytest.approx(twice.together.error / 2**0.5, rel=0.05)


def test_one_place_is_no_evidence():
    verdict = judge({"a": np.ones(5)}, {"a": np.zeros(5)})
    assert not verdict.is_gain and not judge({"a": -np.ones(5)}, {"a": np.zeros(5)}).contradicts("a")


def test_a_device_of_one_location_neither_counts_nor_hides_what_is_uncertain():
    rng = np.random.default_rng(0)
    noise, places = rng.normal(0, 0.2, 150), np.repeat(np.arange(15), 10)
    alone, both = judge({"a": noise}, {"a": places}), judge({"a": noise, "b": np.ones(1)}, {"a": places, "b": [0]})
    assert both.together == alone.together and both.heard == ["a"]
    assert both.uses("b") == both.uses("a")


def test_no_gain_is_seldom_used_with_few_locations():
    """One standard error: 16 % of the time; with two locations Student's t has 25 %."""
    rng, used = np.random.default_rng(0), []
    for _ in range(400):
        places = {"a": np.repeat(np.arange(15), 10), "b": np.arange(2), "c": np.arange(2)}
        noise = {d: rng.normal(0, 1, 15)[place] for d, place in places.items()}
        used.append(judge(noise, places).is_gain)
    assert np.mean(used) < 0.3


# Weights between two models


def test_interpolated_weights_lie_between_two_models_statistics_too():
    torch.manual_seed(0)
    start, end = (torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.BatchNorm1d(3)) for _ in range(2))
    end.train()(torch.randn(8, 2, 5) * 3 + 1)
    a, b = start.state_dict(), end.state_dict()
    between = interpolated(a, b, 0.75)
    assert between.keys() == b.keys()
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert not torch.equal(a[name], b[name])
        torch.testing.assert_close(between[name], 0.25 * a[name] + 0.75 * b[name])
    assert between["1.num_batches_tracked"] == 1
    assert all(torch.equal(value, b[name]) for name, value in interpolated(a, b, 1.0).items())


# Planted models


@pytest.fixture
def tuning(general_run, learnable, tmp_path):
    """Return stage 2 of the general run with planted models: factors of the head's weights by device."""

    def plant(factors: dict[str, float], **flags) -> FineTuning:
        checkpoint = load_checkpoint(general_run / "checkpoints" / "best.ckpt")
        config = dataclasses.replace(defaults_from(DeviceConfig, checkpoint["config"]), only_devices="a,b,s1", **flags)
        machine = from_plain(TrainConfig, checkpoint["config"]).machine
        config = dataclasses.replace(config, machine=machine)
        clips = split_by_location(load_splits(learnable, "split25")[0], 0.34)
        general = SceneClassifier.from_checkpoint(checkpoint, config)
        run = Run(tmp_path / "run")
        for device_id, factor in factors.items():
            state = dict(general.model.state_dict())
            state["head.weight"], state["head.bias"] = factor * state["head.weight"], factor * state["head.bias"]
            save_checkpoint({"dcase_format": FORMAT, "state_dict": state}, run.checkpoints / device_id / "tuned.ckpt")
        return FineTuning(general, clips, with_sound(clips[0], Sound(8000)), config, run, ())

    return plant


BETTER, WORSE = 1.5, -1.0  # factors of the logits of a model that has not learnt to its end


def test_planted_gains_are_used_between_the_two_models(tuning, capsys):
    stage = tuning(dict.fromkeys(("a", "b", "s1"), BETTER), own_share=0.5)
    outcomes, states = stage.tune()
    assert list(states) == ["a", "b", "s1"] and all(outcome.kept for outcome in outcomes.values())
    general = stage.general.model.state_dict()["head.weight"]
    torch.testing.assert_close(states["a"]["head.weight"], 1.25 * general)
    assert outcomes["a"].fine_tuned_loss < outcomes["a"].general_loss
    assert "own model kept: over all devices the loss falls by" in capsys.readouterr().out


def test_the_share_of_the_clearest_fall_is_taken_for_all_devices(tuning, capsys):
    stage = tuning(dict.fromkeys(("a", "b", "s1"), BETTER))
    outcomes, _ = stage.tune()
    tried = {share: stage._test("a", stage.config.fit.lr, share).losses.mean() for share in (0.5, 0.75)}
    assert {outcome.share for outcome in outcomes.values()} == {min(tried, key=tried.get)} == {0.75}
    out = capsys.readouterr().out
    assert out.startswith("--only_devices a,b,s1: the validation clips of these devices alone, not of all, choose")
    assert out.count(" (chosen): the validation loss falls by") == 1 and "--own_share 0.75 (chosen)" in out


def test_without_clips_that_are_held_out_the_share_is_the_mean_of_both(tuning):
    stage = tuning({"a": 3.0, "b": 3.0, "s1": 3.0})
    stage = dataclasses.replace(stage, clips=(stage.clips[0], None))
    outcomes, states = stage.tune()
    assert {(outcome.kept, outcome.share) for outcome in outcomes.values()} == {(True, 0.5)}
    torch.testing.assert_close(states["b"]["head.weight"], 2 * stage.general.model.state_dict()["head.weight"])


def test_planted_losses_are_not_used(tuning, capsys):
    outcomes, states = tuning(dict.fromkeys(("a", "b", "s1"), WORSE)).tune()
    assert not states and not any(outcome.kept for outcome in outcomes.values())
    assert "general model stays: over all devices the loss rises by" in capsys.readouterr().out


def test_a_planted_loss_among_gains_is_left_out(tuning):
    outcomes, states = tuning({"a": 3.0, "b": 3.0, "s1": -0.2}, own_share=1.0).tune()
    assert list(states) == ["a", "b"]
    assert outcomes["s1"].reason.startswith("on its own clips the loss rises by")


@pytest.mark.parametrize("keep, used", [("all", ["a", "b", "s1"]), ("none", [])])
def test_keep_overrules_the_verdict_and_says_what_it_was(tuning, keep, used):
    outcomes, states = tuning({"a": BETTER, "b": BETTER, "s1": WORSE}, keep=keep).tune()
    assert list(states) == used
    assert all(outcome.reason.startswith(f"--keep {keep}; over all devices the loss ") for outcome in outcomes.values())


@pytest.mark.parametrize("share", ["0", "1.1"])
def test_an_impossible_share_names_the_flag(share):
    assert refusal(lambda: DeviceConfig(own_share=float(share))).startswith("--own_share must be ")
