"""Checkpoints with models of devices, as stage 2 would leave them, and the sizes of stored files."""

from pathlib import Path

from dcase.runs.checkpoints import load_checkpoint


def with_device_models(path: Path, factors: dict[str, float], bits: int = 32) -> dict:
    """Return a general model's checkpoint with a model for each device: the general weights times the device's factor.

    ``bits`` becomes its --weight_bits.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint["state_dict"]
    general = {name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")}
    own = {f"device_models.{device}.{name}": f * x for device, f in factors.items() for name, x in general.items()}
    config = checkpoint["config"] | {"storage": {"weight_bits": bits}}
    return checkpoint | {"state_dict": state | own, "device_ids": [*factors], "config": config}


def file_sizes(path: Path) -> tuple[int, int]:
    """Return (bytes of a stored model's header and of its length, bytes of its tensors): together the file's size."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    return header, len(data) - header
