"""Export a trained model: waveform or log-mel in, logits out, for any number of clips in a batch.

    python -m dcase.export --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --dataset_dir /data/TAU22
    python -m dcase.export --ckpt_path DCASE25_Task1/RUN_ID/stored --device_id a --input log_mel --format torch_export
    python -m dcase.export --ckpt_path DCASE25_Task1/RUN_ID/stored --format c --out scene_in_c
    python -m dcase.export --ckpt_path DCASE25_Task1/RUN_ID/stored --format page --out scenes.html

Before it is kept, the exported model is compared with PyTorch on clips of the test split: where a logit differs by more
than 0.0001, or a scene changes, nothing is written and the exit code is 1.
"""

import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from dcase import cli, errors
from dcase.data.dataset import TAU22
from dcase.data.loading import find_source, open_sound, with_sound
from dcase.data.synth import new_folder
from dcase.data.tau22 import DataConfig
from dcase.deployment import c_format, onnx_format, page_format
from dcase.deployment.exported import Exported, FrontEnd
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.model.quantisation import decode, encode
from dcase.progress import progress
from dcase.runs.config import find_dataset_dir
from dcase.runs.folder import run_of
from dcase.runs.stored import GENERAL, load_stored, save_one
from dcase.runs.trained import load_trained
from dcase.training.lit import SceneClassifier

TOLERANCE = 1e-4  # of a logit
BATCHES = (1, 8)  # clips in the batches that are compared
WAVEFORM, LOG_MEL = "waveform", "log_mel"
ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "torch_export": ".pt2", "c": "_c", "page": ".html"}
OF_C = ("c", "page")  # the formats that are made of C

Model = Callable[[Tensor], Tensor]  # waveform (b, samples) or log-mel (b, 1, n_mels, frames) -> logits (b, n_classes)


@dataclass(frozen=True)
class ExportConfig:
    ckpt_path: str = ""
    """Checkpoint of either stage, stored model or published folder, as test_only.py takes it."""
    format: Literal["onnx", "safetensors", "torch_export", "c", "page"] = "onnx"
    """onnx: for ONNX Runtime. torch_export: a .pt2 file that torch of the same version loads. safetensors: only the
    weights, as train_base.py writes them to stored/; python -m dcase.export and test_only.py read them. c: a folder
    that any C99 compiler takes, with all models of the checkpoint, of aum_nano, aum_nano_8bit or cp_mobile. page: the
    same C as WebAssembly in one HTML file, for a microphone or a sound file in a browser; needs clang and lld."""
    input: Literal["waveform", "log_mel"] = "waveform"
    """Input of the exported model: waveform (b, samples) at the recordings' rate, as long as the data's clips; or
    log_mel, normalised, (b, 1, n_mels, frames)."""
    device_id: str = GENERAL
    """Model to export: general, or a device that has its own model."""
    weight_bits: Literal[32, 16, 8] | None = None
    """Bits of the weights in the file; None: as the run stores and counts them (--weight_bits of the training)."""
    out: str = ""
    """File to write, for c a new folder; "": in export/ of the run's folder, named after --device_id."""
    dataset_dir: str | None = None
    """Data folder with the test clips, WAV files, to compare on; None: TAU22_DIR, else the folder that the checkpoint's
    run was given, else SynthTAU."""
    check_clips: int = 64
    """Number of clips to compare on, evenly spread over the test split."""

    def __post_init__(self):
        if not self.ckpt_path:
            raise UserError("--ckpt_path is missing: give a checkpoint, or the folder stored/ of a run")
        if self.check_clips < 1:
            raise UserError(f"--check_clips is at least 1; got {self.check_clips}")
        if self.format in OF_C and (self.input != WAVEFORM or self.device_id != GENERAL):
            raise UserError(
                f"--format {self.format} takes waveforms, and writes all models together: leave out --input and "
                "--device_id"
            )


