"""What docs/ shows works: the changes of docs/extending.md apply to this repository, and the commands run then."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import FIT, RATE, ROOT, SMALL, only_run, read_results

DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LIGHT = [*SMALL, *FIT, "--n_epochs", "1", "--report_audio", "False"]
FRONT_END = SMALL[SMALL.index("--orig_sample_rate") :]  # without the flags of an Audio Mamba's shape


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section of docs/extending.md."""
    section = re.split(rf"^## {title}$", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def changed(tmp_path):
    """A copy of the repository, changed as a section of docs/extending.md has it."""

    def change(title: str):
        copy = tmp_path / "copy"
        for name in ("aum", "dcase", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train_base.py", copy)
        (diff,) = blocks(title, "diff")
        subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
        return copy

    return change


def run(title: str, copy, folder, *args) -> dict:
    """Run a section's command in its copy, cut short; results.json of its run."""
    (command,) = blocks(title, "bash")
    script, *given = command.split()[1:]
    given = [str(folder) if value == "DIR" else value for value in given]
    done = subprocess.run(
        [sys.executable, script, *given, *map(str, args), "--project_name", "P"],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return read_results(only_run(copy / "P"))


def test_an_augmentation_is_added_as_the_docs_say(changed, learnable):
    copy = changed("An augmentation")
    results = run("An augmentation", copy, learnable, "--dataset_dir", learnable, *LIGHT)
    assert results["n_clips"] == 32
    test = "import torch; from dcase.data.augment import gain; x = torch.ones(500, 1, 2)"
    test += "; y = gain(x, 6.0)[:, 0].log10() * 20"
    test += "; assert y.max() <= 6.001 and y.min() >= -6.001 and y.std() > 3 and (y[:, 0] == y[:, 1]).all()"
    subprocess.run([sys.executable, "-c", test], cwd=copy, check=True)


def test_a_backbone_is_added_as_the_docs_say(changed, learnable):
    copy = changed("A backbone")
    light = [*FRONT_END, *FIT, "--n_epochs", "1", "--report_audio", "False", "--weight_bits", "8"]
    results = run("A backbone", copy, learnable, "--dataset_dir", learnable, *light)
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64)
    assert results["complexity"]["params"] == convolutions + 2 * (16 + 32 + 64) + 65 * 10
    imports = [sys.executable, "-m", "pytest", "-q", "tests/test_imports.py", "-p", "no:cacheprovider"]
    assert subprocess.run(imports, cwd=copy, capture_output=True).returncode == 0


def test_a_data_set_is_added_as_the_docs_say(changed, tmp_path):
    copy, folder = changed("A data set"), tmp_path / "data"
    rng = np.random.default_rng(0)
    places = {"kitchen": 3, "office": 4, "street": 4}  # of all scenes together, every third one is not p2 of each
    for scene, n_places in places.items():
        for place in (f"p{i}" for i in range(n_places)):
            (folder / "audio" / scene / place).mkdir(parents=True)
            for clip in range(4):
                soundfile.write(folder / "audio" / scene / place / f"{clip}.wav", rng.normal(0, 0.1, RATE // 2), RATE)
    (code,) = blocks("A data set", "python")
    (folder / "audio" / ".DS_Store").write_text("of a Mac")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    tested = (folder / "split_setup" / "test.csv").read_text().splitlines()[1:]
    assert {row.rpartition("/")[0] for row in tested} == {f"audio/{scene}/p2" for scene in places}
    results = run("A data set", copy, folder, *LIGHT)
    assert list(results["scene_acc"]) == ["kitchen", "office", "street"] and results["n_clips"] == 12
    assert results["device_acc"]["a"] == pytest.approx(results["acc"])


def test_the_readmes_example_of_the_backbone_runs():
    section = (ROOT / "README.md").read_text().partition("## The backbone alone")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    code += "\nassert logits.shape == (2, 50) and y.shape == (b, d_inner, l)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_the_docs_lead_somewhere(path):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        place = (path.parent / file) if file else path
        assert place.exists(), f"{text}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
