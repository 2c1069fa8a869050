"""A model as it is shared: a folder that `aum.AudioMamba.from_pretrained` loads, and from which a test can be repeated.

    FOLDER/config.json, model.safetensors, README.md             one model
    FOLDER/general/..., FOLDER/a/..., ...                        the general model, those of devices

Under "front_end", config.json has the settings of the log-mel (`logmel.LogMelConfig`), ``orig_sample_rate``, ``mean``
and ``std`` of the training clips' log-mel, ``scenes`` in the order of the logits, and under "run" what a checkpoint
needs beside these: the model's name and device, bits of its weights, split and clips.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

import aum
from aum.hub import CONFIG, FRONT_END, WEIGHTS
from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import DEVICES, SCENES
from dcase.errors import UserError
from dcase.model.named import ModelConfig
from dcase.runs.checkpoints import FORMAT, refuse_other_scenes
from dcase.runs.stored import DEVICE_MODELS, GENERAL, MODEL

_RUN = ("model", "model_of", "weight_bits", "split", "clips_id")


def front_end_of(checkpoint: dict, model_of: str) -> dict:
    """What config.json has under "front_end". ``model_of``: a device, or "general"."""
    config, state = checkpoint["config"], checkpoint["state_dict"]
    run = {
        "model": config["model"]["model"],
        "model_of": model_of,
        "weight_bits": config["storage"]["weight_bits"],
        "split": config["split"],
        "clips_id": checkpoint["clips_id"],
    }
    return config["logmel"] | {
        "orig_sample_rate": config["data"]["orig_sample_rate"],
        "mean": state["logmel.mean"].item(),
        "std": state["logmel.std"].item(),
        "scenes": list(SCENES),
        "run": run,
    }


def save_published(model: nn.Module, folder: Path, front_end: dict, card: str) -> None:
    """Write one model. Raises `UserError` where it is no Audio Mamba, where something else is in the folder, or where
    the folder cannot be written."""
    if not isinstance(model, aum.AudioMamba):
        raise UserError(
            f"only an Audio Mamba can be published, not {front_end['run']['model']}: --weight_bits 16 or 8 stores any "
            "model in a file of its own (<run>/stored/)"
        )
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS).is_file():
            raise UserError(f"--out {folder} holds something else than a published model: give a new folder")
        model.save_pretrained(folder, front_end=front_end, card=card)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): check rights and space there") from error


def is_published(folder: Path) -> bool:
    """Whether a folder is that of a published model, be it damaged: not of a run, nor of stored models."""
    return any((part / WEIGHTS).is_file() for part in (folder, folder / GENERAL)) or (
        (folder / CONFIG).is_file() and not (folder / "checkpoints").is_dir()
    )


def load_published(folder: Path) -> dict:
    """A checkpoint, as `runs.load_checkpoint` gives it, of a published model, or of those of all devices.

    A model alone is used for every device. Raises `UserError`, naming the file, where one is missing, damaged or
    another's, or where the models are not of one run.
    """
    if not (folder / GENERAL).is_dir():
        return _load(folder, MODEL)[0]
    checkpoint, first = _load(folder / GENERAL, MODEL)
    for device_id in DEVICES:
        part = folder / device_id
        if part.is_dir():
            of_device, front_end = _load(part, f"{DEVICE_MODELS}{device_id}.")
            if front_end != first | {"run": first["run"] | {"model_of": device_id}}:
                raise UserError(
                    f"--ckpt_path {folder}: {device_id}/ is of another run than {GENERAL}/, or of another device"
                )
            checkpoint["state_dict"] |= of_device["state_dict"]
            checkpoint["device_ids"].append(device_id)
    return checkpoint


def _load(folder: Path, start: str) -> tuple[dict, dict]:
    """(checkpoint with the model's weights under names that begin with ``start``, front end)."""
    try:
        model = aum.AudioMamba.from_pretrained(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    front_end, path = model.front_end, folder / CONFIG
    try:
        run = {name: front_end["run"][name] for name in _RUN}
        logmel = LogMelConfig(**{field.name: front_end[field.name] for field in dataclasses.fields(LogMelConfig)})
        mean, std, orig_sample_rate = (float(front_end[name]) for name in ("mean", "std", "orig_sample_rate"))
        if not (math.isfinite(mean) and 0 < std < math.inf and orig_sample_rate == int(orig_sample_rate)):
            raise ValueError("mean, std or orig_sample_rate is no such figure")
        if logmel.n_mels != model.config.n_mels:
            raise ValueError(f"{logmel.n_mels} mel bins, and the model has {model.config.n_mels}")
        scenes = front_end["scenes"]
        if not (isinstance(scenes, list) and all(isinstance(scene, str) for scene in scenes)):
            raise ValueError("scenes are no list of names")
        shape = {name: value for name, value in vars(model.config).items() if name in vars(ModelConfig())}
        checkpoint = {
            "dcase_format": FORMAT,
            "config": {
                "model": shape | {"model": run["model"]},
                "logmel": dataclasses.asdict(logmel),
                "data": {"orig_sample_rate": int(orig_sample_rate)},
                "split": dict(run["split"]),
                "storage": {"weight_bits": run["weight_bits"]},
            },
            "frames": model.config.target_length,
            "scenes": scenes,
            "clips_id": run["clips_id"],
            "clips_per_step": 0,  # it cannot be resumed
            "device_ids": [],
        }
    except (KeyError, TypeError, ValueError, UserError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f'{path} was not written by dcase.publish: under "{FRONT_END}", {reason}') from error
    refuse_other_scenes(scenes, f"published model {folder}")
    checkpoint["state_dict"] = {f"{start}{name}": value for name, value in model.state_dict().items()} | {
        "logmel.mean": torch.tensor(mean),
        "logmel.std": torch.tensor(std),
    }
    return checkpoint, front_end
