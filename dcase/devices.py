"""Device-specific models beside the general one: a mixed batch costs one forward per model present."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dcase.errors import UserError
from dcase.labels import DEVICES


def forward_by_device(general: nn.Module, specific: Mapping[str, nn.Module], x: Tensor, device: Tensor) -> Tensor:
    """Send each clip of a batch through its device's model; a device without one uses the general model.

    Args:
        general: x (b, ...) -> logits (b, n_classes).
        specific: device_id -> model of the same kind; may be empty.
        x: (b, 1, n_mels, frames).
        device: (b,), indices into DEVICES; any other number is an unknown device.

    Returns:
        logits (b, n_classes), in the order of the batch.
    """
    if not specific:
        return general(x)
    logits = None
    rest = device.new_ones(len(device)).bool()
    groups = [(device == DEVICES.index(device_id), model) for device_id, model in specific.items()]
    for mask, _ in groups:
        rest &= ~mask
    for mask, model in [*groups, (rest, general)]:
        index = mask.nonzero().squeeze(1)
        if len(index):
            part = model(x[index])
            logits = part.new_empty(len(x), part.shape[1]) if logits is None else logits
            logits[index] = part
    return logits


def merged_checkpoint(checkpoints: Mapping[str, dict]) -> dict:
    """One checkpoint with the general model and all device-specific models of several, which are given by their names.

    Raises `UserError` where they are not of one general model, or where two hold a model for the same device.
    """
    (first_name, first), *others = checkpoints.items()
    merged = {**first, "state_dict": dict(first["state_dict"]), "device_ids": list(first["device_ids"])}
    general = {name: value for name, value in first["state_dict"].items() if not name.startswith("device_models.")}
    for name, checkpoint in others:
        state = checkpoint["state_dict"]
        if any(key not in state or not torch.equal(state[key], value) for key, value in general.items()):
            raise UserError(f"--ckpt_path: {first_name} and {name} are not of one general model (--ckpt_id)")
        twice = set(merged["device_ids"]) & set(checkpoint["device_ids"])
        if twice:
            raise UserError(f"--ckpt_path: {name} holds a model for device {min(twice)}, and so does one before it")
        merged["state_dict"] |= {key: value for key, value in state.items() if key.startswith("device_models.")}
        merged["device_ids"] += checkpoint["device_ids"]
    merged["device_ids"].sort(key=DEVICES.index)
    return merged
