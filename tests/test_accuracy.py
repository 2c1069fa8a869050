"""benchmarks/accuracy.py: differences of rows over folds and seeds; benchmarks/controls.py: the controls' sizes."""

import numpy as np
import pytest
import torch

import aum
from benchmarks.accuracy import ALL, KNOWN, UNSEEN, Pooled
from benchmarks.controls import GatedConvolutions, with_input_norm, without_scan
from dcase import complexity
from dcase.data.labels import DEVICES, SCENES, TRAIN_DEVICES
from dcase.errors import UserError
from dcase.model.cp_mobile import CPMobile
from dcase.report.predictions import Predictions

LOCATIONS, N = 40, 3600


def predictions(right: np.ndarray, first: int = 0) -> Predictions:
    """Return N clips of which these are ``right``, each location on every device, in an order of their own."""
    clip = np.arange(N)
    scene = clip % len(SCENES)
    predicted = np.where(right, scene, (scene + 1) % len(SCENES))
    names = np.array([f"audio/{first + i:05d}.wav" for i in clip])
    places = np.array([f"city-{i:03d}" for i in (clip // len(DEVICES)) % LOCATIONS])
    order = np.random.default_rng(0).permutation(N)
    logits = 1.0 * (predicted[:, None] == np.arange(len(SCENES)))
    return Predictions(names, scene, clip % len(DEVICES), places, logits).select(order)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def test_a_difference_is_the_mean_over_folds_and_seeds_and_its_interval_holds_it(rng):
    before = [rng.random(N) < 0.6 for _ in range(4)]
    after = [right | (rng.random(N) < 0.2) for right in before]
    folds = ["one", "one", "two", "two"]  # two seeds of each
    ours, theirs = (Pooled([(f, predictions(r)) for f, r in zip(folds, x, strict=True)]) for x in (after, before))
    found = ours.minus(theirs, ALL)
    expected = np.mean(after) - np.mean(before)
    assert found.value == pytest.approx(expected, abs=1e-12)  # every scene has as many clips
    assert 0 < found.low < expected < found.high
    assert len(ours.all.locations) == 2 * LOCATIONS  # a place of one fold is none of the other


def test_known_is_the_mean_over_the_known_devices_and_unseen_over_the_others(rng):
    right = np.isin(np.arange(N) % len(DEVICES), [DEVICES.index(d) for d in TRAIN_DEVICES])
    pooled = Pooled([("one", predictions(right))])
    assert pooled(KNOWN).value == 1
    assert pooled(UNSEEN).value == 0


def test_rows_of_different_clips_are_refused():
    right = np.ones(N, bool)
    with pytest.raises(UserError, match="different clips"):
        Pooled([("one", predictions(right))]).minus(Pooled([("one", predictions(right, first=1))]), ALL)


def test_the_control_without_a_scan_has_as_many_bytes_and_no_more_macs():
    ours, control = (
        complexity.measure(model, (1, 1, 256, 65), 16) for model in (aum.create_model("aum_nano"), without_scan(10))
    )
    assert control.total_param_bytes == pytest.approx(ours.total_param_bytes, rel=0.005)
    assert 0.93 * ours.macs < control.macs <= ours.macs
    assert not any(isinstance(module, aum.BiMamba) for module in without_scan(10).modules())


def test_every_token_of_the_control_sees_its_whole_row():
    mixer, x = GatedConvolutions(48), torch.randn(1, 17, 48, requires_grad=True)
    for token in (0, 8, 16):
        (gradient,) = torch.autograd.grad(mixer(x)[0, token].sum(), x, retain_graph=True)
        assert (gradient.abs().sum(2) > 0).all()


def test_the_input_norm_changes_nothing_that_cp_mobile_costs():
    ours, plain = (complexity.measure(model, (1, 1, 256, 65), 16) for model in (with_input_norm(10), CPMobile(10)))
    assert ours.total_param_bytes == plain.total_param_bytes
    assert ours.macs == plain.macs + 256
