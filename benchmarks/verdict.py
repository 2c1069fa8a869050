"""Simulate stage 2's verdict: how often a true gain or loss of the devices' models is used, given a split list.

    python benchmarks/verdict.py --split_list split25.csv
    python benchmarks/verdict.py --split_list split25.csv --project_name RUNS --runs GENERAL,DEVICES

The list says how many validation clips of how many locations each device has. The fall of a clip's loss is simulated
as the device's true gain + an effect of the location, shared by the devices + an effect of location and device + noise
of the clip. The sizes of the last three are estimated from two tested runs, a general model and its devices' models
(trained with --keep all --own_share 1), on the test clips of the known devices; without --runs they are `MEASURED`.
They shrink in proportion to the share of the fine-tuned weights; the rule until 2026-11-30 judged these alone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import publish, table
from dcase import cli
from dcase.data.labels import DEVICES, SCENES, TRAIN_DEVICES
from dcase.data.tau22 import Clips, split_by_location
from dcase.errors import UserError, run
from dcase.report.predictions import PREDICTIONS_CSV, read_predictions
from dcase.runs.config import SHARES
from dcase.training.verdict import Verdict, judge


@dataclass(frozen=True)
class VerdictBenchmark:
    split_list: Path = Path("split_setup/split25.csv")
    """List of training clips, tab-separated, with TAU22's file names."""
    val_fraction: float = 0.1
    """Part of them that is held out, by location."""
    runs: str = ""
    """Ids of a general run and its device-specific run, tested on the same clips, such as abc,xyz."""
    project_name: Path = Path("DCASE25_Task1")
    """Folder of these runs."""
    tests: int = 2000
    """Simulated fine-tunings for each column."""
    append: bool = False
    """Append the table to benchmarks/RESULTS.md."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations, in nats, of the fall of a clip's loss around its device's true gain."""

    location: float  # of an effect that all devices share at a location
    device: float  # of an effect of location and device
    clip: float


# Of aum_nano, fine-tuned for b, c, s1, s2 and s3 on 158 to 175 clips each (12 epochs at 0.0005), on 3,905 test clips of
# real50's fold 1: field recordings (ESC-50) through measured responses of microphones. With half of the weights it was
# 0.063, 0.100 and 0.120; on a third as many recordings (ESC-10), with 60 to 89 clips each, 0.094, 0.200 and 0.247.
MEASURED = Spread(location=0.128, device=0.200, clip=0.237)


@dataclass(frozen=True)
class Gains:
    """True falls of the loss, nats: their mean over the devices and their deviation between them."""

    mean: float
    deviation: float = 0.0

    def __str__(self) -> str:
        return f"{self.mean:+g}" + (f" ± {self.deviation:g}" if self.deviation else "")


GROWTHS: dict[str, Callable[[float], float]] = {  # share of the fine-tuned weights -> of the true gain that is there
    "the same at each share": lambda share: 1.0,
    "1 - (1 - share)^2 of it, as in a parabola with its minimum at the fine-tuned weights": lambda s: 1 - (1 - s) ** 2,
    "in proportion to the share": lambda share: share,
}
COLUMNS = [Gains(0.2), Gains(0.1), Gains(0.06), Gains(0.06, 0.04), Gains(0.0), Gains(-0.03), Gains(-0.03, 0.04)]


Rule = Callable[[Verdict, str], bool]  # whether it uses a device's model


def alone(errors: float) -> Rule:
    """Return the rule by which a device's own clips decide: its loss falls by so many standard errors."""

    def uses(verdict: Verdict, device_id: str) -> bool:
        own = verdict.of_device[device_id]
        return own.mean > errors * own.error

    return uses


RULES: dict[str, Rule] = {
    "each device alone, two standard errors": alone(2),
    "each device alone, one standard error": alone(1),
    "together, one standard error": lambda verdict, device_id: verdict.is_gain,
    "together, and no clear contradiction (--keep clear)": Verdict.uses,
    "every device's model (--keep all)": lambda verdict, device_id: True,
}


def read_clips(path: Path) -> Clips:
    """Return a list's clips. Scene, location and device stand in TAU22's file names: no meta.csv is needed."""
    try:
        names = pd.read_csv(path, sep="\t")["filename"]
        parts = names.str.extract(r"^audio/(\w+)-(\w+-\w+)-\w+-\w+-(\w+)\.wav$")
        scene, device = (list(map(known.index, parts[i])) for i, known in ((0, SCENES), (2, DEVICES)))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--split_list {path} cannot be read as TAU22's split25.csv: {error}") from error
    return Clips(path.parent, names.to_numpy(bytes), np.array(scene), np.array(device), parts[1].to_numpy(bytes))


