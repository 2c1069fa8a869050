"""A trained model from any of the files that a run leaves."""

from pathlib import Path

from dcase.errors import UserError, command
from dcase.runs.challenge import load_file
from dcase.runs.checkpoints import final_state, merged_checkpoint, whole
from dcase.runs.folder import CHECKPOINTS, STORED, Run, RunConfig
from dcase.runs.published import CONFIG, WEIGHTS, is_published, load_published
from dcase.runs.stored import load_stored


def load_trained(path: str, project_name: str = RunConfig.project_name) -> dict:
    """Return what ``--ckpt_path`` names, as a checkpoint that `lit.SceneClassifier.from_checkpoint` takes.

    ``path``: a checkpoint file of either stage, or several of stage 2, separated by commas, which are merged; one
    of the challenge's baseline (`runs.challenge`); a stored model, or the folder of those of all devices; the folder of
    a published model, or of those of all devices.

    Raises `UserError`, naming the file, where one is missing, damaged or of another program, where several do not fit,
    or where a weight is not finite. Where ``path`` is a run's folder or its id in ``project_name``, the error names the
    files to give.
    """
    checkpoint = _read(path, project_name)
    if lost := next((name for name, value in final_state(checkpoint).items() if not value.isfinite().all()), None):
        raise UserError(
            f"--ckpt_path {path}: {lost} is NaN or infinite: the file is damaged, or its training diverged; take an "
            "earlier checkpoint, or train again with a lower --lr"
        )
    return checkpoint


def _read(path: str, project_name: str) -> dict:
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
        return whole(load_published(place), f"published model {place}")
    if not stored:
        return merged_checkpoint({part: load_file(part) for part in parts})
    return whole(load_stored(path), f"stored model {path}")


def _refuse_run(given: str, project_name: str) -> None:
    """Raise `UserError` where a run is given instead of a model of it, or where there is no such file or folder."""
    path = Path(given)
    if path.exists():
        run, what = Run(path.parent if path.name == CHECKPOINTS else path), "folder"
        is_run = path.is_dir() and run.has_config() and run.checkpoints.is_dir()
    else:
        run, what = Run(Path(project_name) / given), "id"
        is_run = path.name == given and run.has_config()
    if is_run:
        models = [f"a file: {run.trained}"] if run.trained.is_file() else []
        models += [f"the folder of its stored models: {run.stored}"] if run.stored.is_dir() else []
        takes = f"--ckpt_path takes {', or '.join(models)}"
        none = f"there is no model in {run.folder}/: give a run that was trained"
        raise UserError(f"{given} is a run's {what}: {takes if models else none}")
    if path.exists():
        return
    stored = path.parent if path.suffix == ".safetensors" else path
    if stored.name == STORED and not stored.exists():
        run = Run(stored.parent)
        how = f"nor is there a checkpoint in {run.checkpoints}/ to make it of: check the run's id"
        if run.trained.is_file():
            how = f"python test_only.py {command('--ckpt_path', run.trained)} --weight_bits 16 makes one, in a new run"
        raise UserError(f"--ckpt_path {given}: there is no folder {stored}; {how}")
    if not path.suffix:
        raise UserError(
            f"--ckpt_path {given}: there is no such file or folder; give a checkpoint, as "
            "<project_name>/<run_id>/checkpoints/best.ckpt"
        )
