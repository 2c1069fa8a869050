"""Imports run one way: scripts -> dcase -> aum -> torch, and inside dcase from a later room to an earlier one."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("aum/**/*.py"), *ROOT.glob("dcase/**/*.py"), *ROOT.glob("*.py")])

# A file of dcase imports from its own room and from the rooms before it. Every other name in dcase/ is a command, which
# nothing imports.
ORDER = """
    errors files progress machine cli
    data model complexity runs report training deployment submission
    commands
""".split()
THIRD_PARTY_OF_AUM = {"torch", "einops", "triton", "causal_conv1d", "safetensors", "huggingface_hub"}


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, in function bodies too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def parts_of(path: Path) -> tuple[str, ...]:
    """dcase/report/page.py -> ("report", "page"); a package's __init__.py is the package."""
    return tuple(part for part in path.relative_to(ROOT / "dcase").with_suffix("").parts if part != "__init__")


def place(room: str) -> int:
    return ORDER.index(room if room in ORDER else "commands")


def rooms_in(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("dcase.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    names = imported(path)
    roots = {name.split(".")[0] for name in names}
    scripts = {script.stem for script in ROOT.glob("*.py")}
    assert not roots & scripts, "nothing imports a script"
    assert not roots & {"tests", "benchmarks"}
    folder = path.relative_to(ROOT).parts[0]
    if folder == "aum":
        assert roots - sys.stdlib_module_names - {"aum"} <= THIRD_PARTY_OF_AUM
    if folder == "dcase" and (parts := parts_of(path)):
        others = rooms_in(names) - {parts[0]}
        too_late = {room for room in others if place(room) >= place(parts[0])}
        assert not too_late, f"dcase/{parts[0]} may not import dcase.{', dcase.'.join(sorted(too_late))}"


@pytest.mark.parametrize(
    "room", sorted({parts[0] for path in FILES if "dcase" in path.parts and (parts := parts_of(path))})
)
def test_no_cycle_in_a_room(room):
    files = {".".join(("dcase", *parts_of(path))): path for path in (ROOT / "dcase" / room).glob("**/*.py")}
    TopologicalSorter({name: imported(path) & set(files) - {name} for name, path in files.items()}).prepare()


def test_the_order_names_only_what_is_there():
    rooms = {path.stem for path in (ROOT / "dcase").glob("[a-z]*")}
    assert set(ORDER) - {"commands"} <= rooms and len(ORDER) <= 20


def test_no_room_without_a_name():
    banned = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in FILES if banned & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}]
