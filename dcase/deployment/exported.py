"""Modules for export: waveform (b, samples) or log-mel (b, 1, n_mels, frames) in, logits (b, n_classes) out.

Weights stay as they are stored (`quantisation`): int8 codes with float16 scales, float16 or float32. Decoding them is
part of the graph; a runtime that folds constants, as ONNX Runtime does, decodes them once, when it loads the model. The
matrices of the front end are calculated in the graph too, from the few numbers that define them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dcase.data.logmel import LOG_OFFSET, LogMel
from dcase.model.quantisation import SCALE, encode

_PARTS = 4  # that a resampling kernel is split into: neighbouring samples need few of all taps
_BLOCK = 64  # mel bins per matrix product, for the same reason
_NEGLIGIBLE = 1e-20  # tap of a resampling kernel: cos(pi / 2) squared, which is not quite 0


class Exported(nn.Module):
    """A model with stored weights, behind ``front_end`` where that is given."""

    def __init__(self, model: nn.Module, bits: int, front_end: "FrontEnd | None" = None):
        super().__init__()
        self.front_end = front_end
        self.weights = StoredWeights(encode(model.state_dict(), bits))
        self._model = [model.eval()]  # in a list: its own weights are not exported

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.front_end is None else self.front_end(x)
        return functional_call(self._model[0], self.weights(), (x,))


class StoredWeights(nn.Module):
    """The tensors of `quantisation.encode` as buffers; called, it returns the weights in float32."""

    def __init__(self, stored: dict[str, Tensor]):
        super().__init__()
        for name, value in stored.items():
            *path, leaf = _buffer_name(name).split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_buffer(leaf, value)

    def forward(self) -> dict[str, Tensor]:
        stored = dict(self.named_buffers())
        scales = {name: _buffer_name(name + SCALE) for name, value in stored.items() if value.dtype == torch.int8}
        weights = {name: value.float() for name, value in stored.items() if name not in scales.values()}
        for name, of in scales.items():
            weights[name] = weights[name] * stored[of].float().view(-1, *(1,) * (weights[name].ndim - 1))
        return weights


def _buffer_name(name: str) -> str:
    """Return a buffer's name: a module cannot have both ``weight`` and ``weight.scale``."""
    return name.replace(SCALE, SCALE.replace(".", "_"))


