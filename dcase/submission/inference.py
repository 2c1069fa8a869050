"""Scenes of recordings from trained models: what `dcase.submit` puts into the challenge's inference package.

    models = load("Doe_Uni_task1_1.ckpt")                 # of `save`: the general model and those of devices
    logits = predict(models, ["1.wav", "2.wav"], ["a", "unknown"])        # (10,) each, in the order of `SCENES`

It imports only what inference needs, so that the package, which holds copies of these files, needs neither Lightning
nor pandas nor this repository.

The models keep their weights as they are stored and counted, 16-bit numbers or int8 codes and scales, and calculate in
float32 with what these stand for: the logits equal those of `dcase.training.lit.SceneClassifier` with stored models.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import aum
from dcase.data.labels import DEVICES
from dcase.data.logmel import LogMel, LogMelConfig, frames_of
from dcase.data.sound import read_wav
from dcase.errors import UserError
from dcase.model.devices import forward_by_device
from dcase.model.named import ModelConfig, build
from dcase.model.quantisation import SCALE, decode, encode
from dcase.runs.stored import DEVICE_MODELS, FRONT_END, GENERAL, MODEL, header_of, load_model, save_model, weights_of

READERS = 8  # threads that read sound files


def save(checkpoint: dict, path: Path | str, bits: int) -> None:
    """Write a checkpoint's models, rounded to ``bits``, into one file. Raises as `save_model`."""
    shared = header_of(checkpoint, GENERAL, bits)
    config = shared["config"]
    header = {
        "model": config["model"],
        "logmel": config["logmel"],
        "orig_sample_rate": config["data"]["orig_sample_rate"],
        "frames": shared["frames"],
        "weight_bits": bits,
        "device_ids": checkpoint["device_ids"],
        "front_end": {name.removeprefix(FRONT_END): x for name, x in shared["front_end"].items()},
    }
    state = checkpoint["state_dict"]
    weights = {name: x for name, x in state.items() if name.startswith((MODEL, DEVICE_MODELS))}
    save_model(path, weights, bits, header)


def load(path: Path | str) -> "Models":
    """Return the models of a file that `save` has written. Raises `UserError`, naming the file, for any other."""
    weights, header = load_model(path)
    try:
        return Models(weights, header)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no models of a submission: build it again with python -m dcase.submit"
        ) from error


class Models(nn.Module):
    """The front end, the general model and those of devices, by the names "general", "a", "b", ..."""

    def __init__(self, weights: dict[str, Tensor], header: dict):
        super().__init__()
        # JSON turns tuples into lists.
        model = {name: tuple(x) if isinstance(x, list) else x for name, x in header["model"].items()}
        self.orig_sample_rate: int = header["orig_sample_rate"]  # Hz
        # A clip of another length than those of training is cut, or padded with silence.
        config = LogMelConfig(**header["logmel"] | {"target_length": header["frames"]})
        self.logmel = LogMel(config, self.orig_sample_rate)
        self.logmel.load_state_dict({name: torch.tensor(x) for name, x in header["front_end"].items()})
        self.shape = ModelConfig(**model)
        self.model = nn.ModuleDict()
        for name in (GENERAL, *header["device_ids"]):
            self.model[name] = StoredModel(self.untrained(), encode(weights_of(weights, name), header["weight_bits"]))
        self.eval()

    def untrained(self) -> nn.Module:
        """Return a model of the shape that all of them have, with untrained float32 weights."""
        return build(self.shape, self.logmel.config.n_mels, self.logmel.config.target_length)

    def for_device(self, device_id: str) -> "StoredModel":
        """Return the device's own model, or the general one for a device that has none, known or not."""
        return self.model[device_id if device_id in self.model else GENERAL]

    def forward(self, x: Tensor, device_ids: Sequence[str]) -> Tensor:
        """Return logits (b, n_classes) of log-mels (b, 1, n_mels, frames) of recordings on these devices."""
        device = [DEVICES.index(device_id) if device_id in DEVICES else -1 for device_id in device_ids]
        specific = {name: model for name, model in self.model.items() if name != GENERAL}
        return forward_by_device(self.model[GENERAL], specific, x, torch.tensor(device, device=x.device))


