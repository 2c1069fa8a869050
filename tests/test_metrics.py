"""Accuracies and loss against counting by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dcase.data.tau22 import DEVICES, SCENES
from dcase.model.metrics import SceneMetrics, mean_and_error, results


def one_hot_logits(predicted: list[int]) -> torch.Tensor:
    return 5.0 * F.one_hot(torch.tensor(predicted), len(SCENES)).float()


def collect(logits, scene, device, sizes) -> dict:
    metrics = SceneMetrics()
    loss = F.cross_entropy(logits, scene, reduction="none")
    for part in zip(logits.split(sizes), scene.split(sizes), device.split(sizes), loss.split(sizes), strict=True):
        metrics.update(*part)
    return metrics.compute()


def test_by_hand_where_the_averages_differ():
    """Three clips of airport on a (2 right), one bus on s4 (wrong): macro 1/3, overall 1/2, devices 2/3 and 0."""
    scene, device = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, DEVICES.index("s4")])
    got = collect(one_hot_logits([0, 0, 4, 3]), scene, device, 4)
    assert got["macro_avg_acc"] == pytest.approx(1 / 3)
    assert got["acc"] == 0.5
    assert got["device_avg_acc"] == pytest.approx(1 / 3)
    assert got["scene_acc"]["airport"] == pytest.approx(2 / 3) and got["scene_acc"]["bus"] == 0.0
    assert got["device_acc"]["a"] == pytest.approx(2 / 3) and got["device_acc"]["s4"] == 0.0
    assert got["device_group_acc"] == {"real": pytest.approx(2 / 3), "seen": None, "unseen": 0.0}
    right, wrong = math.log(1 + 9 * math.exp(-5)), 5 + math.log(1 + 9 * math.exp(-5))
    assert got["loss"] == pytest.approx((2 * right + 2 * wrong) / 4)
    assert got["n_clips"] == 4
    assert got["confusion"][0][0] == 2 and got["confusion"][0][4] == 1 and got["confusion"][1][3] == 1


def test_what_is_absent_is_none_and_not_averaged():
    got = collect(one_hot_logits([2, 2]), torch.tensor([2, 2]), torch.tensor([1, 1]), 2)
    assert got["macro_avg_acc"] == 1.0  # not 0.1
    assert [s for s, x in got["scene_acc"].items() if x is not None] == ["metro"]
    assert [d for d, x in got["device_acc"].items() if x is not None] == ["b"]


def test_no_clip_at_all():
    got = results(torch.zeros(len(DEVICES), len(SCENES), len(SCENES), dtype=torch.int64), 0.0)
    assert got["macro_avg_acc"] is None and got["loss"] is None and got["n_clips"] == 0


def random_clips(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, scene, device) of n clips"""
    torch.manual_seed(0)
    return torch.randn(n, len(SCENES)), torch.randint(len(SCENES), (n,)), torch.randint(len(DEVICES), (n,))


@pytest.mark.parametrize("sizes", [1, 3, 64, 65])
def test_any_batch_size_gives_the_same(sizes):
    clips = random_clips(65)
    got, whole = collect(*clips, sizes), collect(*clips, 65)
    assert got["loss"] == pytest.approx(whole["loss"], rel=1e-14)
    assert {k: v for k, v in got.items() if k != "loss"} == {k: v for k, v in whole.items() if k != "loss"}


def test_against_counting():
    logits, scene, device = random_clips(300)
    got = collect(logits, scene, device, 300)
    right = (logits.argmax(1) == scene).double()
    for i, name in enumerate(SCENES):
        assert got["scene_acc"][name] == pytest.approx(right[scene == i].mean().item())
    for i, name in enumerate(DEVICES):
        assert got["device_acc"][name] == pytest.approx(right[device == i].mean().item())
    assert got["device_group_acc"]["unseen"] == pytest.approx(right[device >= 6].mean().item())
    assert got["acc"] == pytest.approx(right.mean().item())
    assert got["macro_avg_acc"] == pytest.approx(sum(got["scene_acc"].values()) / len(SCENES))


def test_error_of_a_mean_over_locations():
    values, places = [0.1, 0.3, 0.2, 0.6, 0.5, 0.1], ["x", "x", "y", "y", "z", "z"]
    mean, error = mean_and_error(values, places)
    sums = [-0.2, 0.2, 0.0]  # of each place's clips, less the mean 0.3
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx((3 / 2 * sum(s**2 for s in sums)) ** 0.5 / 6)
    assert mean_and_error(values, range(6))[1] == pytest.approx(np.std(values, ddof=1) / 6**0.5)  # the usual one
    assert mean_and_error(values * 4, places * 4)[1] == pytest.approx(error)  # the same clips again tell nothing new
    assert mean_and_error(values, ["x"] * 6) == (pytest.approx(0.3), math.inf)


def test_counting_asks_for_no_value_that_a_host_would_have_to_wait_for():
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.bincount.default)
            return function(*args, **(kwargs or {}))

    scene, logits = torch.tensor([0, 3]), one_hot_logits([0, 4])
    with NoWait():
        SceneMetrics().update(logits, scene, scene, torch.ones(2))
