"""Which data folder, which clips of it, and the loaders that make batches of them."""

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dcase.cli import flags_of
from dcase.data import pack, synth
from dcase.data.dataset import TAU22, Batch, Sound
from dcase.data.labels import Labels
from dcase.data.logmel import LogMelConfig, frames_of, samples_for
from dcase.data.pack import Pack, Rates
from dcase.data.sound import LOWEST_RATE
from dcase.data.tau22 import (
    RATE,
    TEST_CLIPS,
    Clips,
    DataConfig,
    SplitConfig,
    check_files,
    check_folder,
    drawn_names,
    is_tau22,
    load_splits,
    split_by_location,
    untrained_scenes,
)
from dcase.errors import command, doctor_tells_more
from dcase.machine import SIGNALS, MachineConfig, main_first, n_cores, process_count, process_rank
from dcase.progress import progress

Config = TypeVar("Config")  # a dataclass with the parts ``data`` and ``logmel``
_HEADERS = 200  # that tell a folder's rate; those of all of TAU22's files may take minutes from a cold disk
PACKING = ("pack_dir", "subset", "sample_rate", "orig_sample_rate")  # flags that say what a pack holds


@dataclass(frozen=True)
class Source:
    """A data folder, its training and test clips, and whether figures from it compare with published ones."""

    folder: Path
    training: Clips | None  # of --subset, the validation part included; None where only the test is needed
    test: Clips
    name: str  # for tables and charts
    comparable: bool  # with published figures: TAU22, the whole test split
    note: str  # why they are not; "" where they are

    @property
    def labels(self) -> Labels:
        return self.test.labels


@doctor_tells_more
def find_source(config: DataConfig, subset: int | None = None) -> Source:
    """Load the clips of --dataset_dir, else of the environment variable TAU22_DIR, else of SynthTAU, which is made once
    into a cache folder. Without ``subset``, only the test clips are loaded."""
    given = config.dataset_dir or os.environ.get("TAU22_DIR")
    if not given:
        print("neither --dataset_dir nor TAU22_DIR is given: using SynthTAU, a synthetic stand-in for TAU22")
    with main_first():
        folder = Path(given).expanduser() if given else synth.ensure_default()
        check_folder(folder)
        # The test list, too, before training: a mistake in it shows now, and is_tau22 needs it.
        *training, test = load_splits(folder, *([f"split{subset}"] if subset else []), "test")
    training = training[0] if training else None
    if training and (untrained := untrained_scenes(training, test)):
        print(f"WARNING: {untrained}")
    if not is_tau22(folder):
        synthetic = (folder / synth.MARK).exists()
        note = f"{'Synthetic data' if synthetic else 'Not TAU22'}: not comparable with figures from TAU22."
        return Source(folder, training, test, "SynthTAU" if synthetic else folder.name, False, note)
    left_out = TEST_CLIPS - len(test)
    note = f"{left_out} test clips are left out (meta_excluded.csv): not comparable with published figures."
    return Source(folder, training, test, "TAU22", not left_out, note if left_out else "")


def training_clips(source: Source, split: SplitConfig) -> tuple[Clips, Clips | None]:
    """Return (train, val): val is held out of the training clips by location, or is None with --val_fraction 0."""
    clips = source.training
    if split.val_split == "test":
        print("--val_split test: the model is chosen on the test split, so its test figures are OPTIMISTIC")
        return clips, source.test
    if split.val_fraction == 0:
        print("--val_fraction 0: training on every clip; without validation, the last epoch's model is kept")
        return clips, None
    return split_by_location(clips, split.val_fraction)


