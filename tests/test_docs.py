"""What docs/ shows works: the changes of docs/extending.md apply to this repository, and the commands run then."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import soundfile
import torch
from conftest import FIT, RATE, ROOT, SMALL, only_run, read_results

import aum
from dcase.data.labels import Labels

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


def test_the_labels_file_of_the_docs_is_one():
    (text,) = re.findall(r"^```json\n(.*?)^```$", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    labels = Labels.from_plain(json.loads(text), "docs/data.md")
    assert labels.plain() == json.loads(text) and labels.train_devices == ("recorder", "phone")


def test_a_data_set_is_added_as_the_docs_say(tmp_path):
    rng = np.random.default_rng(0)
    for scene, place, clip in product(("kitchen", "office", "street"), ("p0", "p1", "p2", "p3"), range(4)):
        path = tmp_path / "recordings" / scene / place / f"{clip}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, RATE // 2), RATE)
    adopting, training = blocks("A data set", "bash")
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (
        adopting,
        f"{training.strip()} {' '.join(LIGHT)} --project_name P".replace(" train", f" {ROOT}/train"),
    ):
        python, *args = command.split()
        subprocess.run([sys.executable, *args], cwd=tmp_path, env=place, check=True, capture_output=True)
    tested = (tmp_path / "DIR" / "split_setup" / "test.csv").read_text().splitlines()[1:]
    assert {row.rpartition("/")[0].partition("/")[2].partition("/")[0] for row in tested} == {
        "kitchen",
        "office",
        "street",
    }
    results = read_results(only_run(tmp_path / "P"))
    assert list(results["scene_acc"]) == ["kitchen", "office", "street"] and results["n_clips"] == len(tested) == 12
    assert results["device_acc"] == {"own": pytest.approx(results["acc"])}


def test_the_readmes_example_of_the_backbone_runs():
    section = (ROOT / "README.md").read_text().partition("## The backbone alone")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    code += "\nassert logits.shape == (2, 50) and tokens.shape == (2, 641, 192) and mixer(tokens).shape == tokens.shape"
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


def test_the_backbones_page_runs(learnable, general_run, tmp_path, monkeypatch, capsys):
    """In its order, and in one namespace, as in a notebook; of the commands, those of this repository."""
    monkeypatch.chdir(tmp_path)
    for path in sorted((learnable / "audio").glob("*-a.wav")):
        place = tmp_path / "recordings" / path.name.partition("-")[0] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (tmp_path / "DCASE25_Task1").mkdir()
    (tmp_path / "DCASE25_Task1" / "RUN_ID").symlink_to(general_run)
    torch.manual_seed(0)
    names, page = {}, (ROOT / "docs/backbone.md").read_text()
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(code, names)
        elif code.startswith("python -m dcase"):
            command = [sys.executable, *code.split()[1:], "--accelerator", "cpu"]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    shapes = {"logits": (2, 50), "features": (2, 192), "tokens": (2, 129, 192), "patches": (2, 8, 16, 192)}
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    assert [tuple(x.shape) for x in names["layers"]] == [(2, 129, 192)] * 4
    assert (names["grid"], names["cls"], names["frames"].shape[1]) == ((8, 16), 64, 16)
    assert names["new"].config.n_classes == 5 and torch.equal(names["new"].norm_f.weight, names["model"].norm_f.weight)
    files = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("recordings/*/*.wav"))]
    assert names["found"]["files"].tolist() == files and len(files) > 20
    same = [names["names"][i] == names["names"][j] for i, j in enumerate(names["nearest"])]
    assert names["accuracy"] == 1 and np.mean(same) > 0.6  # of 4 tones
    torch.testing.assert_close(names["vector"], names["vectors"][-1])
    assert names["error"] < 0.1 and capsys.readouterr().out.count(" is nearest to ") == len(files)
    torch.testing.assert_close(names["y"], names["reference"], rtol=1e-4, atol=1e-5)


def test_the_backbones_page_has_the_models_shapes():
    page = (ROOT / "docs/backbone.md").read_text()
    rows = re.findall(r"^\| `(aum_\w+)` \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) x (\d+) \| ", page, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == aum.list_models()
    for name, *numbers in rows:
        with torch.device("meta"):
            model = aum.create_model(name)
        config = model.config
        expected = sum(x.numel() for x in model.parameters()), config.embed_dim, config.depth, *config.grid
        assert tuple(int(number.replace(",", "")) for number in numbers) == expected