class Mismatch(Exception):
    """The exported model calculates something else than PyTorch."""


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with PyTorch."""

    clips: int  # each of them once in every size of `BATCHES`
    difference: float  # the largest of a logit
    changed: int  # clips with another scene, where PyTorch's own logits tell the two scenes apart
    milliseconds: float = 0.0  # for one clip in a batch of one: the median; not measured for C
    runs: int = len(BATCHES)  # of each clip
    sizes: tuple[str, str] = ("", "")  # bytes of a C program's constants and memory

    def check(self) -> None:
        """Raise `Mismatch`, with figures, where the two differ."""
        if self.changed or not self.difference <= TOLERANCE:  # NaN is refused too
            raise Mismatch(
                f"logits differ from PyTorch's by up to {self.difference:.2g} on {self.clips} clips "
                f"({TOLERANCE:g} is allowed), and {self.changed} of {self.runs * self.clips} predictions are other "
                "scenes"
            )


def main() -> None:
    config = cli.parse(ExportConfig, __doc__)
    checkpoint = load_trained(config.ckpt_path)
    module = SceneClassifier.from_checkpoint(checkpoint).eval()
    if module.config.logmel.batch_lengths and config.format != "safetensors":
        raise UserError(
            f"--ckpt_path {config.ckpt_path}: it was trained with --batch_lengths, and an exported model takes one "
            "length only, so that it would read padding as sound: train without --batch_lengths, or give --format "
            "safetensors"
        )
    source = find_source(DataConfig(dataset_dir=find_dataset_dir(config.dataset_dir, checkpoint, config.ckpt_path)))
    data = replace(module.config.data, read_from="wav")
    _, sound = open_sound(replace(module.config, data=data), source.folder)
    test = with_sound(source.test, sound)
    module.refuse_other_frames(test)
    out = Path(config.out or default_path(config))
    try:
        if config.format in OF_C:
            bits = config.weight_bits or module.config.storage.weight_bits
            c_format.refuse_unknown(module, bits)
            if config.format == "page":
                page_format.refuse_no_compiler()
            clips = clips_of(test, samples_of(test), config.check_clips)
            if config.format == "c":
                parity = export_c(module, bits, clips, out)
            else:
                run = run_of(config.ckpt_path)
                parity = export_page(module, bits, clips, out, f"run {run.id}" if run else Path(config.ckpt_path).name)
        else:
            parity = export(module, config, test, out)
    except Mismatch as error:
        print(f"\nerror: {error}; nothing was written", file=sys.stderr)
        sys.exit(1)
    in_c = config.format in OF_C
    size = "{} B of constants; RAM {} B, sizeof(scene)".format(*parity.sizes) if in_c else ""
    if config.format != "c":
        size = "; ".join(filter(None, [f"{out.stat().st_size:,} B", size]))
    batches = "" if in_c else " in batches of 1 and 8"
    rows = {
        "File": out,
        "Size": size,
        "Input": input_of(module, config.input, samples_of(test)),
        "Largest Difference": f"{parity.difference:.1e} of a logit, on {parity.clips} clips{batches}",
        "Other Predictions": parity.changed,
    }
    if not in_c:
        rows["One Clip"] = f"{parity.milliseconds:.1f} ms"
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")


def choose(module: SceneClassifier, device_id: str, weight_bits: int | None) -> int:
    """Put a device's model in the general one's place, with weights rounded as they are stored; return the bits.

    Raises `UserError` where the device has no model of its own, or the weights cannot be stored at these bits.
    """
    if device_id != GENERAL:
        if device_id not in module.device_models:
            there = ", ".join([GENERAL, *module.device_models])
            known = device_id in module.labels.devices
            instead = "; the general model serves that device: leave --device_id out" if known else ""
            raise UserError(
                f"--device_id {device_id}: there is no model of that name in the checkpoint, only {there}{instead}"
            )
        module.model = module.device_models[device_id]
    bits = weight_bits or module.config.storage.weight_bits
    state = module.model.state_dict()
    module.model.load_state_dict(state | decode(encode(state, bits)))
    return bits


def default_path(config: ExportConfig) -> Path:
    """Return <run>/export/<device>.<ending>; for a model that lies in no run's folder, export/ beside or in it."""
    path, run = Path(config.ckpt_path.split(",")[0]), run_of(config.ckpt_path)
    folder = run.export if run else (path if path.is_dir() else path.parent) / "export"
    return folder / f"{path.stem if path.suffix == '.safetensors' else config.device_id}{ENDINGS[config.format]}"


def export(module: SceneClassifier, config: ExportConfig, test: TAU22, out: Path) -> Parity:
    """Write ``out`` after the comparison. Raises `Mismatch`, and keeps an existing file, where logits differ.

    Raises `UserError` as `choose`, and where ``out`` cannot be written.
    """
    checkpoint = module.as_checkpoint()
    bits = choose(module, config.device_id, config.weight_bits)
    samples = samples_of(test)
    parity = None

    def write(beside: Path) -> None:
        nonlocal parity
        if config.format == "safetensors":
            save_one(checkpoint, config.device_id, beside, bits)
        else:
            beside.write_bytes(traced(module, config, bits, samples))
        clips = clips_of(test, samples, config.check_clips)
        parity = compare(reader(config, beside), module, config.input, clips)
        parity.check()

    replace_file(out, write)
    return parity


