"""Save and share a model: a folder of three files, or a repository of the Hugging Face Hub with them.

    config.json         the fields of the model's configuration, and "front_end": the settings of its log-mels
    model.safetensors   the state dict, with a checksum over it in the header; reading it runs no code
    README.md           the model card

The files and the methods' names are those of huggingface_hub's PyTorchModelHubMixin, which can read such a folder too.
The mixin is not a base class, so that the backbone imports without that package: only repositories need it, and only
files need safetensors. Loading is stricter than the mixin's: every tensor must fit, and pickled weights are never read.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Self

import torch
from torch import Tensor

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FRONT_END = "front_end"  # in config.json
CHECKSUM = "crc32"  # in the header of the weights
DEFAULT_CARD = """---
library_name: audio_mamba
pipeline_tag: audio-classification
tags:
- audio-mamba
---

An Audio Mamba (arXiv:2406.03344) over log-mel patches: `aum.AudioMamba.from_pretrained` loads it.
"""


class Pretrained:
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, for a module whose only argument is a dataclass
    ``config``, kept under that name."""

    config_class: ClassVar[type]
    front_end: dict | None = None
    """Settings of the log-mels that the model was trained on. They are stored and never interpreted."""

    def save_pretrained(self, folder: Path | str, *, front_end: dict | None = None, card: str | None = None) -> None:
        """Write config.json, model.safetensors and README.md into ``folder``, which is made where it is missing.

        Args:
            front_end: plain values, for config.json; None: the model's own, if it was loaded with one.
            card: the text of README.md; None: a short one where there is none yet.

        Raises ValueError where JSON cannot hold ``front_end``, OSError where the folder cannot be written.
        """
        folder = Path(folder)
        content = dataclasses.asdict(self.config)
        front_end = self.front_end if front_end is None else front_end
        if front_end is not None:
            content[FRONT_END] = front_end
        try:
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"front_end is not made of plain values that JSON can hold ({error})") from error
        import safetensors.torch

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # a kill leaves no configuration beside another model's weights
        _replace(folder / WEIGHTS, safetensors.torch.save(state, {CHECKSUM: _checksum(state)}))
        if card is not None or not (folder / CARD).exists():
            _replace(folder / CARD, (DEFAULT_CARD if card is None else card).encode())
        _replace(folder / CONFIG, text.encode())

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        revision: str | None = None,
        cache_dir: Path | str | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides,
    ) -> Self:
        """The model of a folder that `save_pretrained` has written, in evaluation mode, on the CPU.

        Where there is no such folder, ``folder`` is a repository of the Hugging Face Hub, "user/name", and the other
        arguments are those of `huggingface_hub.snapshot_download`. A folder needs no network.

        ``overrides`` are fields of the configuration, as ``drop_path=0.1``; the weights must still fit.

        Raises ValueError, one line that names the file, where one is missing, damaged, another's or does not fit.
        """
        path = Path(folder)
        if not path.is_dir():
            options = {"revision": revision, "cache_dir": cache_dir, "token": token}
            options |= {"force_download": force_download, "local_files_only": local_files_only}
            path = _download(str(folder), options)
        config, front_end = _read_config(path / CONFIG, cls.config_class, overrides)
        model = cls(config)
        model.front_end = front_end
        state = _read_weights(path / WEIGHTS)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:300]
            raise ValueError(f"{path / WEIGHTS} does not fit {CONFIG} beside it: {reason}") from error
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload an Audio Mamba",
    ) -> str:
        """Save the model into the Hub's repository "user/name", which is made where it is missing; the commit's
        address. Needs huggingface_hub, a network, and ``token`` or an earlier ``hf auth login``."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _read_config(path: Path, kind: type, overrides: dict) -> tuple[object, dict | None]:
    """(configuration of that dataclass, front end) of a config.json. What other programs have put there is left out."""
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(overrides) - names:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    data = _read(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({_one_line(error)}): it is damaged or another program's") from error
    if not isinstance(content, dict) or not names & set(content):
        raise ValueError(f"{path} has no field of {kind.__name__}: it is another program's")
    values = {name: value for name, value in content.items() if name in names}
    try:
        return kind(**values | overrides), content.get(FRONT_END)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} makes no {kind.__name__}: {_one_line(error)}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    data = _read(path)
    try:
        state = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # safetensors.torch gives no metadata
    except Exception as error:  # a damaged file can make it raise anything
        raise ValueError(
            f"{path} cannot be read ({_one_line(error)}): it is cut short, damaged or no .safetensors file"
        ) from error
    checksum = _checksum(state)
    if (header.get("__metadata__") or {}).get(CHECKSUM, checksum) != checksum:
        raise ValueError(f"{path} is damaged: its checksum is not what was written; take another copy of it")
    return state


def _checksum(state: Mapping[str, Tensor]) -> str:
    """CRC-32, 8 hex digits, over every tensor's name, dtype, shape and bytes."""
    checksum = 0
    for name in sorted(state):
        value = state[name]
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def _download(name: str, options: dict) -> Path:
    """The folder of a repository's files in huggingface_hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name} is no folder here, and a repository of the Hugging Face Hub needs huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **options))
    except Exception as error:  # no such name, no such repository, no right to it, no network
        raise ValueError(
            f"{name} is no folder here, and could not be had from the Hugging Face Hub ({_one_line(error)})"
        ) from error


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")  # a FIFO may wait for ever
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def _replace(path: Path, data: bytes) -> None:
    """Write beside and rename: a kill leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
