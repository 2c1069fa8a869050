"""The recipes: their commands parse, they resume, and the one for the challenge runs on SynthTAU, cut short."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_results
from test_cli import parses

from dcase.data import synth
from dcase.runs.checkpoints import load_checkpoint

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if path.name not in ("run.sh", "demo.sh"))


def bash(*command, python, cwd=ROOT, **environment) -> str:
    """Run a recipe with ``python`` first in PATH; its output."""
    path = f"{python.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *map(str, command)],
        cwd=cwd, env={**os.environ, **environment, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def echo(tmp_path):
    """A program called python that prints its arguments, and for `result` a number."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1" != -c ] || exec echo 1\nprintf "%s " "$@"\necho\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_recipe_parses(recipe, echo, tmp_path):
    folders = ["/data/TAU22", *(["/data/MicIRP"] if recipe.stem == "tau22_nano" else [])]
    lines = bash(recipe, *folders, "--n_epochs", "1", python=echo, PROJECT=str(tmp_path / "P")).splitlines()
    lines = [line for line in lines if not line.startswith("to submit it")]
    assert len(lines) >= 2
    for line in lines:
        parses(line.removeprefix("-m "))


def test_a_recipe_starts_resumes_or_leaves_a_run(echo, tmp_path):
    def said() -> str:
        command = f"source {shlex.quote(str(ROOT / 'recipes/run.sh'))}; run train_base.py one --lr 1"
        return bash("-c", command, python=echo, cwd=tmp_path, PROJECT="P").strip()

    assert said() == "train_base.py --project_name P --run_id one --lr 1"
    (tmp_path / "P" / "one").mkdir(parents=True)
    (tmp_path / "P" / "one" / "config.json").touch()
    assert said() == "train_base.py --project_name P --resume one --lr 1"
    (tmp_path / "P" / "one" / "results.json").touch()
    assert said() == "train_base.py: run one is finished"


def test_the_recipe_for_the_challenge_runs_on_synthtau_up_to_the_submission(tmp_path):
    data = synth.make(tmp_path / "synth", train_clips=120, test_clips_per_device=10)
    responses = synth.make_responses(tmp_path / "responses")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *dcase.complexity*) set -- "$@" --n_mels 64 ;;
    *dcase.submit*) set -- "$@" --out {shlex.quote(str(tmp_path))} ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""
    )
    python.chmod(0o755)
    # As many steps as teachers need to be better than chance, below which their logits are refused.
    small = "--n_epochs 5 --batch_size 8 --n_mels 64 --n_fft 1024 --window_length 1024 --qat_epochs 1 --num_workers 0"
    flags = [*small.split(), "--check_val_every_n_epoch", "1", "--wandb_mode", "disabled"]
    project = tmp_path / "P"
    given = {"PROJECT": str(project), "TEACHER": "own", "LABEL": "Doe_Uni"}
    out = bash(ROOT / "recipes/tau22_nano.sh", data, responses, *flags, python=python, **given)
    assert "Memory: pass" in out and "MACs: pass" in out
    student, judged = (read_results(project / name) for name in ("nano-student", "nano-search-devices"))
    best, last = (project / run / "checkpoints" for run in ("nano-search", "nano-student"))
    assert load_checkpoint(last / "last.ckpt")["epoch"] == load_checkpoint(best / "best.ckpt")["epoch"]
    assert (project / "nano-search" / "cross_fit" / "logits.npz").is_file()
    last = read_results(project / "nano-devices") if judged["device_models"] else student
    assert bool(last["device_models"]) == bool(judged["device_models"])
    assert last["n_clips"] == 90 and last["complexity"]["within_limits"]
    assert (tmp_path / "Doe_Uni" / "predictions" / "Doe_Uni_task1_1" / "output_development.csv").is_file()
