"""Exported models against PyTorch: the same logits, and how long a clip takes from waveform to scene.

    python benchmarks/export.py
    python benchmarks/export.py --models aum_nano --repeats 200 --append      # adds the table to benchmarks/RESULTS.md

Each model is made anew, with BatchNorm statistics of the clips and logits of deviation 1; --checkpoints takes trained
ones. It is exported with `python -m dcase.export`'s own functions, and compared on test clips in batches of 1 and 8.
Then both take one clip in turn, with one thread each.
"""

import argparse
import datetime
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import CPU, WALL, median, progress, race, ratios, spread
from dcase.data.dataset import Sound
from dcase.data.loading import find_source, with_sound
from dcase.data.logmel import frames_of
from dcase.data.tau22 import DataConfig
from dcase.deployment import onnx_format
from dcase.errors import run
from dcase.export import WAVEFORM, ExportConfig, choose, clips_of, compare, log_mels, reference, traced
from dcase.model.named import ModelConfig
from dcase.runs.config import StorageConfig, TrainConfig
from dcase.runs.stored import GENERAL
from dcase.runs.trained import load_trained
from dcase.training.lit import SceneClassifier

BITS = {"aum_nano": 16, "aum_nano_8bit": 8, "cp_mobile": 16, "aum_tiny": 32, "aum_small": 32, "aum_base": 32}
CALIBRATION = 64  # clips
LOGITS = 1.0  # deviation of the logits over clips and scenes
RESULTS = Path(__file__).parent / "RESULTS.md"


def make(name: str, clips: Tensor) -> SceneClassifier:
    """A new model, with normalisation and BatchNorm statistics of clips (n, samples)."""
    torch.manual_seed(0)
    config = TrainConfig(model=ModelConfig(model=name), storage=StorageConfig(weight_bits=BITS[name]))
    module = SceneClassifier(config, frames_of(config.logmel, clips.shape[1], config.data.orig_sample_rate)).eval()
    length = torch.full((len(clips),), clips.shape[1])
    module.logmel.fit([module.logmel.resampled(clips.unsqueeze(1), length)])
    layers = [*module.model.modules()]
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the plain mean
            layer.train()
    with torch.no_grad():
        x = log_mels(module, clips)
        for part in x.split(8):
            module.model(part)
        module.eval()
        last = [layer for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)][-1]
        last.weight.mul_(LOGITS / torch.cat([module.model(part) for part in x.split(8)]).std())
    return module


def measured(name: str, module: SceneClassifier, clips: Tensor, folder: Path, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    progress(f"{name}: export")
    config = ExportConfig(ckpt_path="-")
    bits = choose(module, GENERAL, None)
    path = folder / f"{name}.onnx"
    path.write_bytes(traced(module, config, bits, clips.shape[1]))
    model, of_torch = onnx_format.runner(path), reference(module, WAVEFORM)
    progress(f"{name}: parity on {len(clips)} clips")
    parity = compare(model, module, WAVEFORM, clips)
    one = clips[:1].contiguous()
    onnx_session, name_of_input = onnx_format.session(path), WAVEFORM
    array = one.numpy()
    calls = {
        "onnx": lambda: onnx_session.run(None, {name_of_input: array}),
        "torch": lambda: of_torch(one),
    }
    with torch.inference_mode():
        samples = race(calls, args)
    wall = {key: 1000 * median(values, WALL) for key, values in samples.items()}
    of_wall, of_cpu = (spread(ratios(samples["onnx"], samples["torch"], which)) for which in (WALL, CPU))
    size = f"{path.stat().st_size:,} B"
    times = [f"{wall[key]:.2f}" for key in ("onnx", "torch")]
    return [name, f"{bits} bit", size, f"{parity.difference:.1e}", str(parity.changed), *times, of_wall, of_cpu]


def table(rows: list[list[str]], args: argparse.Namespace, clips: Tensor, source: str) -> str:
    header = [
        "model", "weights", "file", "largest difference of a logit", "other scenes", "ONNX Runtime, ms", "PyTorch, ms",
        "ratio, wall", "ratio, CPU time",
    ]  # fmt: skip
    lines = [header, ["---", "---", "---:", "---:", "---:", "---:", "---:", "---:", "---:"], *rows]
    now = datetime.datetime.now(datetime.UTC)
    import onnxruntime

    return "\n".join(
        [
            f"## Export: {now:%Y-%m-%d %H:%M} UTC, {platform.processor() or platform.machine()}",
            "",
            f"{len(clips)} test clips of {source}, batches of 1 and 8; one clip of {clips.shape[1]} samples, "
            f"one thread each, medians of {args.repeats} repetitions in turn, ratios with quartiles. onnxruntime "
            f"{onnxruntime.__version__}, torch {torch.__version__}.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BITS), help="named sizes, with commas between them")
    parser.add_argument("--checkpoints", help="trained models in their place: files, with commas between them")
    parser.add_argument("--dataset_dir", help="data folder; without it TAU22_DIR, else SynthTAU")
    parser.add_argument("--clips", type=int, default=1000, help="test clips for the comparison")
    parser.add_argument("--repeats", type=int, default=100, help="repetitions of the timing")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each contender's timing")
    parser.add_argument("--append", action="store_true", help="add the table to benchmarks/RESULTS.md")
    args = parser.parse_args()
    args.device, args.limit = "cpu", 30.0
    names = args.models.split(",")
    if unknown := [name for name in names if name not in BITS]:
        parser.error(f"--models: there is {', '.join(BITS)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    config = DataConfig(dataset_dir=args.dataset_dir)
    source = find_source(replace(config, read_from="wav"))
    test = with_sound(source.test, Sound(config.orig_sample_rate))
    clips = clips_of(test, test.n_samples, args.clips)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in names if not args.checkpoints else ():
            module = make(name, clips[:: max(1, len(clips) // CALIBRATION)])
            rows.append(measured(name, module, clips, Path(folder), args))
        for path in args.checkpoints.split(",") if args.checkpoints else ():
            module = SceneClassifier.from_checkpoint(load_trained(path)).eval()
            rows.append(measured(f"{module.config.model.model}, trained", module, clips, Path(folder), args))
    shown = table(rows, args, clips, source.name)
    print(shown)
    if args.append:
        with open(RESULTS, "a") as file:
            file.write("\n" + shown)


if __name__ == "__main__":
    run(main)
