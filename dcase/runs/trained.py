"""A trained model from whatever a run has left of it."""

from pathlib import Path

from dcase.errors import UserError
from dcase.runs.checkpoints import load_checkpoint, merged_checkpoint, refuse_other_scenes
from dcase.runs.folder import CHECKPOINTS, STORED, Run, RunConfig, trained_checkpoint
from dcase.runs.published import CONFIG, WEIGHTS, is_published, load_published
from dcase.runs.stored import load_stored


def load_trained(path: str, project_name: str = RunConfig.project_name) -> dict:
    """What ``--ckpt_path`` names, as a checkpoint that `lit.SceneClassifier.from_checkpoint` takes.

    ``path``: a checkpoint file of either stage, or several of stage 2 with commas between them, which are merged; or
    a stored model, or the folder that holds those of all devices (`compression.stored.load_stored`); or the folder of a
    published model, or of those of all devices (`deployment.published.load_published`).

    Raises `UserError`, naming the file, where one is missing, damaged or another's, where several do not fit, or where
    it was trained on other scenes than `labels.SCENES`; where it is a run that is named, in ``project_name`` or by its
    folder, with the files of it to give.
    """
    parts = path.split(",")
    if len(set(parts)) < len(parts):
        raise UserError(f"--ckpt_path {path}: one of these files is there twice")
    for part in parts:
        _refuse_run(part, project_name)
    stored = any(Path(part).is_dir() or part.endswith(".safetensors") for part in parts)
    if stored and len(parts) > 1:
        raise UserError(f"--ckpt_path {path}: of stored models give one file, or the folder that holds them")
    place = Path(path)
    if place.name == WEIGHTS and place.with_name(CONFIG).is_file():
        place = place.parent
    if place.is_dir() and is_published(place):
        return load_published(place)
    if not stored:
        return merged_checkpoint({part: load_checkpoint(part) for part in parts})
    checkpoint = load_stored(path)
    refuse_other_scenes(checkpoint.get("scenes"), f"stored model {path}")
    return checkpoint


def _refuse_run(given: str, project_name: str) -> None:
    """Raise `UserError` where it is a run that is given, not a model of it, or where nothing is there."""
    path = Path(given)
    if path.exists():
        run = Run(path.parent if path.name == CHECKPOINTS else path)
        if path.is_dir() and run.has_config() and run.checkpoints.is_dir():
            raise UserError(f"{given} is a run's folder: {_what_to_give(run)}")
        return
    by_id = Run(Path(project_name) / given)
    if path.name == given and by_id.has_config():
        raise UserError(f"{given} is a run's id: {_what_to_give(by_id)}")
    stored = path.parent if path.suffix == ".safetensors" else path
    if stored.name == STORED and not stored.exists():
        raise UserError(f"--ckpt_path {given}: there is no folder {stored}; {_how_to_store(Run(stored.parent))}")
    if not path.suffix:
        raise UserError(
            f"--ckpt_path {given}: there is no such file or folder; give a checkpoint, as "
            "<project_name>/<run_id>/checkpoints/best.ckpt"
        )


def _what_to_give(run: Run) -> str:
    checkpoint, stored = trained_checkpoint(run.checkpoints), run.stored
    models = [f"a file: {checkpoint}"] if checkpoint.is_file() else []
    models += [f"the folder of its stored models: {stored}"] if stored.is_dir() else []
    if not models:
        return f"there is no model in {run.folder}/: give a run that was trained"
    return f"--ckpt_path takes {', or '.join(models)}"


def _how_to_store(run: Run) -> str:
    checkpoint = trained_checkpoint(run.checkpoints)
    if not checkpoint.is_file():
        return f"nor is there a checkpoint in {run.checkpoints}/ to make it of: check the run's id"
    return f"python test_only.py --ckpt_path {checkpoint} --weight_bits 16 makes one, in a run of its own"