def export_c(module: SceneClassifier, bits: int, clips: Tensor, out: Path) -> Parity:
    """Write the folder ``out`` after the comparison of each model on clips (n, samples), and on one that the folder
    will contain. Raises as `export`; an existing folder that is not empty is refused."""
    rate = module.logmel.orig_sample_rate
    clip = c_format.test_clip(clips.shape[1], rate)
    with new_folder(out, "C sources", "--out") as folder:
        folder.mkdir(parents=True)
        parity, values, logits = write_c(module, bits, clips, torch.from_numpy(clip).float() / 32768, folder)
        c_format.write_test_vectors(folder, clip, rate, logits)
        c_format.write_readme(folder, values)
    return parity


def export_page(module: SceneClassifier, bits: int, clips: Tensor, out: Path, origin: str) -> Parity:
    """Write the page ``out`` after the comparison of its C, as `export_c`. The page compares what a browser makes of it
    with these logits when it is opened. ``origin``: where the model comes from, in words."""
    samples = clips.shape[1]
    clip = torch.from_numpy(page_format.check_clip(samples))
    with TemporaryDirectory(prefix="dcase-export-") as place:
        parity, values, logits = write_c(module, bits, clips, clip, Path(place))
        facts = {
            "origin": origin, "bits": bits, "constants": values["CONST_BYTES"], "ram": values["SIZEOF"],
            "difference": values["DIFFERENCE"], "clips": values["CLIPS"], "tolerance": TOLERANCE,
        }  # fmt: skip
        html = page_format.page(module, page_format.webassembly(Path(place)), logits, samples, facts)
    replace_file(out, lambda beside: beside.write_text(html, encoding="utf-8"))
    return parity


def write_c(
    module: SceneClassifier, bits: int, clips: Tensor, clip: Tensor, folder: Path
) -> tuple[Parity, dict, dict[str, Tensor]]:
    """Write C sources into ``folder``, compile them elsewhere, and compare each model on clips (n, samples) and clip
    (samples,). Return the parity, the values that README.md tells, and PyTorch's logits of ``clip`` by model.

    Raises `Mismatch` where logits differ.
    """
    rate, general, samples = module.logmel.orig_sample_rate, module.model, clips.shape[1]
    models = {GENERAL: general, **module.device_models}
    for model in models.values():
        model.load_state_dict(model.state_dict() | decode(encode(model.state_dict(), bits)))
    states = {name: model.state_dict() for name, model in models.items()}
    values = c_format.write(module, states, bits, samples, folder)
    clips = torch.cat([clips, clip[None]])
    of_clip, found = {}, []
    with TemporaryDirectory(prefix="dcase-export-") as place:
        program = Path(place) / c_format.PROGRAM
        c_format.compile_program(folder, program)
        for name, module.model in progress(models.items(), desc="comparing", unit="model", leave=False):
            with torch.no_grad():
                expected = torch.cat([reference(module, WAVEFORM)(x) for x in clips.split(max(BATCHES))])
            found.append(differences(c_format.run_program(program, clips, rate, name), expected))
            of_clip[name] = expected[-1]
        ram = f"{c_format.sizeof(program):,}"
    module.model = general
    parity = Parity(len(clips), *total(found), runs=len(models), sizes=(values["CONST_BYTES"], ram))
    parity.check()
    measured = {"SIZEOF": ram, "CLIPS": len(clips), "DIFFERENCE": f"{parity.difference:.1e}"}
    return parity, values | measured, of_clip


def differences(logits: Tensor, expected: Tensor) -> tuple[float, int]:
    """Return the largest difference of a logit, NaN where one is, and how many clips have another scene where the
    expected logits tell the two apart. Raises `Mismatch` where shapes differ."""
    if logits.shape != expected.shape:
        raise Mismatch(f"logits have shape {tuple(logits.shape)}, PyTorch's {tuple(expected.shape)}")
    first, second = expected.topk(2).values.T
    changed = (first - second > TOLERANCE) & (logits.argmax(1) != expected.argmax(1))
    return (logits - expected).abs().max().item(), int(changed.sum())


