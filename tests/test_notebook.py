"""examples/first_steps.ipynb runs from top to bottom, and shows what it promises."""

import shutil
from collections import Counter

import nbclient
import nbformat
import pytest
from conftest import ROOT

from aum.cache import cache_folder
from dcase.data import synth

NOTEBOOK = ROOT / "examples/first_steps.ipynb"
JUPYTER = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")  # else in the home folder


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook as a user runs it, on a small default SynthTAU, with the folder that it wrote to."""
    cache, temporary = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        compiled = list(cache_folder().glob("cpu_kernels-*.so"))
        patch.setenv("AUDIO_MAMBA_CACHE", str(cache))
        cache_folder().mkdir()
        for kernels in compiled:  # where an earlier test has compiled them
            shutil.copy(kernels, cache_folder())
        patch.setenv("TMPDIR", str(temporary))
        for name in JUPYTER:
            patch.setenv(name, str(temporary / name))
        for name in ("TAU22_DIR", "DISPLAY"):
            patch.delenv(name, raising=False)
        synth.make(synth.default_folder(), train_clips=240, test_clips_per_device=10, num_workers=0)
        before = set(NOTEBOOK.parent.iterdir())
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute()  # raises what a cell raises
    assert set(NOTEBOOK.parent.iterdir()) == before  # it leaves nothing beside it
    return notebook, temporary


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook) -> str:
    """All that is printed."""
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_it_is_committed_small_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook)
    assert not any(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 50_000


def test_every_cell_ran_and_none_raised(executed):
    notebook, _ = executed
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]  # no warning either


def test_it_shows_figures_sounds_and_tables(executed):
    notebook, _ = executed
    shown = [output.data for output in outputs(notebook) if "data" in output]
    kinds = Counter(kind for data in shown for kind in data)
    assert kinds["image/png"] == 9  # scenes, devices, 3 augmentations, patches, directions, confusion, probabilities
    assert sum("<audio" in data.get("text/html", "") for data in shown) == 10 + 9 + 3  # scenes, devices, waveforms
    tables = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    assert len(tables) == 2
    assert tables[0].count("%)") == 3 * 10 and "<th>airport</th>" in tables[0]
    assert "58.4 x" in tables[1]  # aum_small's MACs, as in README.md


def test_it_says_what_the_data_are_and_what_the_model_costs(executed):
    notebook, _ = executed
    said = text_of(notebook)
    assert "which is synthetic" in said and "not TAU22" in said
    assert "16 x 4 patches of 16 mel bins x 16 frames: 64 tokens" in said
    assert "Complexity of the aum_nano above" in said and "Memory: pass" in said and "MACs: pass" in said
    markdown = "".join(data.get("text/markdown", "") for data in (o.data for o in outputs(notebook) if "data" in o))
    assert "Synthetic data: not comparable" in markdown


def test_its_run_and_report_lie_in_the_temporary_folder(executed):
    _, temporary = executed
    (work,) = temporary.glob("first_steps_*")
    assert (work / "runs/first/report/index.html").stat().st_size > 10_000
    assert (work / "runs/first/checkpoints/last.ckpt").is_file()