class StoredModel(nn.Module):
    """A model whose parameters are the stored tensors: counting their bytes by dtype counts those of the file."""

    def __init__(self, model: nn.Module, stored: dict[str, Tensor]):
        """``stored``, of `quantisation.encode`, replaces the weights of ``model``."""
        super().__init__()
        self.model = model
        codes = {name for name in stored if name + SCALE in stored}
        # Not in the layers: torchinfo multiplies all parameters of a layer by its outputs.
        self.scales = nn.ParameterDict({_key(name): _fixed(stored[name + SCALE]) for name in codes})
        self.names = [name for name in stored if name.removesuffix(SCALE) not in codes or name in codes]
        expected = [name for name, x in model.state_dict().items() if x.is_floating_point()]
        if set(self.names) != set(expected):
            raise KeyError(min(set(self.names) ^ set(expected)))
        for name in self.names:
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            old = getattr(layer, leaf)
            if old.shape != stored[name].shape:
                raise RuntimeError(f"{name} is {tuple(stored[name].shape)}, and in this model {tuple(old.shape)}")
            value = torch.empty_like(old, dtype=stored[name].dtype, requires_grad=False).copy_(stored[name])
            setattr(layer, leaf, _fixed(value) if isinstance(old, nn.Parameter) else value)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that the stored numbers stand for, float32, by the model's names."""
        state = self.model.state_dict()
        stored = {name: state[name] for name in self.names}
        for name in self.names:
            if _key(name) in self.scales:
                stored[name + SCALE] = self.scales[_key(name)].half()  # a checker's copy has them in float32
        return decode(stored)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, n_classes) of log-mels (b, 1, n_mels, frames)."""
        return functional_call(self.model, self.weights(), (x.float(),))


def load_inputs(models: Models, paths: Sequence[Path | str]) -> Tensor:
    """Return normalised log-mels (b, 1, n_mels, frames) of sound files, on the models' device.

    Files may have any sample rate, bit depth, number of channels and length. Raises `UserError`, naming the file, where
    one is missing, damaged, empty or shorter than a window of the front end.
    """
    config, rate = models.logmel.config, models.orig_sample_rate
    with ThreadPoolExecutor(READERS) as readers:
        waveforms = list(readers.map(lambda path: read_wav(Path(path), rate), paths))
    length = torch.tensor([waveform.shape[-1] for waveform in waveforms])
    for path, samples in zip(paths, length.tolist(), strict=True):
        try:
            frames_of(config, samples, rate)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    padded = pad_sequence([waveform.flatten() for waveform in waveforms], batch_first=True).unsqueeze(1)
    device = models.logmel.mean.device
    with torch.no_grad():
        return models.logmel(*models.logmel.resampled(padded.to(device), length.to(device)))


def predict(
    models: Models, paths: Sequence[Path | str], device_ids: Sequence[str], use_cuda: bool = True, batch_size: int = 64
) -> list[Tensor]:
    """Return the logits (n_classes,) of every recording, on the CPU. Raises as `load_inputs`.

    ``use_cuda``: calculate on a GPU where there is one.
    """
    if len(paths) != len(device_ids):
        raise UserError(f"{len(paths)} files and {len(device_ids)} device ids: give one for each")
    models.to("cuda" if use_cuda and torch.cuda.is_available() else "cpu")
    logits = []
    with torch.no_grad(), aum.use_backend(_scan_backend(models.logmel.mean.device)):
        for first in tqdm(range(0, len(paths), batch_size), desc="scenes", unit="batch"):
            batch = slice(first, first + batch_size)
            logits += models(load_inputs(models, paths[batch]), device_ids[batch]).cpu()
    return logits


def _scan_backend(device: torch.device) -> str:
    """Return the backend that a model would take there, or the plain one where that calculates wrongly."""
    try:
        return aum.self_test(device)
    except aum.SelfTestFailed as error:
        print(f"{error}: the plain PyTorch scan is used instead")
        return "torch"


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's attribute


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
