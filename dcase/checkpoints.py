"""A trained model from whatever a run has left of it."""

from pathlib import Path

from dcase.compression.stored import load_stored
from dcase.deployment.published import CONFIG, WEIGHTS, is_published, load_published
from dcase.devices import merged_checkpoint
from dcase.errors import UserError
from dcase.runs import load_checkpoint


def load_trained(path: str) -> dict:
    """What ``--ckpt_path`` names, as a checkpoint that `lit.SceneClassifier.from_checkpoint` takes.

    ``path``: a checkpoint file of either stage, or several of stage 2 with commas between them, which are merged; or
    a stored model, or the folder that holds those of all devices (`stored.load_stored`); or the folder of a published
    model, or of those of all devices (`published.load_published`).

    Raises `UserError`, naming the file, where one is missing, damaged or another's, or where several do not fit.
    """
    parts = path.split(",")
    if len(set(parts)) < len(parts):
        raise UserError(f"--ckpt_path {path}: one of these files is there twice")
    stored = any(Path(part).is_dir() or part.endswith(".safetensors") for part in parts)
    if stored and len(parts) > 1:
        raise UserError(f"--ckpt_path {path}: of stored models give one file, or the folder that holds them")
    place = Path(path)
    if place.name == WEIGHTS and place.with_name(CONFIG).is_file():
        place = place.parent
    if place.is_dir() and is_published(place):
        return load_published(place)
    return load_stored(path) if stored else merged_checkpoint({part: load_checkpoint(part) for part in parts})
