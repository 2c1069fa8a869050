"""Imports run one way: scripts -> dcase -> aum -> torch, and inside dcase from the higher tier to the lower."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("aum/**/*.py"), *ROOT.glob("dcase/**/*.py"), *ROOT.glob("*.py")])

# A module of dcase may import those of lower tiers only; the leaves, tier 1, do not know each other.
TIERS = {
    "errors": 0, "stopping": 0, "cli": 0.1, "files": 0.1, "cores": 0.1, "sound": 0.1, "processes": 0.1, "pack": 0.2,
    "tau22": 0.5, "dataset": 0.6, "packing": 0.6,
    "synth": 1, "prepare": 1, "logmel": 1, "augment": 1, "metrics": 1, "devices": 1, "runs": 1, "report": 1,
    "cp_mobile": 0.5, "models": 1, "adapters": 1, "averaging": 1, "distillation": 1, "pruning": 1,
    "quantisation": 1, "responses": 1, "stored": 1.2, "checkpoints": 1.3, "complexity": 1.5,
    "config": 2,
    "loading": 3,
    "lit": 4,
    "teachers": 4.5,
    "training": 5,
    "fine_tuning": 6, "evaluation": 6,
}  # fmt: skip
THIRD_PARTY_OF_AUM = {"torch", "triton", "causal_conv1d"}


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


def test_every_module_of_dcase_has_a_tier():
    assert {path.stem for path in ROOT.glob("dcase/*.py")} - {"__init__"} == set(TIERS)


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
    if folder == "dcase" and path.stem != "__init__":
        used = {name.split(".")[1] for name in names if name.startswith("dcase.")} & set(TIERS)
        too_high = {name for name in used if TIERS[name] >= TIERS[path.stem]}
        assert not too_high, f"{path.stem} may not import {', '.join(sorted(too_high))}"


def test_no_room_without_a_name():
    banned = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in FILES if banned & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}]
