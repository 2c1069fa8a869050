"""Compare exported models with PyTorch: the logits, and the time from a clip's waveform to its scene.

    python benchmarks/export.py
    python benchmarks/export.py --models aum_nano --repeats 200 --append      # adds the table to benchmarks/RESULTS.md

Each model is made anew, with BatchNorm statistics of the clips and logits of deviation 1; --checkpoints takes trained
ones instead. It is exported with the functions of `python -m dcase.export`, and compared on test clips in batches of 1
and 8. Then all run one clip in turn, with one thread each; where `--format c` knows the model, the C too, by -O3.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aum.scan.build import find_compiler
from benchmarks.timing import CPU, WALL, machine, milliseconds, progress, publish, race, ratio, table
from dcase import cli
from dcase.data.dataset import Sound
from dcase.data.loading import find_source, with_sound
from dcase.data.logmel import frames_of
from dcase.data.tau22 import RATE, DataConfig
from dcase.deployment import c_format, onnx_format
from dcase.errors import UserError, run
from dcase.export import WAVEFORM, ExportConfig, choose, clips_of, compare, log_mels, reference, traced
from dcase.model.named import ModelConfig
from dcase.runs.config import StorageConfig, TrainConfig
from dcase.runs.stored import GENERAL
from dcase.runs.trained import load_trained
from dcase.training.lit import SceneClassifier

BITS = {"aum_nano": 16, "aum_nano_8bit": 8, "cp_mobile": 16, "aum_tiny": 32, "aum_small": 32, "aum_base": 32}
CALIBRATION = 64  # clips
HEADER = ["model", "weights", "file", "largest difference of a logit", "other scenes", "ONNX Runtime, ms",
          "PyTorch, ms", "ratio, wall", "ratio, CPU time", "C, ms", "C to ONNX Runtime, wall", "CPU time"]  # fmt: skip


@dataclass(frozen=True)
class ExportBenchmark:
    models: str = ",".join(BITS)
    """Named models, with commas between them."""
    checkpoints: str = ""
    """Trained models to use instead: files, with commas between them."""
    dataset_dir: str | None = None
    """Data folder; None: TAU22_DIR, else SynthTAU."""
    clips: int = 1000
    """Test clips to compare on."""
    repeats: int = 100
    """Repetitions of the timing."""
    append: bool = False
    """Append the table to benchmarks/RESULTS.md."""


def make(name: str, clips: Tensor) -> SceneClassifier:
    """Return a new model with normalisation and BatchNorm statistics of clips (n, samples)."""
    torch.manual_seed(0)
    config = TrainConfig(model=ModelConfig(model=name), storage=StorageConfig(weight_bits=BITS[name]))
    module = SceneClassifier(config, frames_of(config.logmel, clips.shape[1], RATE)).eval()
    length = torch.full((len(clips),), clips.shape[1])
    module.logmel.fit([module.logmel.resampled(clips.unsqueeze(1), length)])
    with torch.no_grad():
        batches = log_mels(module, clips).split(8)
        update_bn(batches, module.model)
        last = [x for x in module.model.modules() if isinstance(getattr(x, "weight", None), nn.Parameter)][-1]
        last.weight.div_(torch.cat([module.model(batch) for batch in batches]).std())
    return module


def in_c(module: SceneClassifier, bits: int, clip: np.ndarray, folder: Path) -> Callable[[], object]:
    """Return a call of the C code with a clip (samples,), compiled as a library into ``folder``."""
    c_format.write(module, {GENERAL: module.model.state_dict()}, bits, len(clip), folder)
    library, program = folder / "scene.so", folder / "scene"
    c_format.compile_program(folder, program)
    command = [*find_compiler(), *c_format.FLAGS, "-fPIC", "-shared", "-o", library, folder / "scene.c", "-lm"]
    subprocess.run(command, check=True)
    scene, state = ctypes.CDLL(str(library)), ctypes.create_string_buffer(c_format.sizeof(program))
    logits = (ctypes.c_float * len(module.labels.scenes))()
    samples = (ctypes.c_float * len(clip))(*clip)
    scene.scene_init(state)

    def call() -> None:
        scene.scene_push(state, samples, ctypes.c_size_t(len(clip)))
        if scene.scene_logits(state, logits) != 1:
            raise RuntimeError("the clip was not full")

    return call


def measured(name: str, module: SceneClassifier, clips: Tensor, path: Path, config: ExportBenchmark) -> list[str]:
    """Export the model to ``path`` and return a row of the table."""
    progress(f"{name}: export, parity on {len(clips)} clips, timing")
    bits = choose(module, GENERAL, None)
    path.write_bytes(traced(module, ExportConfig(ckpt_path="-"), bits, clips.shape[1]))
    parity = compare(onnx_format.runner(path), module, WAVEFORM, clips)
    one, session, torch_model = clips[:1].contiguous(), onnx_format.session(path), reference(module, WAVEFORM)
    inputs = {WAVEFORM: one.numpy()}
    with torch.inference_mode():
        calls = {"onnx": lambda: session.run(None, inputs), "torch": lambda: torch_model(one)}
        try:
            c_format.refuse_unknown(module, bits)
            calls["c"] = in_c(module, bits, one[0].numpy(), Path(tempfile.mkdtemp(dir=path.parent)))
        except UserError as error:
            progress(f"  not in C: {error}")
        samples = race(calls, config.repeats, limit=60)
    onnx, ours = samples["onnx"], samples["torch"]
    times = [milliseconds(onnx), milliseconds(ours), ratio(onnx, ours), ratio(onnx, ours, CPU)]
    if "c" in calls:
        times += [milliseconds(samples["c"]), *(ratio(samples["c"], onnx, which) for which in (WALL, CPU))]
    return [name, f"{bits} bit", f"{path.stat().st_size:,} B", f"{parity.difference:.1e}", str(parity.changed), *times]


def main() -> None:
    config = cli.parse(ExportBenchmark, __doc__)
    names = config.models.split(",") if not config.checkpoints else []
    if unknown := [name for name in names if name not in BITS]:
        raise UserError(f"--models: there is {', '.join(BITS)}; got {', '.join(unknown)}")
    head = machine()  # before anything else, for its load
    torch.set_num_threads(1)
    data = DataConfig(dataset_dir=config.dataset_dir, read_from="wav")
    source = find_source(data)
    test = with_sound(source.test, Sound(RATE))
    clips = clips_of(test, test.n_samples, config.clips)
    modules = ((name, make(name, clips[:: max(1, len(clips) // CALIBRATION)])) for name in names)
    if config.checkpoints:
        trained = (SceneClassifier.from_checkpoint(load_trained(x)).eval() for x in config.checkpoints.split(","))
        modules = ((f"{module.config.model.model}, trained", module) for module in trained)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(*named, clips, Path(folder) / "model.onnx", config) for named in modules]
    text = (
        f"{head}\n\n### Export\n\n{len(clips)} test clips of {source.name}, batches of 1 and 8; one clip of "
        f"{clips.shape[1]} samples, one thread each, medians of {config.repeats} repetitions in turn, ratios with "
        f"quartiles. onnxruntime {onnxruntime.__version__}.\n\n{table(HEADER, rows)}"
    )
    publish(text, config.append)


if __name__ == "__main__":
    run(main)