@doctor_tells_more
def open_sound(config: Config, folder: Path) -> tuple[Config, Sound]:
    """Open the pack where there is one (or --read_from asks for it), else the WAV files, and print which.

    The configuration is returned with --read_from, --orig_sample_rate and, with --batch_lengths, --target_length
    decided, so that a resumed run reads what it read before, and as it did. Raises `UserError` where the pack does not
    fit.
    """
    logmel, place, rates = config.logmel, config.data.pack_folder(folder), rates_in(folder)
    read_from = config.data.read_from
    again = data_command("python -m dcase.prepare", config, folder, "--pack", given=PACKING)
    found = Pack(place, again) if read_from == "pack" or (read_from == "auto" and pack.exists(place)) else None
    alone = found.rates.orig_sample_rate if found else RATE  # without the recordings
    rate = config.data.orig_sample_rate or usual_rate(rates, alone)
    if logmel.batch_lengths and logmel.target_length is None:
        samples = int(found.length.max()) if found else _longest(folder, rate)
        logmel = replace(logmel, target_length=frames_of(logmel, samples, logmel.sample_rate if found else rate))
        print(f"--batch_lengths: the longest recording has {logmel.target_length} frames (--target_length)")
    if found:
        found.check_rates(Rates(rate, logmel.sample_rate))
        print(f"sound: the pack {place} ({len(found)} clips at {logmel.sample_rate} Hz)")
        sound = Sound(logmel.sample_rate, samples_for(logmel, logmel.sample_rate), found)
    else:
        print(f"sound: WAV files of {folder} (`python -m dcase.prepare --pack` makes them one file, read much faster)")
        sound = Sound(rate, samples_for(logmel, rate))
    if others := ", ".join(str(other) for other in sorted(rates) if other != rate):
        print(f"recordings of {others} Hz are resampled to {rate} Hz (--orig_sample_rate)")
    decided = replace(config.data, read_from="pack" if found else "wav", orig_sample_rate=rate)
    return replace(config, data=decided, logmel=logmel), sound


def rates_in(folder: Path) -> Counter[int]:
    """Return how many recordings of a data folder, of 200 at most, have each rate (Hz), as their headers say."""
    rates: Counter[int] = Counter()
    for path in (folder / name for name in drawn_names(folder, _HEADERS)):
        with suppress(soundfile.SoundFileError, OSError, TypeError):  # TypeError: soundfile's, for a name in .raw
            if path.is_file() and (rate := soundfile.info(path).samplerate) >= LOWEST_RATE:
                rates[rate] += 1
    return rates


def _longest(folder: Path, rate: int) -> int:
    """Return the samples, at a rate (Hz), of a data folder's longest recording, as the headers say."""
    longest = 0.0
    for name in progress(drawn_names(folder, 10**9), desc="lengths of the clips", unit=" files", leave=False, delay=1):
        with suppress(soundfile.SoundFileError, OSError, TypeError):  # reading the clip says what is wrong with it
            if (path := folder / name).is_file():
                longest = max(longest, soundfile.info(path).duration)
    return math.ceil(longest * rate)


def usual_rate(rates: Counter[int], alone: int = RATE) -> int:
    """Return the most frequent rate, of equally frequent ones the highest; ``alone`` where there is none."""
    return max(rates, key=lambda rate: (rates[rate], rate), default=alone)


def data_command(program: str, config, folder: Path, *flags: str, given: tuple[str, ...]) -> str:
    """Return a shell command on a data folder with those of the ``given`` flags that are not the defaults."""
    values = flags_of(config, ("data", "split", "logmel"))
    usual = {**vars(DataConfig()), **vars(SplitConfig()), **vars(LogMelConfig())}
    other = {name: str(values.get(name, usual[name])) for name in given if values.get(name, usual[name]) != usual[name]}
    switches = [name for name in other if isinstance(usual[name], bool)]  # flags without a value
    texts = {name: [] if name in switches else [os.path.expanduser(value)] for name, value in other.items()}
    changed = [part for name, text in texts.items() for part in (f"--{name}", *text)]
    return command(*program.split(), "--dataset_dir", folder, *flags, *changed)


def with_sound(clips: Clips, sound: Sound, like: TAU22 | None = None) -> TAU22:
    """Return the clips' data set. Raises `UserError` where recordings are missing or not those that were packed."""
    check_recordings(clips, sound)
    return TAU22(clips, sound, like)


