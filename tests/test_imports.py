"""Imports run one way: scripts -> dcase -> aum -> torch, and inside dcase from a later room to an earlier one."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("aum/**/*.py"), *ROOT.glob("dcase/**/*.py"), *ROOT.glob("*.py")])

# A file of dcase imports from its own room and from the rooms before it. Every other name in dcase/ is a command, which
# nothing imports.
ORDER = """
    errors files schema progress machine cli
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


def run_with(program: str, **environment: str) -> subprocess.CompletedProcess:
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env={**unset, **environment}, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "asked, found", [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(asked, found):
    done = run_with("import os, dcase; print(os.environ.get('GOMP_SPINCOUNT'))", **asked)
    assert done.stdout.strip() == found


def test_torchs_threads_learn_that_they_sleep_soon():
    """Its OpenMP library reads it when it is loaded, and shows what it has read."""
    said = run_with("import dcase.machine", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch's OpenMP library is not GNU's")
    assert "GOMP_SPINCOUNT = '5000'" in said


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_a_script_imports_dcase_before_any_library(script):
    """What `dcase` sets must be there when torch is loaded; `python -m dcase.x` imports `dcase` first in any case."""
    lines = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = [(line.module if isinstance(line, ast.ImportFrom) else line.names[0].name).split(".")[0] for line in lines]
    assert next(root for root in roots if root not in sys.stdlib_module_names) == "dcase"


def test_the_order_names_only_what_is_there():
    rooms = {path.stem for path in (ROOT / "dcase").glob("[a-z]*")}
    assert set(ORDER) - {"commands"} <= rooms and len(ORDER) <= 20


def test_no_room_without_a_name():
    banned = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in FILES if banned & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}]