def measured(project: Path, runs: str) -> Spread:
    """Return the deviations between the clips that two runs were tested on: of the general and the devices' models.

    By the method of moments: clips of a location and device differ by noise; what the same locations have in common on
    two devices is the locations' effect.
    """
    general, own = (read_predictions(project / run_id / PREDICTIONS_CSV) for run_id in runs.split(","))
    falls = pd.DataFrame({"device": general.device, "location": general.location, "fall": general.loss - own.loss})
    falls = falls[falls["device"].isin([DEVICES.index(device_id) for device_id in TRAIN_DEVICES])]
    falls["fall"] -= falls.groupby("device")["fall"].transform("mean")
    cells = falls.groupby(["location", "device"])["fall"].agg(["mean", "var", "size"])
    clip = np.average(cells["var"].fillna(0), weights=cells["size"] - 1)
    means = cells["mean"].unstack("device")
    covariance = means.cov().to_numpy()
    location = max(0.0, covariance[~np.eye(len(covariance), dtype=bool)].mean())
    device = max(0.0, np.diag(covariance).mean() - location - clip * (1 / cells["size"]).mean())
    return Spread(*np.sqrt([location, device, clip]))


def simulate(
    clips: Clips,
    spread: Spread,
    gains: Gains,
    shares: tuple[float, ...],
    grows: Callable[[float], float],
    rng: np.random.Generator,
) -> tuple[Verdict, dict[str, float]]:
    """Return the verdict on made-up models for each device, at the share of the clearest fall, and their true gains
    with the fine-tuned weights alone."""
    names, place = np.unique(clips.location, return_inverse=True)
    of_location = rng.normal(0, spread.location, len(names))
    truth = {device_id: gains.mean + gains.deviation * rng.normal() for device_id in TRAIN_DEVICES}
    noise, locations = {}, {}
    for device_id in truth:
        rows = clips.device == DEVICES.index(device_id)
        effect = of_location + rng.normal(0, spread.device, len(names))
        noise[device_id] = effect[place[rows]] + rng.normal(0, spread.clip, rows.sum())
        locations[device_id] = place[rows]
    falls = [{d: grows(share) * gain + share * noise[d] for d, gain in truth.items()} for share in shares]
    return max((judge(fall, locations) for fall in falls), key=lambda verdict: verdict.margin), truth


def used_of(tests: list[tuple[Verdict, dict[str, float]]], rule: Rule) -> str:
    """Return how often, in percent, a rule uses a model that is truly better / truly worse."""
    used = {True: [], False: []}
    for verdict, truth in tests:
        for device_id, gain in truth.items():
            used[gain > 0].append(rule(verdict, device_id))
    return " / ".join(f"{100 * np.mean(of):.1f}" for of in used.values() if of)


def tables(val: Clips, spread: Spread, shares: tuple[float, ...], n_tests: int, grows: Callable[[float], float]) -> str:
    """Return the standard errors of the validation clips, and what each rule makes of them."""
    rng = np.random.default_rng(0)
    tests = {gains: [simulate(val, spread, gains, shares, grows, rng) for _ in range(n_tests)] for gains in COLUMNS}
    judged = [verdict for some in tests.values() for verdict, _ in some]
    devices = []
    for device_id in TRAIN_DEVICES:
        clips, error = val.of_device(device_id), np.mean([verdict.of_device[device_id].error for verdict in judged])
        devices.append([device_id, len(clips), len(np.unique(clips.location)), f"{error:.3f}"])
    error = np.mean([verdict.together.error for verdict in judged])
    devices.append(["together", len(val), len(np.unique(val.location)), f"{error:.3f}"])
    rules = [[name, *(used_of(some, rule) for some in tests.values())] for name, rule in RULES.items()]
    return "\n\n".join(
        [
            table(["Device", "Validation Clips", "Locations", "Standard Error, Nats"], devices),
            table(["Models Used, Percent, Where the True Gain Is", *map(str, COLUMNS)], rules),
        ]
    )


def main() -> None:
    config = cli.parse(VerdictBenchmark, __doc__)
    _, val = split_by_location(read_clips(config.split_list), config.val_fraction)
    spread = measured(config.project_name, config.runs) if config.runs else MEASURED
    parts = [
        f"{config.tests} simulated fine-tunings a column. x / y: of the models that are truly better / truly worse. "
        f"Deviations of a clip's gain with the fine-tuned weights alone, in nats: {spread.location:.3f} by location, "
        f"{spread.device:.3f} by location and device, {spread.clip:.3f} by clip.",
        "### The fine-tuned weights alone (--own_share 1)",
        tables(val, spread, (1.0,), config.tests, lambda share: 1.0),
    ]
    for what, grows in GROWTHS.items():
        parts.append(f"### The share of the clearest fall, of {' and '.join(map(str, SHARES))}; the gain is {what}")
        parts.append(tables(val, spread, SHARES, config.tests, grows))
    publish("\n\n".join(parts), config.append)


if __name__ == "__main__":
    run(main)
