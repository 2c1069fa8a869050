"""Compute every figure of an evaluation from one table of counts: device x true scene x predicted scene.

Counts are integers and losses are summed in float64, so the batch size does not matter. A scene or device without a
clip has the accuracy None in `results`, and averages leave it out.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from dcase.data.labels import TAU22_LABELS, Labels


class SceneMetrics(Metric):
    """Collect (logits, scene, device, loss) and compute the content of ``results.json``."""

    full_state_update = False

    def __init__(self, labels: Labels = TAU22_LABELS):
        super().__init__()
        self.labels = labels
        counts = torch.zeros(len(labels.devices), len(labels.scenes), len(labels.scenes), dtype=torch.int64)
        self.add_state("confusion", counts, dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, scene: Tensor, device: Tensor, loss: Tensor) -> None:
        """logits (b, scenes), scene (b,), device (b,): indices into the labels; loss (b,): each clip's own."""
        n = len(self.labels.scenes)
        cell = (device * n + scene) * n + logits.argmax(1)
        # Not bincount, for whose result a GPU's host waits to know the size.
        self.confusion.view(-1).index_add_(0, cell, torch.ones_like(cell))
        self.loss_sum += loss.double().sum()

    def compute(self) -> dict:
        return results(self.confusion.cpu(), self.loss_sum.item(), self.labels)


def _ratio(correct: Tensor, total: Tensor) -> float | None:
    return correct.item() / total.item() if total else None


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def results(confusion: Tensor, loss_sum: float, labels: Labels = TAU22_LABELS) -> dict:
    """Return the figures of one evaluation as plain values (accuracies are fractions of 1).

    ``confusion`` (devices, scenes, scenes) counts clips by device, true scene and predicted scene; ``loss_sum`` is the
    sum of the clips' cross-entropies, natural logarithm. ``macro_avg_acc`` is always the mean over scenes;
    ``device_avg_acc`` is the mean over devices; a device group's accuracy pools its clips.
    """
    total = confusion.sum(2)  # (devices, scenes)
    correct = confusion.diagonal(dim1=1, dim2=2)  # (devices, scenes)
    scene_acc = {s: _ratio(correct[:, i].sum(), total[:, i].sum()) for i, s in enumerate(labels.scenes)}
    device_acc = {d: _ratio(correct[i].sum(), total[i].sum()) for i, d in enumerate(labels.devices)}
    rows = {group: list(map(labels.device_index, devices)) for group, devices in labels.device_groups.items()}
    n_clips = int(total.sum())
    return {
        "macro_avg_acc": _mean(list(scene_acc.values())),
        "acc": _ratio(correct.sum(), total.sum()),
        "loss": loss_sum / n_clips if n_clips else None,
        "device_avg_acc": _mean(list(device_acc.values())),
        "scene_acc": scene_acc,
        "device_acc": device_acc,
        "device_group_acc": {group: _ratio(correct[i].sum(), total[i].sum()) for group, i in rows.items()},
        "n_clips": n_clips,
        "confusion": confusion.sum(0).tolist(),
    }


def mean_and_error(values: Sequence[float], groups: Sequence) -> tuple[float, float]:
    """Return the mean of clips' values and its standard error, clustered by group (a recording location).

    With a single group the error is infinite. Source: the cluster-robust variance of a mean, Liang and Zeger,
    Biometrika 73(1), 1986.
    """
    values, (_, group) = np.asarray(values, np.float64), np.unique(groups, return_inverse=True)
    mean, n_groups = values.mean(), group.max() + 1
    if n_groups == 1:
        return float(mean), math.inf
    sums = np.bincount(group, values - mean)
    return float(mean), math.sqrt(n_groups / (n_groups - 1) * np.square(sums).sum()) / len(values)
