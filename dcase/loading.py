"""Which data folder, which clips of it, and the loaders that make batches of them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dcase import synth
from dcase.config import MachineConfig
from dcase.tau22 import (
    TEST_CLIPS,
    Clips,
    DataConfig,
    SplitConfig,
    check_folder,
    collate,
    is_tau22,
    load_clips,
    split_by_location,
)


@dataclass(frozen=True)
class Source:
    """A data folder, its test clips, and what may be said of figures from it."""

    folder: Path
    test: Clips
    name: str  # for tables and charts
    comparable: bool  # with published figures: TAU22, the whole test split
    note: str  # why they are not; "" where they are


def find_source(config: DataConfig) -> Source:
    """--dataset_dir, else the environment variable TAU22_DIR, else SynthTAU, made once into a cache folder."""
    given = config.dataset_dir or os.environ.get("TAU22_DIR")
    if not given:
        print("neither --dataset_dir nor TAU22_DIR is given: using SynthTAU, a synthetic stand-in for TAU22")
    folder = Path(given).expanduser() if given else synth.ensure_default()
    check_folder(folder)
    test = load_clips(folder, "test")  # before training: a mistake in the list is found now, and it is TAU22's mark
    if not is_tau22(folder):
        synthetic = (folder / synth.MARK).exists()
        note = f"{'Synthetic data' if synthetic else 'Not TAU22'}: not comparable with figures from TAU22."
        return Source(folder, test, "SynthTAU" if synthetic else folder.name, False, note)
    left_out = TEST_CLIPS - len(test)
    note = f"{left_out} test clips are left out (meta_excluded.csv): not comparable with published figures."
    return Source(folder, test, "TAU22", not left_out, note if left_out else "")


def training_clips(source: Source, split: SplitConfig) -> tuple[Clips, Clips | None]:
    """(train, val): val is held out of the training clips by location, or is None with --val_fraction 0."""
    clips = load_clips(source.folder, f"split{split.subset}")
    if split.val_split == "test":
        print("--val_split test: the model is chosen on the test split, so its test figures are OPTIMISTIC")
        return clips, source.test
    if split.val_fraction == 0:
        print(
            "--val_fraction 0: training on every clip; the last epoch's model is kept, as nothing can tell a better one"
        )
        return clips, None
    return split_by_location(clips, split.val_fraction)


class EpochOrder(Sampler[int]):
    """A new order of n clips every epoch, from the seed and the epoch alone, so that a resumed run finds its place.

    ``epoch`` is asked when an epoch's order is made. It is a function because Lightning makes the first iterator
    before it tells samplers their epoch.
    """

    def __init__(self, n: int, seed: int, epoch: Callable[[], int]):
        self.n, self.seed, self.epoch = n, seed, epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch()))
        return iter(torch.randperm(self.n, generator=generator).tolist())


def clips_id(train: Clips, val: Clips | None) -> str:
    """Which clips were trained and chosen on, so that a resumed run or stage 2 can tell that they are the same."""
    return f"{train.fingerprint()}-{val.fingerprint() if val is not None else 'none'}"


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers: neighbours in any of them give unrelated seeds."""
    state = 0
    for number in numbers:  # the finaliser of splitmix64
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


def loader(dataset: Dataset, machine: MachineConfig, order: Sampler | None = None) -> DataLoader:
    """Batches of `tau22.Clip`, in ``order`` or, without one, in the data set's own. No clip is dropped."""
    workers = min(machine.num_workers, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_size=machine.batch_size,
        sampler=order,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
