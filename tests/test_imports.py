"""Imports run one way: scripts -> dcase -> aum -> torch, and inside dcase from the higher tier to the lower."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("aum/**/*.py"), *ROOT.glob("dcase/**/*.py"), *ROOT.glob("*.py")])

# A module of dcase may import those of lower tiers only; the leaves, tier 1, do not know each other.
TIERS = {
    "data": 0, "training": 0, "compression": 0, "tracking": 0, "checks": 0, "deployment": 0, "submission": 0,
    "errors": 0, "labels": 0, "progress": 0, "cli": 0.1, "files": 0.1, "tau22": 0.5,
    "data.cores": 0.1, "data.sound": 0.1, "data.pack": 0.2, "data.dataset": 0.6, "data.packing": 0.6,
    "data.recordings": 1.1,
    "synth": 1, "prepare": 1, "logmel": 1, "augment": 1, "responses": 1, "metrics": 1, "runs": 1, "report": 1,
    "cp_mobile": 0.5, "models": 1, "devices": 1,
    "compression.quantisation": 1, "compression.pruning": 1, "compression.stored": 1.2,
    "checkpoints": 1.3, "complexity": 1.5, "config": 2, "lit": 4, "evaluation": 6,
    "training.stopping": 0, "training.processes": 0.1, "training.bars": 1,
    "training.adapters": 1, "training.averaging": 1, "training.distillation": 1,
    "training.seeds": 2.6, "training.loading": 3, "training.teachers": 4.5, "training.fit": 5,
    "training.fine_tuning": 6,
    "tracking.artifacts": 1.1, "tracking.loggers": 1.2, "tracking.wandb_media": 5,
    "checks.findings": 0.1, "checks.machine": 0.2, "checks.lengths": 1.05, "checks.data": 1.1, "doctor": 1.2,
    "deployment.exported": 1.1, "deployment.onnx_format": 1.1, "deployment.published": 1.25, "deployment.card": 1.6,
    "deployment.prediction": 4.5, "predict": 6, "publish": 6, "export": 6,
    "submission.build_backend": 0.1, "submission.probe": 0.1, "submission.output": 1, "submission.inference": 1.3,
    "submission.challenge_api": 1.4, "submission.package": 1.5, "submission.meta": 1.6, "submission.meta_check": 1.7,
    "validate_submission": 1.8, "submit": 7,
    "report.words": 0.6, "report.published": 0.6, "report.tables": 0.7, "report.charts": 0.7, "report.summary": 0.8,
    "report.predictions": 1, "report.html": 1, "report.bootstrap": 1.1, "report.mistakes": 1.1, "report.svg": 1.1,
    "report.sounds": 1.2, "report.run_files": 1.2, "report.gallery": 1.3, "report.learning": 1.3, "report.alike": 2.05,
    "report.seeds": 2.1, "report.content": 2.1, "report.setup": 2.1, "report.devices": 2.2, "report.page": 2.3,
    "report.comparison": 2.4, "report.__main__": 2.5, "compare": 2.5,
}  # fmt: skip
THIRD_PARTY_OF_AUM = {"torch", "triton", "causal_conv1d", "safetensors", "huggingface_hub"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def module_of(path: Path) -> str:
    """dcase/report/page.py -> report.page; a package's __init__.py is the package."""
    return ".".join(path.relative_to(ROOT / "dcase").with_suffix("").parts).removesuffix(".__init__")


def modules_in(names: set[str]) -> set[str]:
    """Those of `TIERS` that dotted names lead to: of dcase.report.page.write_page the page."""
    found = set()
    for name in names:
        parts = name.removeprefix("dcase.").split(".") if name.startswith("dcase.") else []
        heads = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found |= set([head for head in heads if head in TIERS][:1])
    return found


def test_every_module_of_dcase_has_a_tier():
    assert {module_of(path) for path in ROOT.glob("dcase/**/*.py")} - {"__init__"} == set(TIERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    names = imported(path)
    roots = {name.split(".")[0] for name in names}
    scripts = {script.stem for script in ROOT.glob("*.py")}
    assert not roots & scripts, "nothing imports a script"
    assert not roots & {"tests", "benchmarks"}
    folder = path.relative_to(ROOT).parts[0]
    if folder == "aum":
        standard = {name for name in roots if name in __import__("sys").stdlib_module_names}
        assert roots - standard - {"aum"} <= THIRD_PARTY_OF_AUM
    if folder == "dcase" and path != ROOT / "dcase" / "__init__.py":
        module = module_of(path)
        too_high = {name for name in modules_in(names) if TIERS[name] >= TIERS[module]}
        assert not too_high, f"{module} may not import {', '.join(sorted(too_high))}"


def test_no_room_without_a_name():
    banned = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in FILES if banned & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}]
