"""Published models: folders that `aum.AudioMamba.from_pretrained` loads, and from which a test can be repeated.

    FOLDER/config.json, model.safetensors, README.md             one model
    FOLDER/general/..., FOLDER/a/..., ...                        the general model, and one of each tuned device

Under "front_end", config.json has the settings of the log-mel (`logmel.LogMelConfig`), ``orig_sample_rate``, ``mean``
and ``std`` of the training clips' log-mel, and the labels: ``scenes`` in the order of the logits, ``devices``,
``device_groups``. Under "run" in it is what else a checkpoint needs: the model's name and device, bits of its weights,
split and clips.
"""

import dataclasses
import math
from pathlib import Path

from torch import nn

import aum
from aum.hub import CONFIG, FRONT_END, WEIGHTS
from dcase.data.labels import Labels
from dcase.data.logmel import LogMelConfig
from dcase.errors import UserError
from dcase.model.named import ModelConfig
from dcase.runs.checkpoints import FORMAT
from dcase.runs.stored import GENERAL, checkpoint_of, header_of
from dcase.schema import checked


def front_end_of(checkpoint: dict, model_of: str) -> dict:
    """Return "front_end" of config.json. ``model_of``: a device, or "general"."""
    header = header_of(checkpoint, model_of, checkpoint["config"]["storage"]["weight_bits"])
    config, front_end = header["config"], header["front_end"]
    return config["logmel"] | {
        "orig_sample_rate": config["data"]["orig_sample_rate"],
        "mean": front_end["logmel.mean"],
        "std": front_end["logmel.std"],
        **Labels.from_plain(checkpoint, "the checkpoint").plain(),
        "run": {
            "model": config["model"]["model"],
            "model_of": model_of,
            "weight_bits": config["storage"]["weight_bits"],
            "split": config["split"],
            "clips_id": header["clips_id"],
        },
    }


def _header_of(front_end: dict, config: aum.AuMConfig) -> dict:
    """Return the header (`stored.header_of`) that a config.json stands for: the opposite of `front_end_of`.

    Raises KeyError, TypeError, ValueError or `UserError` for a front end that `front_end_of` does not make.
    """
    run = front_end["run"]
    front_end = {"batch_lengths": False} | front_end  # earlier models have no such entry
    logmel = {field.name: front_end[field.name] for field in dataclasses.fields(LogMelConfig)}
    logmel = checked(LogMelConfig, logmel, FRONT_END)
    mean, std, orig_sample_rate = (float(front_end[name]) for name in ("mean", "std", "orig_sample_rate"))
    if not (math.isfinite(mean) and 0 < std < math.inf and orig_sample_rate == int(orig_sample_rate)):
        raise ValueError("mean, std or orig_sample_rate is out of range")
    if logmel.n_mels != config.n_mels:
        raise ValueError(f"{logmel.n_mels} mel bins, and the model has {config.n_mels}")
    labels = Labels.from_plain(front_end, "its labels")
    if len(labels.scenes) != config.n_classes:
        raise ValueError(f"{len(labels.scenes)} scenes, and the model has {config.n_classes}")
    shape = {name: value for name, value in vars(config).items() if name in vars(ModelConfig())}
    return {
        "dcase_format": FORMAT,
        "config": {
            "model": shape | {"model": run["model"]},
            "logmel": dataclasses.asdict(logmel),
            "data": {"orig_sample_rate": int(orig_sample_rate)},
            "split": dict(run["split"]),
            "storage": {"weight_bits": run["weight_bits"]},
        },
        "frames": config.target_length,
        **labels.plain(),
        "clips_id": run["clips_id"],
        "clips_per_step": 0,  # it cannot be resumed
        "front_end": {"logmel.mean": mean, "logmel.std": std},
        "model": run["model_of"],
    }


def save_published(model: nn.Module, folder: Path, front_end: dict, card: str) -> None:
    """Write one model.

    Raises `UserError` where it is no Audio Mamba, where the folder holds something else or cannot be written.
    """
    if not isinstance(model, aum.AudioMamba):
        raise UserError(
            f"only an Audio Mamba can be published, not {front_end['run']['model']}: --weight_bits 16 or 8 stores any "
            "model as a file in <run>/stored/"
        )
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS).is_file():
            raise UserError(f"--out {folder} holds something else than a published model: give a new folder")
        model.save_pretrained(folder, front_end=front_end, card=card)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): check rights and space there") from error


def is_published(folder: Path) -> bool:
    """Return whether a folder is that of a published model, even a damaged one: not a run's, nor of stored models."""
    return any((part / WEIGHTS).is_file() for part in (folder, folder / GENERAL)) or (
        (folder / CONFIG).is_file() and not (folder / "checkpoints").is_dir()
    )


def parts_of(folder: Path) -> dict[str, Path]:
    """Return the folders of models in a folder, by name: the general model's first, whether it is there or not."""
    there = sorted(path for path in folder.glob("[!.]*") if (path / WEIGHTS).is_file() or (path / CONFIG).is_file())
    return {GENERAL: folder / GENERAL, **{path.name: path for path in there}}


def load_published(folder: Path) -> dict:
    """Return a checkpoint, as `load_checkpoint` does, of one published model or of those of all devices.

    A single model serves every device. Raises `UserError`, naming the file, where one is missing, damaged or of another
    program, or where the models are not of one run.
    """
    parts = {GENERAL: folder}
    if (folder / GENERAL).is_dir():
        parts = parts_of(folder)
    models = {}
    for name, part in parts.items():
        try:
            model = aum.AudioMamba.from_pretrained(part)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            header = _header_of(model.front_end, model.config)
        except (KeyError, TypeError, ValueError, OverflowError, UserError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f'{part / CONFIG} was not written by dcase.publish: under "{FRONT_END}", {reason}'
            ) from error
        models[name] = header, model.state_dict()
    return checkpoint_of(models, f"--ckpt_path {folder}")
