"""Write a trained Audio Mamba as a folder to keep or to share: config.json, model.safetensors and a model card.

    python -m dcase.publish --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --out FOLDER

Where devices have models of their own, each gets a folder in that folder, the general model too; --device_id writes one
alone. `python -m dcase.predict` and test_only.py take the folder, or one of these, as --ckpt_path, and
`aum.AudioMamba.from_pretrained` each model. Nothing is uploaded: `hf upload USER/NAME FOLDER` does that.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dcase import complexity
from dcase.cli import parse
from dcase.data.tau22 import DEVICES
from dcase.deployment import card
from dcase.deployment.prediction import load_module, span_of_module
from dcase.errors import UserError, one_line, run
from dcase.runs.folder import STORED, trained_checkpoint
from dcase.runs.published import WEIGHTS, front_end_of, save_published
from dcase.runs.stored import GENERAL
from dcase.training.lit import SceneClassifier


@dataclass(frozen=True)
class PublishConfig:
    ckpt_path: str = ""
    """checkpoint of either stage or stored model to publish; the figures are those of results.json in its run"""
    out: str = ""
    """folder to write"""
    device_id: str = ""
    """publish one model alone: general, or a device that has a model of its own; without it all there are"""
    license: str = "other"
    """licence of the weights, as the Hugging Face Hub names it; what that of the recordings allows is yours to judge"""


def results_of(ckpt_path: str) -> dict | None:
    """results.json of the run, where its figures are of just this checkpoint or of its stored models; else None.

    Raises `UserError` where it is damaged.
    """
    path = Path(ckpt_path)
    if path.suffix == ".ckpt":
        if path.name != trained_checkpoint(path.parent).name:
            return None  # the test was of the best one
        run_folder = path.parent.parent
    else:
        stored = path if path.is_dir() else path.parent
        if stored.resolve().name != STORED:
            return None
        run_folder = stored.resolve().parent
    file = run_folder / "results.json"
    if "," in ckpt_path or not file.is_file():
        return None
    try:
        results = json.loads(file.read_text())
        if missing := {"data", "note", "macro_avg_acc", "scene_acc", "device_acc", "device_models"} - set(results):
            raise ValueError(f"it lacks {min(missing)}")
        return results
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({one_line(error)}): move it away to publish without figures"
        ) from error


def publish(config: PublishConfig) -> list[Path]:
    """The folders written. Raises `UserError` where there is no such model, or something else in the folder."""
    module = load_module(config.ckpt_path)
    results = results_of(config.ckpt_path)
    models = {GENERAL: module.model, **module.device_models}
    if config.device_id and config.device_id not in models:
        raise UserError(f"--device_id {config.device_id}: there is a model of {', '.join(models)}")
    out = Path(config.out).expanduser()
    alone = config.device_id or (GENERAL if len(models) == 1 else "")
    folders = {alone: out} if alone else {model_of: out / model_of for model_of in models}
    _refuse_leftovers(out, folders)
    for model_of, folder in folders.items():
        front_end = front_end_of(module.as_checkpoint(), model_of)
        save_published(models[model_of], folder, front_end, _card(module, front_end, folder, results, config.license))
    return list(folders.values())


def _card(module: SceneClassifier, front_end: dict, folder: Path, results: dict | None, licence: str) -> str:
    input_size = (1, 1, module.config.logmel.n_mels, module.frames)
    measured = complexity.measure(module.model, input_size, module.config.storage.weight_bits)
    return card.text(
        card.Published(
            folder=folder.resolve().name,
            name=module.config.run.experiment_name or module.config.model.model,
            front_end=front_end,
            seconds=span_of_module(module).window / module.logmel.orig_sample_rate,
            complexity=measured.as_dict(),
            training=module.origin,
            results=results,
            licence=licence,
        )
    )


def _refuse_leftovers(out: Path, folders: dict[str, Path]) -> None:
    """Raise `UserError` where models of an earlier publication would stay beside these."""
    for part in (out, *(out / name for name in (GENERAL, *DEVICES))):
        if (part / WEIGHTS).is_file() and part not in folders.values():
            raise UserError(f"--out {out}: {part} holds a model that is not of these: give a new folder")


def main() -> None:
    config = parse(PublishConfig, __doc__)
    for flag in ("ckpt_path", "out"):
        if not getattr(config, flag):
            raise UserError(f"--{flag} is missing")
    folders = publish(config)
    for folder in folders:
        print(f"{folder}/: config.json, {WEIGHTS}, README.md")
    print(f"predict with it: python -m dcase.predict RECORDINGS --ckpt_path {config.out}")


if __name__ == "__main__":
    run(main)