class FrontEnd(nn.Module):
    """`logmel.LogMel` in matrix products: waveform (b, samples) at the recordings' rate -> normalised log-mel
    (b, 1, n_mels, frames).

    ONNX Runtime's own Fourier transform takes 10 ms for a clip of a second, longer than everything else. Here it is
    calculated in three sums (Cooley and Tukey, Math. Comp. 19, 1965): n_fft = r0 r1 r2, samples n = r1 r2 a + r2 b + c,
    FFT bins k = k0 + r0 k1 + r0 r1 k2, w(x) = exp(-2 pi i x / n_fft), and

        X[k] = sum_c w(c k) sum_b w(r2 b (k0 + r0 k1)) sum_a w(r1 r2 a k0) x[n]

    A waveform is real, so bin n_fft - k has the power of bin k, and k0 = 0 ... r0 / 2 are enough. A window shorter than
    n_fft starts at sample 0 instead of lying in the middle, which changes phases, but no power.

    Short sums also keep rounding errors small. That matters: the log magnifies them where a loud clip has quiet bins,
    and PyTorch's own rounding moves logits by up to 1e-4 there.

    ``in_graph``: the graph calculates its matrices from a few kilobytes; otherwise it holds them, several megabytes.
    """

    def __init__(self, logmel: LogMel, samples: int, in_graph: bool = True):
        super().__init__()
        self.config = config = logmel.config
        self.mean, self.std = logmel.mean.item(), logmel.std.item()
        common = math.gcd(logmel.orig_sample_rate, config.sample_rate)
        self.orig, self.new = logmel.orig_sample_rate // common, config.sample_rate // common
        self.n_samples = math.ceil(samples * self.new / self.orig)  # resampled
        if self.orig != self.new:
            kernel = logmel.resample.kernel.squeeze(1)  # (new, taps)
            kernel = kernel.masked_fill(kernel.abs() < _NEGLIGIBLE, 0)
            self.taps = kernel.shape[1]
            self.kernels = nn.ModuleList()
            self.first_taps = []  # of each part of the kernel
            for part in kernel.split(math.ceil(self.new / _PARTS)):
                used = part.any(0).nonzero().flatten().tolist()
                self.first_taps.append(used[0])
                self.kernels.append(Band(part[:, used[0] : used[-1] + 1]))
        r0, r1, r2 = self.radices = _radices(config.n_fft)
        rows = math.ceil(config.window_length / (r1 * r2))
        self.register_buffer("window", nn.functional.pad(logmel.window, (0, rows * r1 * r2 - config.window_length)))
        self.sums = nn.ModuleList(
            [
                Factors(partial(_first_sum, r0=r0, rows=rows)),
                Factors(partial(_middle_sum, r0=r0, r1=r1)),
                Factors(partial(_last_sum, r0=r0, r1=r1, r2=r2)),
            ]
        )
        k = _low_part(r0, r1).unsqueeze(1) + r0 * r1 * _low_first(r2)  # (k0 k1, k2)
        upper = k > config.n_fft // 2
        filters = logmel.filters[torch.where(upper, config.n_fft - k, k)]  # (k0 k1, k2, n_mels)
        filters[upper & (2 * k % r0 == 0)] = 0  # where the bin of the same power counts already
        self.filters = nn.ModuleList()
        self.used = []  # the k2 that each block of mel bins needs
        for block in filters.split(_BLOCK, 2):
            used = block.any(2).any(0).nonzero().flatten().tolist() or [0]
            self.used.append(slice(used[0], used[-1] + 1))
            self.filters.append(Band(block[:, self.used[-1]].flatten(0, 1)))
        if not in_graph:
            for parent in [*self.modules()]:
                for name, part in [*parent.named_children()]:
                    if isinstance(part, Band | Factors):
                        setattr(parent, name, Held(part()))

    def forward(self, waveform: Tensor) -> Tensor:
        config = self.config
        frames = self._frames(waveform if self.orig == self.new else self._resampled(waveform))
        b, t, _ = frames.shape
        (r0, r1, r2), (first, middle, last) = self.radices, (part() for part in self.sums)
        x = (frames * self.window).reshape(b * t, -1, r1 * r2)
        x = (first @ x).view(b * t, r0 // 2 + 1, 2 * r1, r2)  # re and im of each b
        x = (middle @ x).view(b * t, -1, 2 * r2).transpose(0, 1)  # (k0 k1, b t, re and im of c)
        x = x @ last
        x = x * x
        power = x[..., :r2] + x[..., r2:]
        parts = [power[..., used].transpose(0, 1).flatten(1) for used in self.used]
        x = torch.cat([part @ filters() for part, filters in zip(parts, self.filters, strict=True)], 1)
        x = (x + LOG_OFFSET).log()
        x = ((x - self.mean) / self.std).view(b, 1, t, config.n_mels).mT
        wanted = t if config.target_length is None else config.target_length
        silence = (math.log(LOG_OFFSET) - self.mean) / self.std
        return nn.functional.pad(x[..., :wanted], (0, max(0, wanted - t)), value=silence)

    def _resampled(self, waveform: Tensor) -> Tensor:
        """Return (b, resampled samples) of (b, samples), as torchaudio's Resample."""
        half = (self.taps - self.orig) // 2
        x = nn.functional.pad(waveform, (half, half + self.orig)).unsqueeze(1)
        steps = (x.shape[2] - self.taps) // self.orig + 1
        parts = []
        for first, kernel in zip(self.first_taps, self.kernels, strict=True):
            kernel = kernel().unsqueeze(1)
            part = x[..., first : first + (steps - 1) * self.orig + kernel.shape[2]]
            parts.append(nn.functional.conv1d(part, kernel, stride=self.orig))
        return torch.cat(parts, 1).mT.flatten(1)[:, : self.n_samples]

    def _frames(self, waveform: Tensor) -> Tensor:
        """Return (b, frames, samples of a window) of (b, resampled samples): centred, with the clip's ends reflected.

        Frames are joined from pieces of one hop, which is faster than gathering samples.
        """
        hop, length = self.config.hop_length, len(self.window)
        edge = self.config.n_fft // 2 - (self.config.n_fft - self.config.window_length) // 2
        t = 1 + (self.n_samples - self.config.n_fft % 2) // hop
        pieces = math.ceil(length / hop)
        after = (t - 1) * hop + self.config.window_length - edge - self.n_samples
        x = nn.functional.pad(waveform.unsqueeze(1), (edge, max(after, 0)), mode="reflect").squeeze(1)
        wanted = (t + pieces - 1) * hop
        x = nn.functional.pad(x, (0, max(0, wanted - x.shape[1])))[:, :wanted].unflatten(1, (-1, hop))
        return torch.cat([x[:, i : i + t] for i in range(pieces)], 2)[..., :length]


class Band(nn.Module):
    """A matrix whose rows are zero but for a few neighbouring columns; called, it returns the whole matrix."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.columns = matrix.shape[1]
        used = matrix != 0
        first = used.int().argmax(1)
        last = self.columns - 1 - used.flip(1).int().argmax(1)
        width = int(torch.where(used.any(1), last - first + 1, 1).max())
        first = first.clamp(max=self.columns - width)
        self.register_buffer("start", first.int())
        self.register_buffer("values", matrix.gather(1, first[:, None] + torch.arange(width)))

    def forward(self) -> Tensor:
        place = self.start.long().unsqueeze(1) + torch.arange(self.values.shape[1])
        return torch.zeros(len(self.values), self.columns).scatter(1, place, self.values)


class Factors(nn.Module):
    """The factors of one of the three sums; called, it calculates them with ``make``, a function of `turns`."""

    def __init__(self, make: Callable[[Callable], Tensor]):
        super().__init__()
        self.make = make
        # A plain number in the code would become float32 in ONNX.
        self.register_buffer("turn", torch.tensor(2 * math.pi, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.make(self.turns)

    def turns(self, steps: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of ``steps`` out of ``whole`` in a full turn, exact to float32."""
        angle = (steps % whole).double() * self.turn / whole
        return angle.cos().float(), angle.sin().float()


def _first_sum(turns: Callable, r0: int, rows: int) -> Tensor:
    """Return re and im of w(r1 r2 a k0), by a: (2 (r0 / 2 + 1), rows)."""
    cos, sin = turns(torch.arange(r0 // 2 + 1).unsqueeze(1) * torch.arange(rows), r0)
    return torch.stack([cos, -sin], 1).flatten(0, 1)


def _middle_sum(turns: Callable, r0: int, r1: int) -> Tensor:
    """Return w(r2 b (k0 + r0 k1)), from re and im of all b to re and im of each k1: (r0 / 2 + 1, 2 r1, 2 r1)."""
    k = _low_part(r0, r1).view(-1, r1, 1)
    cos, sin = turns(k * torch.arange(r1), r0 * r1)  # (k0, k1, b)
    return torch.stack([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 2).flatten(1, 2)


def _last_sum(turns: Callable, r0: int, r1: int, r2: int) -> Tensor:
    """Return w(c k) for each k0, k1, from re and im of all c to those of all k2: ((r0 / 2 + 1) r1, 2 r2, 2 r2)."""
    k = _low_part(r0, r1).view(-1, 1, 1) + r0 * r1 * _low_first(r2)
    cos, sin = turns(torch.arange(r2).unsqueeze(1) * k, r0 * r1 * r2)  # (k0 k1, c, k2)
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)


def _radices(n: int) -> tuple[int, int, int]:
    """Return three factors of n with the smallest sum, with which the transform's cost grows."""
    divisors = [r for r in range(1, n + 1) if n % r == 0]
    pairs = ((r0, r1) for r0 in divisors for r1 in divisors if n % (r0 * r1) == 0)
    return min(((r0, r1, n // (r0 * r1)) for r0, r1 in pairs), key=sum)


def _low_part(r0: int, r1: int) -> Tensor:
    """Return k0 + r0 k1, k1 running fastest: ((r0 / 2 + 1) r1,)."""
    return (torch.arange(r0 // 2 + 1).unsqueeze(1) + r0 * torch.arange(r1)).flatten()


def _low_first(r2: int) -> Tensor:
    """Return 0, r2 - 1, 1, r2 - 2, ... (r2,): k2 in an order that puts bins of neighbouring frequencies together."""
    half = torch.arange(r2) // 2
    return torch.where(torch.arange(r2) % 2 == 0, half, r2 - 1 - half)


class Held(nn.Module):
    """A matrix that the graph holds; called, it returns it."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self) -> Tensor:
        return self.matrix
