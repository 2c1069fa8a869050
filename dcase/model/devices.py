"""Send a mixed batch through the general model and device-specific models, with one forward pass per model."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dcase.data.labels import DEVICES


def forward_by_device(
    general: nn.Module,
    specific: Mapping[str, nn.Module],
    x: Tensor,
    device: Tensor,
    devices: Sequence[str] = DEVICES,
    lengths: Tensor | None = None,
) -> Tensor:
    """Send each clip of a batch through its device's model, or through the general model where its device has none.

    Args:
        general: x (b, ...) -> logits (b, n_classes).
        specific: device_id -> model of the same kind; may be empty.
        x: (b, 1, n_mels, frames).
        device: (b,), indices into ``devices``; any other number is an unknown device.
        lengths: (b,), frames of each clip, for the models; None: all.

    Returns:
        logits (b, n_classes), in the order of the batch.
    """
    clips = (x,) if lengths is None else (x, lengths)
    if not specific:
        return general(*clips)
    logits = None
    rest = device.new_ones(len(device)).bool()
    groups = [(device == devices.index(one), model) for one, model in specific.items() if one in devices]
    for mask, _ in groups:
        rest &= ~mask
    for mask, model in [*groups, (rest, general)]:
        index = mask.nonzero().squeeze(1)
        if len(index):
            part = model(*(values[index.to(values.device)] for values in clips))
            logits = part.new_empty(len(x), part.shape[1]) if logits is None else logits
            logits[index] = part
    return logits
