"""Send a mixed batch through the general model and device-specific models, with one forward pass per model."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dcase.data.labels import DEVICES


def forward_by_device(
    general: nn.Module, specific: Mapping[str, nn.Module], x: Tensor, device: Tensor, devices: Sequence[str] = DEVICES
) -> Tensor:
    """Send each clip of a batch through its device's model, or through the general model where its device has none.

    Args:
        general: x (b, ...) -> logits (b, n_classes).
        specific: device_id -> model of the same kind; may be empty.
        x: (b, 1, n_mels, frames).
        device: (b,), indices into ``devices``; any other number is an unknown device.

    Returns:
        logits (b, n_classes), in the order of the batch.
    """
    if not specific:
        return general(x)
    logits = None
    rest = device.new_ones(len(device)).bool()
    groups = [(device == devices.index(one), model) for one, model in specific.items() if one in devices]
    for mask, _ in groups:
        rest &= ~mask
    for mask, model in [*groups, (rest, general)]:
        index = mask.nonzero().squeeze(1)
        if len(index):
            part = model(x[index])
            logits = part.new_empty(len(x), part.shape[1]) if logits is None else logits
            logits[index] = part
    return logits
