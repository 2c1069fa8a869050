"""The DCASE2025 baseline's published figures, for rows beside ours."""

from typing import NamedTuple

from dcase.data.labels import DEVICE_GROUPS, DEVICES


class PublishedRow(NamedTuple):
    """Accuracies in percent, as printed."""

    name: str
    scene_acc: tuple[float, ...]
    device_acc: tuple[float, ...]
    macro_avg_acc: float
    deviation: float  # of macro_avg_acc, over the runs

    @property
    def group_acc(self) -> list[float]:
        """The mean over each group's devices, whose numbers of clips agree within 1 %: the table has no groups."""
        accuracy = dict(zip(DEVICES, self.device_acc, strict=True))
        return [sum(accuracy[device] for device in group) / len(group) for group in DEVICE_GROUPS.values()]

    @property
    def macro(self) -> str:
        return f"{self.macro_avg_acc:.2f} ± {self.deviation:.2f}"


BASELINE = (
    PublishedRow(
        "Baseline, general",
        (38.94, 62.28, 40.60, 50.72, 72.03, 29.20, 56.04, 34.76, 73.21, 49.42),
        (62.80, 52.87, 54.23, 48.52, 47.29, 52.86, 48.14, 47.23, 42.60),
        50.72,
        0.47,
    ),
    PublishedRow(
        "Baseline, device-specific",
        (44.43, 64.81, 43.87, 48.22, 72.75, 32.04, 53.14, 34.43, 74.10, 51.08),
        (63.98, 55.85, 59.09, 48.68, 48.74, 52.72, 48.14, 47.23, 42.60),
        51.89,
        0.05,
    ),
)
BASELINE_NOTE = (
    "Baseline: DCASE2025 Task 1's CP-Mobile, as published (github.com/CPJKU/dcase2025_task1_baseline): "
    "mean of 4 runs on TAU22's development-test split, trained on the 25 % split."
)
BASELINE_PARAMS, BASELINE_MACS, BASELINE_BYTES = 61_148, 29_419_156, 122_296  # parameters in 16 bit
BASELINE_BYTES_IN_BITS = {16: 127_712, 8: 71_980}  # our count, with BatchNorm's statistics and scales
CHECKER_NOTE = (
    "MACs count every multiplication, the scan's too. The challenge's checker (torchinfo) counts a Linear layer once "
    "instead of once per token, and misses operations outside modules; for CP-Mobile, all convolutions, both agree."
)
