"""The folder of a submission to DCASE2025 Task 1, and what is where in it.

    Doe_Uni/                                      of --label Doe_Uni
        pyproject.toml                            so that `pip install Doe_Uni/` works
        Doe_Uni_task1/                            the inference package
            Doe_Uni_task1_1.py                    one of at most four systems: a copy of challenge_api.py
            ckpts/Doe_Uni_task1_1.ckpt            its models, as `dcase.submission.inference.save` writes them
            models/aum/  models/dcase/            copies of the code that they need
            resources/dummy.wav  resources/test.csv      what the challenge's scripts ask for
        predictions/Doe_Uni_task1_1/output.csv    the system's output for the evaluation set
        Doe_Uni_task1_1.meta.yaml

The code in ``models/`` imports itself under the package's name, so an installed `aum` or another submission does not
disturb it.
"""

import ast
import math
import re
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile

from dcase.errors import UserError
from dcase.files import replace_file
from dcase.submission import challenge_api, inference

ROOT = Path(__file__).resolve().parents[2]
MAX_INDEX = 4  # systems that a team may submit
# What the package imports, and what the challenge's scripts import, which run in the same environment.
NEEDED = ("torch", "torchaudio", "numpy", "soundfile", "einops", "safetensors", "tqdm")
NEEDED_BY_SCRIPTS = ("torchinfo", "pandas", "scikit-learn")


class Submission:
    """A submission's folder and one of its systems: names and paths.

    Args:
        label: of the team, as Doe_Uni.
        index: number of the system.

    Raises `UserError` where the challenge does not allow label or index.
    """

    def __init__(self, folder: Path, label: str, index: int):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*_[A-Za-z0-9]+", label):
            raise UserError(
                f"--label {label!r} is the corresponding author's last name and the institute's abbreviation in plain "
                "letters and digits, as Doe_Uni: the challenge makes a Python package's name of it"
            )
        if not 1 <= index <= MAX_INDEX:
            raise UserError(f"--index {index} is the number of the system, 1 to {MAX_INDEX}")
        self.folder, self.label, self.index = folder, label, index
        self.name = f"{label}_task1"  # of the package
        self.system = f"{self.name}_{index}"  # the system's label
        self.package = folder / self.name
        self.api = self.package / f"{self.system}.py"
        self.checkpoint = self.package / "ckpts" / f"{self.system}.ckpt"
        self.resources = self.package / "resources"
        self.meta = folder / f"{self.system}.meta.yaml"
        self.output = folder / "predictions" / self.system / "output.csv"  # where the challenge's own script writes it
        self.trial_output = self.output.with_name("output_development.csv")  # of the development set's test split


def write_package(submission: Submission, checkpoint: dict, test_list: Path) -> None:
    """Write the inference package with the models of ``checkpoint``; other systems of the folder stay.

    All systems of the folder get this repository's present code.
    Raises `UserError` where a file cannot be written or a weight cannot be stored.
    """
    prefix = f"{submission.name}.models"
    _write_code(submission.package / "models", prefix)
    for folder in (submission.package, submission.resources, submission.checkpoint.parent):
        _write(folder / "__init__.py", "")
    _copy(Path(challenge_api.__file__), submission.api, prefix)
    _write(submission.folder / "pyproject.toml", _pyproject(submission))
    inference.save(checkpoint, submission.checkpoint, checkpoint["config"]["storage"]["weight_bits"])
    _write(submission.resources / "test.csv", test_list.read_text())
    replace_file(submission.resources / "dummy.wav", lambda path: _write_noise(path, checkpoint))


def _write_code(place: Path, prefix: str) -> None:
    """Copy the needed code beside its place, then rename it: other systems of the folder use it too."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".models.", dir=place.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        for source in needed_code():
            _copy(source, new / source.relative_to(ROOT), prefix)
        _write(new / "__init__.py", "")
        if place.exists():
            place.rename(old)
        new.rename(place)


def needed_code() -> list[Path]:
    """Return the files of this repository that the API needs: all of aum, and what is imported of dcase."""
    found, waiting = set(), _imports_of_dcase(Path(challenge_api.__file__))
    while waiting:
        found.add(path := waiting.pop())
        waiting |= _imports_of_dcase(path) - found
    rooms = {path.parent / "__init__.py" for path in found} | {ROOT / "dcase" / "__init__.py"}
    aum = [path for path in sorted((ROOT / "aum").rglob("*")) if path.suffix in (".py", ".c", ".h")]
    return [*aum, *sorted(found | rooms)]


def _imports_of_dcase(path: Path) -> set[Path]:
    """Return the files of dcase's modules that a file imports."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {
        name for node in imports for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("dcase.")}
    return {file for file in files if file.is_file()}


def _copy(source: Path, target: Path, prefix: str) -> None:
    """Copy a file of code, with its imports of aum and dcase changed to ``prefix``.aum and ``prefix``.dcase."""
    text = source.read_text()
    if source.suffix == ".py":
        text = re.sub(r"^( *)from (aum|dcase)\b", rf"\1from {prefix}.\2", text, flags=re.MULTILINE)
        text = re.sub(r"^( *)import (aum|dcase)$", rf"\1from {prefix} import \2", text, flags=re.MULTILINE)
    _write(target, text)


def _pyproject(submission: Submission) -> str:
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in (*NEEDED, *NEEDED_BY_SCRIPTS[:-1])]
    dependencies = "".join(f'    "{line}",\n' for line in (*pinned, NEEDED_BY_SCRIPTS[-1]))
    return f"""\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{submission.name}"
version = "1.0"
requires-python = ">=3.11"
# The last {len(NEEDED_BY_SCRIPTS)} are needed only by the challenge's scripts.
dependencies = [
{dependencies}]

[tool.setuptools.packages.find]
include = ["{submission.name}*"]
namespaces = false

[tool.setuptools.package-data]
"*" = ["*.c", "*.h", "*.ckpt", "*.csv", "*.wav"]
"""


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda beside: beside.write_text(text))


def _write_noise(path: Path, checkpoint: dict) -> None:
    """Write noise as long as the training clips, for counting a model's costs."""
    config = checkpoint["config"]
    logmel, rate = config["logmel"], config["data"]["orig_sample_rate"]
    samples = math.ceil((checkpoint["frames"] - 1) * logmel["hop_length"] * rate / logmel["sample_rate"])
    samples = max(samples, math.ceil(logmel["n_fft"] * rate / logmel["sample_rate"]))
    noise = np.random.default_rng(0).normal(0, 0.1, samples).clip(-1, 1)
    soundfile.write(path, noise, rate, subtype="PCM_24", format="WAV")