def samples_of(test: TAU22) -> int:
    """Return the samples that the model reads of a clip, at the recordings' rate."""
    return test.sound.max_samples or test.n_samples


def traced(module: SceneClassifier, config: ExportConfig, bits: int, samples: int) -> bytes:
    """Return the file's content, for the formats that hold the calculation too."""
    is_onnx, of_waveform = config.format == "onnx", config.input == WAVEFORM
    logmel = module.logmel.config
    exported = Exported(module.model, bits, FrontEnd(module.logmel, samples, in_graph=is_onnx) if of_waveform else None)
    example = torch.randn(2, samples) if of_waveform else torch.randn(2, 1, logmel.n_mels, module.frames)
    with torch.no_grad(), onnx_format.quiet():
        program = torch.export.export(exported, (example,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    values = {
        "scenes": module.labels.scenes,
        "input": config.input,
        "device_id": config.device_id,
        "weight_bits": bits,
        "orig_sample_rate": module.logmel.orig_sample_rate,
        "samples": samples,
        "frames": module.frames,
        "mean": module.logmel.mean.item(),
        "std": module.logmel.std.item(),
        "logmel": vars(logmel),
    }
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    if is_onnx:
        return onnx_format.to_onnx(program, config.input, metadata)
    file = io.BytesIO()
    with onnx_format.quiet():
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def reader(config: ExportConfig, path: Path) -> Model:
    """Return the function of an exported file, loaded as its users will load it."""
    if config.format == "onnx":
        return onnx_format.runner(path)
    if config.format == "torch_export":
        with open(path, "rb") as file, onnx_format.quiet():
            return torch.export.load(file).module()
    return reference(SceneClassifier.from_checkpoint(load_stored(path)).eval(), config.input)


def reference(module: SceneClassifier, kind: str) -> Model:
    """Return PyTorch's own function of the general model, for one kind of input."""
    return lambda x: module.model(log_mels(module, x) if kind == WAVEFORM else x)


def log_mels(module: SceneClassifier, waveform: Tensor) -> Tensor:
    """Return log-mels (b, 1, n_mels, frames) of a waveform (b, samples)."""
    length = torch.full((len(waveform),), waveform.shape[1])
    return module.logmel(*module.logmel.resampled(waveform.unsqueeze(1), length))


def clips_of(test: TAU22, samples: int, n: int) -> Tensor:
    """Return clips (n, samples), evenly spread over a data set, cut or padded to one length."""
    chosen = torch.linspace(0, len(test) - 1, min(n, len(test))).round().long().tolist()
    read = (test[i].waveform for i in progress(chosen, desc="reading", unit="clip", leave=False))
    return torch.cat([F.pad(x[:, :samples], (0, max(0, samples - x.shape[1]))) for x in read])


@torch.no_grad()
def compare(model: Model, module: SceneClassifier, kind: str, clips: Tensor) -> Parity:
    """Run both on clips (n, samples), in batches of `BATCHES`. Raises `Mismatch` where shapes differ."""
    of_module = reference(module, kind)
    found, seconds = [], []
    batches = [batch for size in BATCHES for batch in clips.split(size)]
    for x in progress(batches, desc="comparing", unit="batch", leave=False):
        x = x if kind == WAVEFORM else log_mels(module, x)
        expected = of_module(x)
        began = time.perf_counter()
        logits = model(x)
        if len(x) == 1:
            seconds.append(time.perf_counter() - began)
        found.append(differences(logits, expected))
    return Parity(len(clips), *total(found), 1000 * statistics.median(seconds))


def total(found: list[tuple[float, int]]) -> tuple[float, int]:
    """Return the largest of `differences`, where NaN counts as larger than any, and the number of other scenes."""
    largest, changed = zip(*found, strict=True)
    return max(largest, key=lambda x: math.inf if math.isnan(x) else x), sum(changed)


def input_of(module: SceneClassifier, kind: str, samples: int) -> str:
    """Return the name, shape and content of an exported model's input, which has a fixed length."""
    if kind == LOG_MEL:
        return f"log_mel (b, 1, {module.logmel.config.n_mels}, {module.frames}), normalised"
    rate = module.logmel.orig_sample_rate
    return f"waveform (b, {samples}): exactly {samples / rate:.2f} s of one channel at {rate:,} Hz"


if __name__ == "__main__":
    errors.run(main)
