"""The functions that the scripts of DCASE2025 Task 1 call: test_complexity.py and evaluate_submission.py.

`dcase.submit` puts a copy of this file into a package, as ``Doe_Uni_task1/Doe_Uni_task1_1.py``; its models are in
``ckpts/`` there, in the file of the same name. The functions are those of the challenge's README
(github.com/CPJKU/dcase2025_task1_inference). Its scripts also need the flag ``use_cuda`` and, of what `load_model`
returns, ``.model``, a module with all weights.
"""

from pathlib import Path

from torch import Tensor

from dcase.data.labels import SCENES
from dcase.submission import inference

CHECKPOINT = Path(__file__).parent / "ckpts" / f"{Path(__file__).stem}.ckpt"


def load_model(model_file_path: str | None = None) -> inference.Models:
    """Return all models, of the package's checkpoint or of another one."""
    return inference.load(model_file_path or CHECKPOINT)


def load_inputs(file_paths: list[str], device_ids: list[str], model: inference.Models) -> list[Tensor]:
    """Return each sound file's log-mel, (1, 1, n_mels, frames), which the models of all devices take."""
    return list(inference.load_inputs(model, file_paths).split(1)) if file_paths else []


def get_model_for_device(model: inference.Models, device_id: str) -> inference.StoredModel:
    """Return the device's own model; the general one for a device that has none, as "s4" or "unknown"."""
    return model.for_device(device_id)


def predict(
    file_paths: list[str],
    device_ids: list[str],
    model_file_path: str | None = None,
    use_cuda: bool = True,
    batch_size: int = 64,
) -> tuple[list[Tensor], list[str]]:
    """Return (logits (10,) of each sound file, in the files' order; the scenes in the order of the logits)."""
    model = load_model(model_file_path)
    return inference.predict(model, file_paths, device_ids, use_cuda, batch_size), list(SCENES)
