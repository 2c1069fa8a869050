"""Stage 2's verdict: whether the devices' models replace the general one, from what they gain on validation clips.

A device of TAU22 has about 200 validation clips of 12 to 17 recording locations: too few to tell a gain of 0.06 nats
from chance. So the devices are judged together, each counting the same: their models are used where the mean fall of
the loss is more than its standard error, and a device is left out where its own clips clearly say the opposite.
`benchmarks/verdict.py` simulates how often that is right.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dcase.model.metrics import mean_and_error

CERTAINTY = 1.0  # standard errors by which the mean over the devices must fall
CONTRADICTION = 2.0  # standard errors by which a device's own loss must rise to be left out of what the others gain


@dataclass(frozen=True)
class Fall:
    """The mean fall of a loss, nats, and its standard error over recording locations."""

    mean: float
    error: float

    def __str__(self) -> str:
        error = f"standard error {self.error:.3f}" if math.isfinite(self.error) else "of one location: may be chance"
        return f"{'falls' if self.mean > 0 else 'rises'} by {abs(self.mean):.3f} ({error})"


@dataclass(frozen=True)
class Verdict:
    of_device: Mapping[str, Fall]  # device_id -> on its own validation clips
    together: Fall  # mean over those devices whose clips are from more than one location

    @property
    def heard(self) -> list[str]:
        """Return these devices."""
        return [device_id for device_id, own in self.of_device.items() if math.isfinite(own.error)]

    @property
    def margin(self) -> float:
        """By how much the mean fall exceeds what chance may be."""
        return self.together.mean - CERTAINTY * self.together.error

    @property
    def is_gain(self) -> bool:
        return self.margin > 0

    def contradicts(self, device_id: str) -> bool:
        """Return whether a device's own clips clearly say that its model is worse."""
        own = self.of_device.get(device_id)
        return own is not None and -own.mean > CONTRADICTION * own.error

    def uses(self, device_id: str) -> bool:
        """Return whether the device's model is used; a device that is not heard follows the others."""
        return self.is_gain and not self.contradicts(device_id)


def judge(falls: Mapping[str, np.ndarray], locations: Mapping[str, np.ndarray]) -> Verdict:
    """Return the verdict on models for one device each.

    ``falls``: device_id -> the general model's loss less the device's model's, of each of its validation clips (n,);
    ``locations``: device_id -> where these clips were recorded (n,). The error counts a location once, for all devices.
    """
    own = {device_id: Fall(*mean_and_error(fall, locations[device_id])) for device_id, fall in falls.items()}
    heard = Verdict(own, Fall(0.0, math.inf)).heard
    if not heard:  # a single location says nothing about others
        return Verdict(own, Fall(float(np.mean([fall.mean for fall in own.values()])), math.inf))
    parts = []
    for device_id in heard:  # as `mean_and_error`, with a device's weight: each counts the same
        fall, n = falls[device_id], len(np.unique(locations[device_id]))
        parts.append((fall - own[device_id].mean) * math.sqrt(n / (n - 1)) / (len(heard) * len(fall)))
    _, place = np.unique(np.concatenate([locations[device_id] for device_id in heard]), return_inverse=True)
    error = math.sqrt(np.square(np.bincount(place, np.concatenate(parts))).sum())
    return Verdict(own, Fall(float(np.mean([own[device_id].mean for device_id in heard])), error))
