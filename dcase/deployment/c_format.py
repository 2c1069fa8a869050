"""Write a model as C: waveform to logits in scene.c, whose shape, tables and weights stand in weights.h.

The C is in the folder ``c`` beside this file; what depends on the model is filled in here. `plan` gives every
activation its place in one array, so that what is needed at different times shares memory.
"""

import math
import re
import shlex
import shutil
import subprocess
import wave
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from aum.scan.build import NotAvailable, find_compiler
from dcase.data.logmel import LOG_OFFSET, LogMel, frames_of
from dcase.errors import UserError
from dcase.model.cp_mobile import STAGES, STEM, CPMobile
from dcase.model.quantisation import SCALE, encode
from dcase.runs.stored import GENERAL
from dcase.training.lit import SceneClassifier

SOURCES = Path(__file__).with_name("c")
PROGRAM = "scene"
TIMEOUT = 300  # seconds, of the compiler, and of the program for each 100 clips
AT_ONCE = 6  # frames that `product` takes; it reads beyond the end of rows that are shorter
DEPTHWISE = 1  # among a stage's matrices
EXACT = 1e-6  # of a mel filter's weight, which is at most 1
FLAGS = ("-std=c99", "-O3")
# Fields of AuMConfig and the values that scene.c knows.
KNOWN = {
    "head": "patch", "cls_position": "none", "direction": "bi_bi", "row_scan": True, "local_conv": True,
    "pos_embed": True, "factorised_pos_embed": True, "paired_layers": False,
}  # fmt: skip


def refuse_unknown(module: SceneClassifier, bits: int) -> None:
    """Raise `UserError`, naming the field, for a model that scene.c cannot express."""
    name, config = module.config.model.model, getattr(module.model, "config", None)
    start = f"--format c cannot express {name}:"
    if bits not in (16, 8):
        raise UserError(f"--format c stores weights in 16 or 8 bits, this model has {bits}: give --weight_bits 16")
    n_fft = module.logmel.config.n_fft
    if n_fft & (n_fft - 1) or n_fft < 8:
        raise UserError(f"{start} n_fft is {n_fft}; it must be a power of two from 8 on")
    if isinstance(module.model, CPMobile):
        return
    if config is None:
        raise UserError(f"{start} it is a {type(module.model).__name__}")
    for field_name, known in KNOWN.items():
        if getattr(config, field_name) != known:
            raise UserError(f"{start} {field_name} is {getattr(config, field_name)}, and only {known} is known")
    if not config.stem:
        raise UserError(f"{start} stem is empty; it must have at least one convolution")
    if config.patch_size[1] != 1 or config.strides not in (None, config.patch_size):
        raise UserError(
            f"{start} patch_size is {config.patch_size}, strides {config.strides}; only N,1 without overlap"
        )


# ---- the shape ----


@dataclass
class Stage:
    """A row of the table of stages; ``names``: of expand, depthwise and project, each a weight and its norm."""

    kind: str
    c_in: int
    c_out: int
    t_in: int
    t_out: int
    rows: int  # mel bins of its input
    stride: tuple[int, int] = (1, 1)
    wide: int = 0
    shortcut: int = 0  # 2: an average
    names: tuple = (None, None, None)
    inner: int = 0
    outer: int = 0


