"""Scenes of any recordings from a trained model: probabilities, averaged over the windows of a recording."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

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
    embedding: tuple[float, ...] = ()  # the model's features; the mean over the windows

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
    module: SceneClassifier,
    recordings: Iterable[Recording],
    batch_size: int = 64,
    overlap: float = 0.0,
    embed: bool = False,
) -> Iterator[Prediction | Skipped]:
    """Yield each recording's probabilities, in the order given; an unreadable file is skipped, with the reason.

    Raises FloatingPointError where the model's output is not finite: samples that could cause it are not read.

    Args:
        batch_size: windows in a batch, of one recording or of several.
        overlap: share of a window that the next window reads again, 0 to below 1.
        embed: with embeddings.
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
                    _classify(module, batch, embed)
                    batch = []
        except UserError as error:
            one.fault = str(error)
            batch = [(window, of) for window, of in batch if of is not one]
        one.is_whole = True
        yield from _finished(under_way, batch, span, rate)
    if batch:
        _classify(module, batch, embed)
    yield from _finished(under_way, [], span, rate)


def predict_live(
    module: SceneClassifier, sound: Iterable[Tensor], recording: Recording, hop: int
) -> Iterator[Prediction]:
    """Yield a prediction of each window of ``sound``, pieces (1, samples), as soon as it is there; one begins every
    ``hop`` samples. ``seconds`` of a prediction is where its window ends. Raises FloatingPointError as `predict`."""
    span, rate = span_of_module(module), module.logmel.orig_sample_rate
    whole = _Sum(recording, module.labels.scenes)
    for i, window in enumerate(windows(whole.counted(sound), span, hop)):
        one = _Sum(recording, whole.scenes, samples=min(whole.samples, span.window + i * hop))
        _classify(module, [(window, one)], False)
        yield one.result(span, rate)


@dataclass(eq=False)
class _Sum:
    """A recording's probabilities and features so far, summed over its classified windows."""

    recording: Recording
    scenes: tuple[str, ...]
    values: Tensor | float = 0.0  # probabilities and, behind them, features: (scenes + embed_dim,) float64
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
        mean, n = tuple((self.values / self.n_windows).tolist()), len(self.scenes)
        seconds, is_repeated = self.samples / rate, self.samples < span.least
        return Prediction(self.recording, self.scenes, mean[:n], seconds, self.n_windows, is_repeated, mean[n:])


def _finished(under_way: deque[_Sum], batch: list, span: Span, rate: int) -> Iterator[Prediction | Skipped]:
    """Yield the results of the first recordings, up to one with a window that still waits in the batch."""
    waiting = {id(of) for _, of in batch}
    while under_way and under_way[0].is_whole and id(under_way[0]) not in waiting:
        yield under_way.popleft().result(span, rate)


def _classify(module: SceneClassifier, batch: list[tuple[Tensor, _Sum]], embed: bool) -> None:
    """Add each window's values to its recording's; windows of one length go through the model together."""

    def length(item: tuple[Tensor, _Sum]) -> int:
        return item[0].shape[1]

    where, n = module.logmel.mean.device, len(module.labels.scenes)
    model = partial(_with_features, module) if embed else module
    for _, group in groupby(sorted(batch, key=length), key=length):
        sounds, sums = zip(*group, strict=True)
        device = torch.tensor([module.labels.device_index(one.recording.device_id) for one in sums])
        with torch.inference_mode():
            outputs = model(torch.stack(sounds).to(where), device.to(where))
        if lost := next((one for one, x in zip(sums, outputs, strict=True) if not x.isfinite().all()), None):
            raise FloatingPointError(f"the model's output for {lost.recording.path} is NaN or infinite")
        logits, features = outputs.double().tensor_split([n], 1)
        for one, values in zip(sums, torch.cat([logits.softmax(1), features], 1).cpu(), strict=True):
            one.values = one.values + values
            one.n_windows += 1


def _with_features(module: SceneClassifier, waveform: Tensor, device: Tensor) -> Tensor:
    """Return logits and, behind them, the features that the model's last layers classify: (b, scenes + embed_dim)."""

    def both(model: nn.Module, *inputs: Tensor) -> Tensor:
        features = model.forward_features(*inputs)
        return torch.cat([model.forward_head(features), features], 1)

    sound = module.logmel.resampled(waveform, torch.full_like(device, waveform.shape[-1]))
    specific = {device_id: partial(both, model) for device_id, model in module.device_models.items()}
    return module.by_device(partial(both, module.model), *sound, device, specific)