@doctor_tells_more
def check_recordings(clips: Clips, sound: Sound) -> None:
    """Raise `UserError` where recordings are missing, or are not those that were packed."""
    if sound.pack is None:
        check_files(clips)
    else:
        sound.pack.check_sources(clips.folder, clips.filenames)


class Batches(Sampler[list[int]]):
    """The clips, of n, in each batch of this process: all processes together read every clip exactly once.

    The processes share every ``batch_size`` x processes clips of ``order()`` as evenly as possible. In the last batch a
    process may be left without a clip. It then gets one that does not count, so that all processes take the same number
    of steps. ``start()`` is the batch to begin with. Both are called when an iteration begins.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        order: Callable[[], Sequence[int]] | None = None,
        start: Callable[[], int] = lambda: 0,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
    ):
        self.n, self.order, self.start, self.accumulate = n, order or (lambda: range(n)), start, accumulate
        self.rank, self.processes, self.together = rank, processes, batch_size * processes

    def __len__(self) -> int:
        return math.ceil(self.n / self.together)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for batch in range(self.start(), len(self)):
            first, last = self._mine(batch)
            yield list(order[first:last]) or [order[batch * self.together]]

    def _mine(self, batch: int) -> tuple[int, int]:
        """Return where this process's part of a batch begins and ends in the order."""
        first = batch * self.together
        size = min(self.together, self.n - first)
        return tuple(first + size * rank // self.processes for rank in (self.rank, self.rank + 1))

    def counted(self, batch: int) -> int:
        """Return how many clips of this process's batch count: all, or none where its only clip just keeps step."""
        first, last = self._mine(batch)
        return last - first

    def weight(self, batch: int) -> float:
        """Return the factor of this process's mean loss, so that the mean over the processes and over the
        ``accumulate`` batches of an optimiser step is the mean over all clips of that step."""
        begin = batch // self.accumulate * self.accumulate * self.together
        clips = min(self.n, begin + self.accumulate * self.together) - begin
        return self.counted(batch) * self.processes * self.accumulate / clips


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """Return an order of n clips that depends only on seed and epoch, so that a resumed run finds its place."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()


def clips_id(train: Clips, val: Clips | None) -> str:
    """Return an ID of the clips, so that a resumed run or stage 2 can tell whether they are the same."""
    return f"{train.fingerprint()}-{val.fingerprint() if val is not None else 'none'}"


def mixed_seed(*numbers: int) -> int:
    """Mix several numbers into one 63-bit seed: neighbouring numbers give unrelated seeds."""
    state = 0
    for number in numbers:  # the finaliser of splitmix64
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


def evaluation_batches(dataset: TAU22, machine: MachineConfig) -> Batches:
    """Return batches of the data set's clips in its order, shared among the processes."""
    return Batches(len(dataset), machine.batch_size, rank=process_rank(), processes=process_count())


class BatchLoader(DataLoader):
    """A loader of `data.dataset.Batch` that knows the weight of each batch."""

    batch_sampler: Batches

    def counted(self, batch: int) -> int:
        """As `Batches.counted`."""
        return self.batch_sampler.counted(batch)

    def weight(self, batch: int) -> float:
        """As `Batches.weight`."""
        return self.batch_sampler.weight(batch)

    def names(self, index: Tensor) -> list[str]:
        """Return the file names of clips, given by a `Batch`'s ``index``."""
        return [self.dataset.clips.name(i) for i in index.tolist()]


def loader(dataset: TAU22, machine: MachineConfig, batches: Batches) -> BatchLoader:
    """Return a loader of the data set's batches.

    Reading a pack is so fast that more processes would only cost time: none is used on a CPU, and one, which reads
    ahead, with a GPU.
    """
    workers = min(machine.num_workers, n_cores())
    on_gpu = torch.cuda.is_available() and machine.accelerator != "cpu"
    if dataset.sound.pack:
        workers = min(workers, int(on_gpu))
    return BatchLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_parent,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals: SLURM sends them to all processes of a job. The training process saves, then ends the workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Batch) -> Batch:
    return batch  # TAU22 gathers whole batches