def stages_of(module: SceneClassifier) -> list[Stage]:
    """Return what is done with rows of mel bins before the Mamba layers or the head."""
    stages: list[Stage] = []
    rows, t, c = module.logmel.config.n_mels, module.frames, 1

    def add(kind: str, c_out: int, stride=(1, 1), **others) -> None:
        nonlocal rows, t, c
        t_out = -(-t // stride[1])
        stages.append(Stage(kind, c, c_out, t, t_out, rows, stride, **others))
        rows, t, c = -(-rows // stride[0]), t_out, c_out

    def norms(start: str, *parts: str) -> tuple:
        return tuple((f"{start}.{part}.0", f"{start}.{part}.1") for part in parts)

    if isinstance(module.model, CPMobile):
        for i, width in enumerate(STEM):
            add("CONVOLUTION", width, (2, 2), names=(None, None, *norms("in_c", str(i))))
        for name, blocks in STAGES.items():
            for block, (c_in, wide, c_out, stride) in blocks.items():
                shortcut = 0 if c_in != c_out else 1 if stride == (1, 1) else 2
                names = norms(f"stages.{name}.{block}.block", "0", "1", "2")
                add("RESIDUAL", c_out, stride, wide=wide, shortcut=shortcut, names=names)
        add("MEAN", c)
        return stages
    config = module.model.config
    for i, width in enumerate(config.stem):
        add("CONVOLUTION", width, (2, 2), names=(None, None, *norms("stem", str(i))))
    for i in range(len(config.stem), len(config.stem) + config.stem_blocks):
        names = norms(f"stem.{i}", "expand", "depthwise", "project")
        add("RESIDUAL", c, wide=module.model.stem[i].expand[0].out_channels, shortcut=1, names=names)
    add("PATCHES", config.embed_dim, (config.patch_size[0], 1), names=(None, None, ("patch_embed.proj", None)))
    return stages


class Places:
    """Places in the arena, one after the other, in floats."""

    def __init__(self, start: int = 0):
        self.end, self.of = start, {}

    def add(self, name: str, floats: int) -> int:
        self.of[name], self.end = self.end, self.end + floats
        return self.of[name]


def plan(module: SceneClassifier, stages: list[Stage]) -> tuple[dict[str, int], int]:
    """Return the constants of weights.h that are places in the arena, and the arena's length; set the stages' places.

    The log-mel lies behind what is needed while sound comes in (the last window's samples and their spectrum) and
    behind the stages' rows. Tokens begin behind the stages' and the Mamba layer's memory, and cover those rows of the
    log-mel that the stages have read when a token row is begun.
    """
    config, mamba = module.logmel.config, stages[-1].kind == "PATCHES"
    columns = max(stage.t_in for stage in stages)
    slack = max(0, AT_ONCE - min(stage.t_out for stage in stages))
    sound = Places()
    sound.add("SOUND", config.window_length)
    sound.add("SPECTRUM", config.n_fft)
    rows = Places()
    rows.add("PANEL", 4 * longest_sum(module, stages))
    rows.add("FEATURES", stages[-1].c_out)
    rest = rows.end
    rows.add("ZEROS", columns + slack)
    rows.add("OUT", max(module.frames, *(g.c_out * g.t_out for g in stages[:-1])) + slack)
    for i, g in enumerate(stages):
        if g.kind == "CONVOLUTION":
            g.outer = rows.add(f"outer {i}", 3 * g.c_in * (2 * g.t_out + 1))
        elif g.kind == "RESIDUAL":
            g.outer = rows.add(f"outer {i}", (0, 2, 3)[g.shortcut] * g.c_in * g.t_in)
            g.inner = rows.add(f"inner {i}", 3 * g.wide * g.t_in)
    rows.end += slack
    places = sound.of | rows.of
    row, mel_end = module.frames, max(sound.end, rows.end)
    if not mamba:
        places["LOG_MEL"] = mel_end
        return places, mel_end + config.n_mels * row + slack
    shape = module.model.layers[0].mixer
    grid, d, inner = module.model.config.grid, shape.d_model, shape.d_inner
    layer = Places(rest)
    layer.add("BEFORE", d * grid[1])
    layer.add("INNER", inner * grid[1])
    layer.add("SCANNED", inner * grid[1])
    layer.add("PROJECTED", (shape.dt_rank + 2 * shape.d_state) * grid[1])
    layer.add("DELTA", 4 * grid[1])
    layer.add("INPUTS", 4 * grid[1])
    layer.add("DECAY", 4 * shape.d_state * grid[1])
    places |= layer.of
    tokens = places["TOKENS"] = max(rows.end, layer.end + slack)
    size = d * grid[1]
    ends = [tokens + (m + 1) * size - row * read_before(stages, m * stages[-1].stride[0]) for m in range(grid[0])]
    places["LOG_MEL"] = max(mel_end, *ends)
    return places, max(places["LOG_MEL"] + config.n_mels * row, tokens + grid[0] * size) + slack


def longest_sum(module: SceneClassifier, stages: list[Stage]) -> int:
    """Return how many rows `product` sums at most."""
    sums = [9 * g.c_in if g.kind == "CONVOLUTION" else max(g.c_in, g.wide) for g in stages]
    if stages[-1].kind == "PATCHES":
        shape = module.model.layers[0].mixer
        sums += [shape.d_model, shape.d_inner]
    return max(sums)


def read_before(stages: list[Stage], row: int) -> int:
    """Return the mel bins that have been read when the last stage is given ``row``."""
    needed = row + 1
    for g in reversed(stages[:-1]):
        needed = min((needed - 1) * g.stride[0] + 2, g.rows)
    return needed


# ---- tables of the front end ----


def resampling(logmel: LogMel) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return constants and tables: ``kernels`` of half the phases, (UP // 2 + 1, TAPS), and what their mirror images
    lack to be the kernels of the others, in multiples of LACKING_UNIT.

    They lack up to 1e-5, since torchaudio's phases are float32, and the log of a quiet mel bin shows it.
    """
    common = math.gcd(logmel.orig_sample_rate, logmel.config.sample_rate)
    down, up = logmel.orig_sample_rate // common, logmel.config.sample_rate // common
    if up == down:
        return {"UP": 1, "DOWN": 1, "TAPS": 1, "LAST_TAP": 0}, {}
    kernel = logmel.resample.kernel.squeeze(1)
    kernel = kernel.masked_fill(kernel.abs() < 1e-20, 0)  # cos(pi / 2) squared, which is not quite 0
    before = (kernel.shape[1] - down) // 2
    starts = torch.arange(up) * down // up + before
    phase, tap = (kernel != 0).nonzero().T
    last = int((tap - starts[phase]).max())
    last = max(last, 1 - int((tap - starts[phase]).min()))
    taps = 2 * last
    index = starts[:, None] + torch.arange(1 - last, last + 1)
    there = (index >= 0) & (index < kernel.shape[1])
    chosen = torch.where(there, kernel.gather(1, index.clamp(0, kernel.shape[1] - 1)), 0)
    half = up // 2 + 1
    lacking = torch.zeros(half, taps)
    lacking[1 : up - half + 1] = chosen[half:].flip(0, 1) - chosen[1 : up - half + 1]
    unit = lacking.abs().max().clamp_min(1e-30) / 127
    constants = {"UP": up, "DOWN": down, "TAPS": taps, "LAST_TAP": last, "LACKING_UNIT": _float(unit)}
    return constants, {"kernels": chosen[:half], "lacking": (lacking / unit).round().to(torch.int8)}


def mel_table(logmel: LogMel) -> tuple[Tensor, Tensor]:
    """Return (starts (n_mels + 2,), shares (FFT bins,)) of the triangular mel filters: between the centres of two
    neighbours, each FFT bin gives its share to the upper mel bin and the rest to the lower one.

    FFT bins starts[m] ... starts[m + 1] - 1 lie below the centre of mel bin m, as far as that of m - 1.
    """
    config, filters = logmel.config, logmel.filters.double()
    highest = config.sample_rate / 2 if config.f_max is None else config.f_max
    ends = torch.tensor([2595 * math.log10(1 + hz / 700) for hz in (config.f_min, highest)])
    points = 700 * (10 ** (torch.linspace(*ends.tolist(), config.n_mels + 2) / 2595) - 1)  # as torchaudio, in float32
    hz = torch.linspace(0, config.sample_rate // 2, config.n_fft // 2 + 1)
    starts = torch.searchsorted(points, hz, right=True)  # of points up to each bin
    starts = torch.searchsorted(starts, torch.arange(1, config.n_mels + 3))
    shares, rebuilt = torch.zeros(len(hz)), torch.zeros_like(filters)
    for m in range(config.n_mels + 1):
        bins = slice(starts[m], starts[m + 1])
        shares[bins] = (filters[bins, m] if m < config.n_mels else 1 - filters[bins, m - 1]).float()
        if m < config.n_mels:
            rebuilt[bins, m] = shares[bins].double()
        if m > 0:
            rebuilt[bins, m - 1] = 1 - shares[bins].double()
    if (rebuilt - filters).abs().max() > EXACT:
        raise UserError("--format c cannot express these mel filters: their neighbours do not add up to 1")
    return starts, shares


# ---- weights.h ----


@dataclass
class Written:
    """Lines of weights.h, and the bytes of its arrays."""

    lines: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=lambda: {"tables": 0, "weights": 0, "affines": 0})

    def array(self, kind: str, name: str, values: Tensor) -> str:
        """Write a constant array and return its name, free of dots. float16 is written as its bits."""
        name = re.sub(r"\W", "_", name)
        values = values.contiguous().flatten()
        self.sizes[kind] += values.numel() * values.element_size()
        ctype = {torch.int8: "int8_t", torch.float16: "uint16_t", torch.float32: "float", torch.int16: "uint16_t"}
        declared = f"static const {ctype[values.dtype]} {name}[{max(1, len(values))}] = {{"
        if values.dtype == torch.float32:
            numbers = [f"{float(x).hex()}f" for x in values.tolist()]
        elif values.dtype == torch.int8:
            numbers = [str(x) for x in values.tolist()]
        else:
            numbers = [str(x & 0xFFFF) for x in values.view(torch.int16).tolist()]
        self.lines += [declared, *_wrapped(numbers or ["0"]), "};"]
        return name


def _wrapped(numbers: list[str]) -> list[str]:
    lines, line = [], "   "
    for number in numbers:
        if len(line) + len(number) > 118:
            lines, line = [*lines, line], "   "
        line += f" {number},"
    return [*lines, line]


class Weights:
    """The stored tensors of one model as arrays of weights.h."""

    def __init__(self, written: Written, prefix: str, state: dict[str, Tensor], bits: int):
        self.stored, self.state, self.written, self.prefix = encode(state, bits), state, written, prefix

    def vector(self, name: str) -> str:
        return self.written.array("weights", self.prefix + name, self.stored[name])

    def matrix(self, name: str, with_scale: bool = True, parts: int = 0, order: tuple[int, ...] | None = None) -> str:
        """``with_scale``: the codes' scale is not part of an affine. ``parts`` that `product` takes,
        in panels; 0: as it is. ``order`` of the axes, where it is another one."""
        value, scale = self.stored[name], self.stored.get(name + SCALE)
        values = value if order is None else value.permute(order).flatten(0, 1)
        array = self.written.array("weights", self.prefix + name, panels(values, parts) if parts else values)
        scale = "0" if scale is None or not with_scale else self.vector(name + SCALE)
        return f"{{{array}, {scale}, {int(value.dtype == torch.int8)}}}"

    def affine(self, norm: str, eps: float, of: str | None = None) -> str:
        """Return BatchNorm as a scale and a shift of each channel, with the scale of the codes that precede it."""
        weight, bias, mean, var = (
            self.stored[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (var + eps).sqrt()
        shift = bias - mean * scale
        if of is not None and of + SCALE in self.stored:
            scale = scale * self.stored[of + SCALE].double()
        return self.written.array("affines", f"{self.prefix}{norm}.affine", torch.stack([scale, shift], 1).float())


def panels(matrix: Tensor, parts: int) -> Tensor:
    """Return the rows of each part in fours, side by side: (parts, panels, n, 4), filled up with zeros."""
    rows = matrix.flatten(1).unflatten(0, (parts, -1))
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % 4)).unflatten(1, (-1, 4)).transpose(2, 3)


NOTHING = "{0, 0, 0}"


def write_model(written: Written, index: int, state: dict[str, Tensor], bits: int, module, stages: list[Stage]) -> str:
    """Write one model's arrays and tables; return its entry in the table of models."""
    w, model, prefix = Weights(written, f"m{index}_", state, bits), module.model, f"m{index}_"
    eps = {name: layer.eps for name, layer in model.named_modules() if hasattr(layer, "running_var")}
    rows = []
    for g in stages:
        matrices, affines = [NOTHING] * 3, ["0"] * 3
        for i, names in enumerate(g.names):
            if names and names[1]:
                matrices[i] = w.matrix(f"{names[0]}.weight", with_scale=False, parts=int(i != DEPTHWISE))
                affines[i] = w.affine(names[1], eps[names[1]], f"{names[0]}.weight")
            elif names:  # the patch embedding, by mel bins
                matrices[i] = w.matrix(f"{names[0]}.weight", parts=g.stride[0], order=(2, 0, 1, 3))
        values = [g.kind, g.c_in, g.wide, g.c_out, g.t_in, g.t_out, *g.stride, g.shortcut, g.inner, g.outer]
        rows.append("    {" + ", ".join(map(str, values)) + ",\n     " + ", ".join([*matrices, *affines]) + "},")
    if not isinstance(model, CPMobile):
        layers = []
        for i in range(model.config.depth):
            start = f"layers.{i}.mixer."
            branches = []
            for suffix, a_log in (("", "A_log"), ("_b", "A_b_log")):
                named = (("conv1d", 0), ("x_proj", 1), ("dt_proj", 0))
                parts = [w.matrix(f"{start}{name}{suffix}.weight", parts=n) for name, n in named]
                vectors = [w.vector(f"{start}{name}{suffix}.bias") for name in ("conv1d", "dt_proj")]
                branches.append(", ".join([*parts, w.matrix(start + a_log), *vectors, w.vector(f"{start}D{suffix}")]))
            parts = [w.matrix(f"local.{i}.weight"), w.matrix(f"{start}in_proj.weight", parts=2)]
            parts += [w.matrix(f"{start}out_proj.weight", parts=1)]
            parts += [w.vector(f"local.{i}.bias"), w.vector(f"layers.{i}.norm.weight")]
            layers.append(f"    {{{', '.join(parts)}, {{{{{branches[0]}}}, {{{branches[1]}}}}}}},")
        names = ("patch_embed.proj.bias", "pos_embed.pos_embed_mel", "pos_embed.pos_embed_time")
        rest = [*map(w.vector, names), w.affine("head.norm", eps["head.norm"])]
        head, norm = "head.linear.weight", "head.scores"
        written.lines += [f"static const layer {prefix}layers[] = {{", *layers, "};"]
        rest = [f"{prefix}layers", *rest]
    else:
        rest, head, norm = ["0"] * 5, "feed_forward.0.weight", "feed_forward.1"
    rest += [w.matrix(head, with_scale=False), w.affine(norm, eps[norm], head)]
    written.lines += [f"static const stage {prefix}stages[] = {{", *rows, "};"]
    return f"    {{{prefix}stages, {', '.join(rest)}}},"


def write(module: SceneClassifier, models: dict[str, dict[str, Tensor]], bits: int, samples: int, folder: Path) -> dict:
    """Write the sources of a module into ``folder``. ``models``: state dicts by name, the general one first.
    ``samples``: of a clip, at the recordings' rate. Return the values that README.md tells.

    Raises `UserError`, naming the field, for a model that the C code does not know.
    """
    refuse_unknown(module, bits)
    logmel, stages = module.logmel, stages_of(module)
    config, scenes = logmel.config, module.labels.scenes
    places, arena = plan(module, stages)
    factors, resampler = resampling(logmel)
    length = math.ceil(samples * config.sample_rate / logmel.orig_sample_rate)
    frames_of(config, samples, logmel.orig_sample_rate)  # refuses clips that are too short
    mamba = not isinstance(module.model, CPMobile)
    constants: dict[str, object] = {
        "N_FFT": config.n_fft,
        "FFT_BITS": int(math.log2(config.n_fft)) - 1,
        "WINDOW": config.window_length,
        "HOP": config.hop_length,
        "EDGE": config.n_fft // 2 - (config.n_fft - config.window_length) // 2,
        "LENGTH": length,
        "FRAMES": module.frames,
        "FRAMES_OF_CLIP": min(1 + length // config.hop_length, module.frames),
        "N_MELS": config.n_mels,
        "LOG_OFFSET": _float(LOG_OFFSET),
        "MEL_MEAN": _float(logmel.mean.item()),
        "MEL_DEVIATION": _float(logmel.std.item()),
        "SILENCE": _float(logmel.silence.item()),
        **factors,
        "FRAMES_AT_ONCE": AT_ONCE,
        "FREQ_NORM": _float(module.model.config.freq_norm if mamba else 0),
        "WIDEST": max(g.t_in for g in stages),
        "N_FEATURES": stages[-1].c_out,
        "N_PLACES": _float(stages[-1].rows * stages[-1].t_in),
        "N_LAYERS": 0,
    }
    if mamba:
        shape, mixer = module.model.config, module.model.layers[0].mixer
        constants |= {
            "N_LAYERS": shape.depth, "D_MODEL": shape.embed_dim, "D_INNER": mixer.d_inner, "D_STATE": shape.d_state,
            "D_CONV": shape.d_conv, "DT_RANK": mixer.dt_rank, "GRID_MEL": shape.grid[0], "GRID_TIME": shape.grid[1],
            "NORM_EPS": _float(shape.norm_eps), "N_PLACES": _float(math.prod(shape.grid)),
        }  # fmt: skip
    names = {"PANEL", "FEATURES", "ZEROS", "OUT", "BEFORE", "INNER", "SCANNED", "PROJECTED", "DELTA"}
    constants |= {
        name: at
        for name, at in places.items()
        if name in names | {"INPUTS", "DECAY", "SOUND", "SPECTRUM", "LOG_MEL", "TOKENS"}
    }
    written = Written([f"#define {name} {value}" for name, value in constants.items()])
    starts, shares = mel_table(logmel)
    turns = torch.arange(config.n_fft // 4 + 1, dtype=torch.float64) * (2 * math.pi / config.n_fft)
    tables = {
        "hann": logmel.window[: config.window_length // 2 + 1],
        "sines": turns.sin().float(),
        "mel_shares": shares,
        **resampler,
    }
    for name, values in tables.items():
        written.array("tables", name, values)
    written.array("tables", "mel_starts", starts.to(torch.int32).to(torch.int16))
    entries = [write_model(written, i, state, bits, module, stages) for i, state in enumerate(models.values())]
    written.lines += [f"static const model models[{len(models)}] = {{", *entries, "};"]
    for name, of in (("class", scenes), ("device", [*models])):
        texts = "".join(f"    {_quoted(text)},\n" for text in of)
        size = "SCENE_CLASSES" if name == "class" else "SCENE_DEVICES"
        written.lines.append(f"const char *const scene_{name}_names[{size}] = {{\n{texts}}};")
    first = "/* Made by `python -m dcase.export --format c`, for scene.c alone. */"
    (folder / "weights.h").write_text("\n".join([first, *written.lines, ""]))
    values = {
        "RATE": logmel.orig_sample_rate, "SAMPLES": samples, "CLASSES": len(scenes), "DEVICES": len(models),
        "ARENA": arena, "HISTORY": 2 * factors["TAPS"], "LONGEST": longest_sum(module, stages), "STAGES": len(stages),
        "MODEL": module.config.model.model, "SECONDS": f"{samples / logmel.orig_sample_rate:.2f}",
        "SCENES": ", ".join(scenes), "NAMES": ", ".join(models), "BITS": bits,
        "CONST_BYTES": f"{sum(written.sizes.values()):,}",
        **{f"{name.upper()[:-1]}_BYTES": f"{size:,}" for name, size in written.sizes.items()},
    }  # fmt: skip
    for name in ("scene.c", "main.c", "Makefile"):
        shutil.copyfile(SOURCES / name, folder / name)
    (folder / "scene.h").write_text(_filled((SOURCES / "scene.h").read_text(), values))
    return values


def _float(x: float) -> str:
    return f"{float(np.float32(x)).hex()}f"


def _quoted(text: str) -> str:
    escaped = "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode())
    return f'"{escaped}"'


def _filled(text: str, values: dict) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), text)


# ---- compiling and running ----


def compile_program(folder: Path, out: Path, flags: tuple[str, ...] = FLAGS) -> None:
    """Compile the sources of ``folder`` to the program ``out``. Raises `UserError` without a compiler that works."""
    try:
        compiler = find_compiler()
    except NotAvailable as error:
        raise UserError(f"--format c compiles and runs what it writes, to check it: {error}") from error
    sources = [str(folder / "main.c"), str(folder / "scene.c")]
    run_compiler([*compiler, *flags, "-o", str(out), *sources, "-lm"], "the C compiler fails")


def run_compiler(command: list[str], start: str) -> None:
    """Run a compiler. Raises `UserError`, which begins with ``start`` and tells its first error, where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{start}: {shlex.join(command)}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        line = next((line for line in said if "error" in line), said[-1])
        raise UserError(f"{start}: {shlex.join(command)}: {line}")


def run_program(program: Path, clips: Tensor, rate: int, device: str = GENERAL) -> Tensor:
    """Return the logits (b, n_classes) that the program prints for clips (b, samples), one after the other."""
    path = program.with_name("check_clips.wav")
    soundfile.write(path, clips.flatten().numpy(), rate, subtype="FLOAT")
    try:
        done = subprocess.run(
            [str(program), "--logits", "--device", device, str(path)],
            capture_output=True, text=True, timeout=TIMEOUT * (1 + len(clips) / 100),
        )  # fmt: skip
    finally:
        path.unlink()
    if done.returncode:
        raise UserError(f"the compiled program fails with exit code {done.returncode}: {done.stderr.strip()[:300]}")
    return torch.tensor([[float(x) for x in line.split()] for line in done.stdout.splitlines()])


def sizeof(program: Path) -> int:
    """Return the bytes of the struct that holds all memory."""
    done = subprocess.run([str(program), "--sizes"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return int(done.stdout.split()[1])


def test_clip(samples: int, rate: int) -> np.ndarray:
    """Return a clip to check a port with, int16: noise that grows, and tones. It is no recording."""
    t = np.arange(samples) / rate
    noise = np.random.default_rng(0).standard_normal(samples) * 0.05 * t / t[-1]
    tones = sum(0.1 * np.sin(2 * np.pi * share * rate / 2 * t) for share in (0.01, 0.03, 0.1, 0.3))
    return np.round(32767 * (noise + tones)).clip(-32768, 32767).astype(np.int16)


def write_readme(folder: Path, values: dict) -> None:
    (folder / "README.md").write_text(_filled((SOURCES / "README.md").read_text(), values))


def write_test_vectors(folder: Path, clip: np.ndarray, rate: int, logits: dict[str, Tensor]) -> None:
    """Write a clip and the trained models' logits of it, a line for each."""
    with wave.open(str(folder / "test_clip.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(clip.astype("<i2").tobytes())
    lines = [" ".join([name, *(f"{x:.9g}" for x in row.tolist())]) for name, row in logits.items()]
    (folder / "test_logits.txt").write_text("\n".join(lines) + "\n")
