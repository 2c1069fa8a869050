"""Each clip of a batch goes through the model of its device."""

import torch
from torch import nn

from dcase.data.tau22 import DEVICES
from dcase.model.devices import forward_by_device


class Counting(nn.Module):
    """Adds its number to the input's first column, and counts its forwards."""

    def __init__(self, number: float):
        super().__init__()
        self.number, self.calls, self.clips = number, 0, 0

    def forward(self, x):
        self.calls, self.clips = self.calls + 1, self.clips + len(x)
        return x + self.number


def test_each_clip_meets_its_devices_model_and_each_model_runs_once():
    general, specific = Counting(100), {"a": Counting(1), "s2": Counting(2), "c": Counting(3)}
    ids = ["a", "s4", "s2", "a", "b", "s2", "s6"]
    device = torch.tensor([DEVICES.index(i) for i in ids])
    x = torch.arange(len(ids)).float().unsqueeze(1)
    y = forward_by_device(general, specific, x, device)
    expected = torch.tensor([{"a": 1, "s2": 2}.get(i, 100) for i in ids]).unsqueeze(1) + x
    assert torch.equal(y, expected)
    assert (general.calls, general.clips) == (1, 3)
    assert [m.calls for m in specific.values()] == [1, 1, 0]  # a model that is not needed does not run


def test_the_general_model_serves_unknown_devices_and_without_device_models_the_whole_batch():
    general, specific = Counting(100), {"a": Counting(1)}
    y = forward_by_device(general, specific, torch.zeros(2, 1), torch.tensor([99, 0]))
    assert y.flatten().tolist() == [100, 1]
    general = Counting(100)
    forward_by_device(general, {}, torch.zeros(4, 1), torch.tensor([0, 1, 2, 3]))
    assert (general.calls, general.clips) == (1, 4)


def test_gradients_pass():
    general, specific = nn.Linear(2, 3), {"b": nn.Linear(2, 3)}
    forward_by_device(general, specific, torch.ones(3, 2), torch.tensor([1, 0, 1])).sum().backward()
    assert general.weight.grad.sum() == 6 and specific["b"].weight.grad.sum() == 12
