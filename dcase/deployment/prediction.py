"""Scenes of any recordings from a trained model: probabilities, averaged over the windows of a recording."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dcase.data.recordings import Span, pieces, span_of, windows
from dcase.errors import UserError
from dcase.model.quantisation import rounded
from dcase.runs.config import EvalConfig, from_plain
from dcase.runs.trained import load_trained
from dcase.training.lit import SceneClassifier

UNKNOWN = "unknown"  # a device that the general model serves


@dataclass(frozen=True)
class Recording:
    path: Path
    device_id: str = UNKNOWN  # a device of the model's labels, or anything else


@dataclass(frozen=True)
class Prediction:
    recording: Recording
    scenes: tuple[str, ...]
    probabilities: tuple[float, ...]  # of the scenes; the mean over the windows
    seconds: float
    n_windows: int
    is_repeated: bool  # because it is shorter than the model needs

    def best(self, n: int) -> list[tuple[str, float]]:
        """Return the n most probable scenes with their probabilities."""
        return sorted(zip(self.scenes, self.probabilities, strict=True), key=lambda pair: -pair[1])[:n]


@dataclass(frozen=True)
class Skipped:
    recording: Recording
    reason: str


def load_module(ckpt_path: Path | str) -> SceneClassifier:
    """Return the trained model of a checkpoint, a stored or a published one, with weights rounded to --weight_bits.

    Raises `UserError` as `trained.load_trained`.
    """
    checkpoint = load_trained(str(ckpt_path))
    module = SceneClassifier.from_checkpoint(checkpoint, from_plain(EvalConfig, checkpoint["config"]))
    module.eval().requires_grad_(False)
    for model in (module.model, *module.device_models.values()):
        model.load_state_dict(rounded(model.state_dict(), module.config.storage.weight_bits))
    return module


def span_of_module(module: SceneClassifier) -> Span:
    """Return the lengths of sound that the model takes at once."""
    return span_of(module.config.logmel, module.frames, module.logmel.orig_sample_rate)


def predict(
    module: SceneClassifier, recordings: Iterable[Recording], batch_size: int = 64, overlap: float = 0.0
) -> Iterator[Prediction | Skipped]:
    """Yield each recording's probabilities, in the order given; an unreadable file is skipped, with the reason.

    Raises FloatingPointError where the model's output is not finite: samples that could cause it are not read.

    Args:
        batch_size: windows in a batch, of one recording or of several.
        overlap: share of a window that the next window reads again, 0 to below 1.
    """
    span, rate = span_of_module(module), module.logmel.orig_sample_rate
    hop = max(1, round(span.window * (1 - overlap)))  # samples
    under_way: deque[_Sum] = deque()
    batch: list[tuple[Tensor, _Sum]] = []
    for recording in recordings:
        under_way.append(one := _Sum(recording, module.labels.scenes))
        try:
            for window in windows(one.counted(pieces(recording.path, rate)), span, hop):
                batch.append((window, one))
                if len(batch) == batch_size:
                    _classify(module, batch)
                    batch = []
        except UserError as error:
            one.fault = str(error)
            batch = [(window, of) for window, of in batch if of is not one]
        one.is_whole = True
        yield from _finished(under_way, batch, span, rate)
    if batch:
        _classify(module, batch)
    yield from _finished(under_way, [], span, rate)


@dataclass(eq=False)
class _Sum:
    """A recording's probabilities so far, summed over its classified windows."""

    recording: Recording
    scenes: tuple[str, ...]
    probabilities: Tensor | float = 0.0  # (scenes,) float64
    n_windows: int = 0
    samples: int = 0
    fault: str = ""
    is_whole: bool = False  # all its windows are in a batch or classified

    def counted(self, sound: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield pieces (1, samples) of the recording and count their samples."""
        for piece in sound:
            self.samples += piece.shape[1]
            yield piece

    def result(self, span: Span, rate: int) -> Prediction | Skipped:
        if self.fault:
            return Skipped(self.recording, self.fault)
        mean = tuple((self.probabilities / self.n_windows).tolist())
        return Prediction(
            self.recording, self.scenes, mean, self.samples / rate, self.n_windows, self.samples < span.least
        )


def _finished(under_way: deque[_Sum], batch: list, span: Span, rate: int) -> Iterator[Prediction | Skipped]:
    """Yield the results of the first recordings, up to one with a window that still waits in the batch."""
    waiting = {id(of) for _, of in batch}
    while under_way and under_way[0].is_whole and id(under_way[0]) not in waiting:
        yield under_way.popleft().result(span, rate)


def _classify(module: SceneClassifier, batch: list[tuple[Tensor, _Sum]]) -> None:
    """Add each window's probabilities to its recording's; windows of one length go through the model together."""

    def length(item: tuple[Tensor, _Sum]) -> int:
        return item[0].shape[1]

    where = module.logmel.mean.device
    for _, group in groupby(sorted(batch, key=length), key=length):
        sounds, sums = zip(*group, strict=True)
        device = torch.tensor([module.labels.device_index(one.recording.device_id) for one in sums])
        with torch.inference_mode():
            logits = module(torch.stack(sounds).to(where), device.to(where))
        if lost := next((one for one, x in zip(sums, logits, strict=True) if not x.isfinite().all()), None):
            raise FloatingPointError(f"the model's output for {lost.recording.path} is NaN or infinite")
        for one, probabilities in zip(sums, logits.double().softmax(1).cpu(), strict=True):
            one.probabilities = one.probabilities + probabilities
            one.n_windows += 1
