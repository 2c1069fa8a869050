"""The package `audio-mamba`: its wheel trains where it is installed, beside torch, einops and safetensors only."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import aum

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "einops", "safetensors[numpy]")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)

TRAINING = """
import json, tempfile, torch, aum

def losses(module, lr, x, loss):
    optimiser, found = torch.optim.AdamW(module.parameters(), lr), []
    for _ in range(6):
        found.append(loss(module(x)))
        optimiser.zero_grad()
        found[-1].backward()
        optimiser.step()
    return [value.item() for value in found]

torch.manual_seed(0)
labels = torch.arange(8) % 3
model = aum.create_model("aum_tiny", depth=2, n_mels=32, target_length=64, n_classes=3, dropout=0.0)
report = {
    "aum": aum.__file__, "backends": aum.available_backends(),
    "model": losses(model, 1e-3, torch.randn(8, 1, 32, 64), lambda y: torch.nn.functional.cross_entropy(y, labels)),
    "block": losses(aum.BiMamba(24), 3e-2, torch.randn(4, 30, 24), lambda y: (y - 1).square().mean()),
}
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = aum.AudioMamba.from_pretrained(folder).state_dict()
    report["saved"] = all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
print(json.dumps(report))
"""


def installed(*asked: str) -> set[str]:
    """Return the names of the distributions that these need, and their own."""
    found, waiting = set(), [Requirement(name) for name in asked]
    while waiting:
        requirement = waiting.pop()
        found.add(requirement.name)
        for text in distribution(requirement.name).requires or ():
            further = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            if not further.marker or any(map(further.marker.evaluate, extras)):
                if further.name not in found or further.extras:
                    waiting.append(further)
    return found


def run(*command: object, cwd: Path, **env: str) -> str:
    unset = ("PYTHONPATH", "VIRTUAL_ENV", "CC", "AUM_SCAN_BACKEND", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in unset} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel without a network, from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *offline, source, cwd=source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Make an environment that has the wheel and the installed copies of what it needs, and nothing else."""
    folder, links = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("links")
    for name in installed(*NEEDED):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(found.locate_file(top)).resolve())
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{links}\n")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--quiet", wheel, cwd=folder)
    return python


def test_the_wheel_holds_the_backbone_alone(wheel):
    assert wheel.name == f"audio_mamba-{aum.__version__}-py3-none-any.whl" and wheel.stat().st_size < 200_000
    with zipfile.ZipFile(wheel) as file:
        beside = f"audio_mamba-{aum.__version__}.dist-info"
        metadata = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE"}
        sources = set(run("git", "ls-files", "aum", cwd=ROOT).splitlines())
        assert {"aum/py.typed", "aum/scan/cpu_kernels.c", "aum/scan/vectors.h"} < sources
        assert set(file.namelist()) == sources | {f"{beside}/{name}" for name in metadata}
        needs = re.findall(r"^Requires-Dist: ([\w-]+\S*)", file.read(f"{beside}/METADATA").decode(), flags=re.MULTILINE)
    assert {re.split("[<>=;]", need)[0] for need in needs} == {*NEEDED, "huggingface_hub"}


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[1]
    logged = re.search(r"is at version (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text())[1]
    assert cited == logged == aum.__version__


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """An empty folder for compiled kernels."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("compiler", [False, pytest.param(True, marks=pytest.mark.skipif(not COMPILER, reason="none"))])
def test_the_installed_package_trains(python, cache, tmp_path, compiler):
    path = os.environ["PATH"] if compiler else str(tmp_path)
    found = json.loads(run(python, "-c", TRAINING, cwd=tmp_path, PATH=path, AUDIO_MAMBA_CACHE=str(cache)))
    assert Path(found["aum"]).is_relative_to(python.parent.parent)
    assert ("cpu" in found["backends"]) == compiler == bool([*cache.glob("audio_mamba/*.so")])
    for losses in found["model"], found["block"]:
        assert losses[-1] < 0.9 * losses[0]
    assert found["saved"]


def test_nothing_else_is_installed(python, tmp_path):
    test = "from importlib.util import find_spec; assert find_spec('aum') and not any(map(find_spec, {}))"
    run(python, "-c", test.format(["dcase", "tests", "huggingface_hub", "pandas"]), cwd=tmp_path)


def test_the_snippets_of_the_page_run_where_it_is_installed(python, cache, tmp_path):
    page, code = (ROOT / "docs/backbone.md").read_text(), ""
    for title in ("Installing", "In place of mamba_ssm's Mamba"):
        section = re.split(r"^## ", page.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        code += snippet
    run(python, "-c", f"{code}\nassert y.shape == (2, 197, 192)", cwd=tmp_path, AUDIO_MAMBA_CACHE=str(cache))
