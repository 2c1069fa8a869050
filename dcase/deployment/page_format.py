"""Write a model as one HTML file that recognises scenes: the C of `c_format` as WebAssembly, and a page around it.

The page's HTML, style and scripts are in the folder ``page`` beside this file; colours and tables have the style of the
report. Before it takes any sound, a page compares its own logits of `check_clip` with the trained model's.
"""

import base64
import gzip
import shutil
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dcase.deployment import c_format
from dcase.errors import UserError
from dcase.report import render
from dcase.training.lit import SceneClassifier

SOURCES = Path(__file__).with_name("page")
STYLES = Path(render.__file__).with_name("templates")
FLAGS = (
    "--target=wasm32", "-std=c99", "-ffreestanding", "-nostdlib", "-O3", "-msimd128", "-mbulk-memory",
    "-Wl,--no-entry", "-Wl,--strip-all",
)  # fmt: skip
AVERAGE = 10  # seconds of the running average, as dcase.predict's
KEPT = 300  # seconds whose sound and log-mel a page keeps
INSTALL = "--format page compiles to WebAssembly with clang and lld: apt install clang lld"


def check_clip(samples: int) -> np.ndarray:
    """Return the clip (samples,), float32, that page/worker.js makes too: noise that grows."""
    state, noise = 1, np.empty(samples)
    for i in range(samples):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        noise[i] = (state >> 15) - 32768
    return (noise * np.arange(samples) / (32768 * samples)).astype(np.float32)


def refuse_no_compiler() -> None:
    """Raise `UserError` where clang, or the linker that it calls for WebAssembly, is not there."""
    if missing := [name for name in ("clang", "wasm-ld") if not shutil.which(name)]:
        raise UserError(f"{INSTALL} ({' and '.join(missing)} not on PATH)")


def webassembly(folder: Path) -> bytes:
    """Return the C sources of ``folder``, compiled. Raises `UserError` where that fails."""
    refuse_no_compiler()
    out = folder / "page.wasm"
    include = ["-I", str(folder), "-isystem", str(SOURCES / "include")]
    command = ["clang", *FLAGS, *include, "-o", str(out), str(SOURCES / "page.c")]
    c_format.run_compiler(command, f"{INSTALL}; this clang fails")
    return out.read_bytes()


def packed(code: bytes) -> str:
    """Return the code as text: every fourth byte, from the first, second, third and fourth one on, and then compressed.
    Bytes of equal places in weights are alike, so this saves a sixth. page/live.js is the inverse."""
    code += bytes(-len(code) % 4)
    return base64.b64encode(gzip.compress(b"".join(code[i::4] for i in range(4)), mtime=0)).decode()


def page(module: SceneClassifier, code: bytes, expected: dict[str, Tensor], samples: int, facts: dict) -> str:
    """Return the HTML. ``code``: WebAssembly. ``expected``: logits of `check_clip` by model, the general one first.
    ``facts``: what the footer tells; see page/index.html."""
    logmel, rate = module.logmel.config, module.logmel.orig_sample_rate
    step = min(rate, samples)  # from window to window, as dcase.predict has it
    length = -(-samples * logmel.sample_rate // rate)
    highest = logmel.sample_rate / 2 if logmel.f_max is None else logmel.f_max
    model = {
        "name": module.config.model.model,
        "scenes": module.labels.scenes,
        "devices": [*expected],
        "expected": [logits.tolist() for logits in expected.values()],
        "bytes": len(code),
        "rate": rate,
        "samples": samples,
        "step": step,
        "unit": "second" if step == rate else "window",
        "n_mels": logmel.n_mels,
        "frames": min(1 + length // logmel.hop_length, module.frames),
        "average": AVERAGE,
        "kept": KEPT,
        "tolerance": facts["tolerance"],
    }
    environment = Environment(
        loader=FileSystemLoader([SOURCES, STYLES]), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("index.html").render(
        model=model,
        wasm=packed(code),
        unit=model["unit"],
        kept=KEPT,
        highest=f"{highest / 1000:g}",
        lowest=f"{logmel.f_min / 1000:g}",
        **facts,
    )
