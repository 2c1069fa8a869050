"""Write a trained Audio Mamba as a folder to keep or to share: config.json, model.safetensors and a model card.

    python -m dcase.publish --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --out FOLDER

Where devices have models of their own, each model gets a folder in that folder, the general one too; --device_id writes
only one. `python -m dcase.predict` and test_only.py take the folder, or one of these, as --ckpt_path, and
`aum.AudioMamba.from_pretrained` takes each model. Nothing is uploaded: `hf upload USER/NAME FOLDER` does that.
"""

from dataclasses import dataclass
from pathlib import Path

from dcase import complexity
from dcase.cli import parse
from dcase.deployment import card
from dcase.deployment.prediction import load_module, span_of_module
from dcase.errors import UserError, command, run
from dcase.runs.folder import run_of
from dcase.runs.published import WEIGHTS, front_end_of, parts_of, save_published
from dcase.runs.stored import GENERAL
from dcase.training.lit import SceneClassifier


@dataclass(frozen=True)
class PublishConfig:
    ckpt_path: str = ""
    """Checkpoint of either stage or stored model to publish; the card gets the figures of results.json in its run."""
    out: str = ""
    """Folder to write."""
    device_id: str = ""
    """Publish only one model: general, or a device that has its own model; "": publish all of them."""
    license: str = "other"
    """Licence of the weights, as the Hugging Face Hub names it; check what the recordings' licence allows."""

    def __post_init__(self):
        for flag in ("ckpt_path", "out"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is missing")


def results_of(ckpt_path: str) -> dict | None:
    """Return results.json of the checkpoint's run; None where its figures are not of this checkpoint's models.

    Raises `UserError` where the file is damaged.
    """
    path, found = Path(ckpt_path), run_of(ckpt_path)
    if found is None or "," in ckpt_path or (path.suffix == ".ckpt" and path.name != found.trained.name):
        return None  # the test was of `Run.trained`
    return found.results()


def publish(config: PublishConfig) -> list[Path]:
    """Write the models and return their folders.

    Raises `UserError` where there is no such model, or where the folder holds something else.
    """
    module = load_module(config.ckpt_path)
    results = results_of(config.ckpt_path)
    models = {GENERAL: module.model, **module.device_models}
    if config.device_id and config.device_id not in models:
        raise UserError(f"--device_id {config.device_id}: the checkpoint has models of {', '.join(models)}")
    out = Path(config.out).expanduser()
    single = config.device_id or (GENERAL if len(models) == 1 else "")
    folders = {single: out} if single else {model_of: out / model_of for model_of in models}
    for part in (out, *parts_of(out).values()):
        if (part / WEIGHTS).is_file() and part not in folders.values():
            raise UserError(f"--out {out}: {part} holds a model that is not one of these: give a new folder")
    for model_of, folder in folders.items():
        front_end = front_end_of(module.as_checkpoint(), model_of)
        save_published(models[model_of], folder, front_end, _card(module, front_end, folder, results, config.license))
    return list(folders.values())


def _card(module: SceneClassifier, front_end: dict, folder: Path, results: dict | None, licence: str) -> str:
    input_size = (1, 1, module.config.logmel.n_mels, module.frames)
    return card.text(
        folder=folder.resolve().name,
        name=module.config.run.experiment_name or module.config.model.model,
        front_end=front_end,
        seconds=span_of_module(module).window / module.logmel.orig_sample_rate,
        complexity=complexity.measure(module.model, input_size, module.config.storage.weight_bits).as_dict(),
        training=module.origin,
        results=results,
        licence=licence,
    )


def main() -> None:
    config = parse(PublishConfig, __doc__)
    folders = publish(config)
    for folder in folders:
        print(f"{folder}/: config.json, {WEIGHTS}, README.md")
    print(f"predict with it: {command('python', '-m', 'dcase.predict', 'RECORDINGS', '--ckpt_path', config.out)}")


if __name__ == "__main__":
    run(main)
