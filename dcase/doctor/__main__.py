"""What works on this machine, what does not, and the command that fixes it: ``python -m dcase.doctor``.

Exit code 0 where all that training needs works, 1 where something of it does not. A GPU, a W&B login, a pack: training
goes without them, slower or lonelier, and that is a warning.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from dcase import errors
from dcase.doctor import machine as machine_checks
from dcase.doctor.findings import Finding, lines, looked, summary


@dataclass(frozen=True)
class DoctorConfig:
    dataset_dir: str | None = None
    """TAU22 folder to look at; without it TAU22_DIR, and without that SynthTAU"""
    pack_dir: str | None = None
    """folder of the pack; without it pack/ in the data folder"""
    subset: int = 25
    """part of TAU22's training clips that is to be trained on: 5, 10, 25, 50 or 100 (percent)"""
    orig_sample_rate: int = 44100
    """the training scripts' --orig_sample_rate (Hz), for the pack"""
    sample_rate: int = 32000
    """the training scripts' --sample_rate (Hz), for the pack"""
    target_length: int | None = None
    """the training scripts' --target_length (frames): clips may then have several lengths"""
    project_name: str = "DCASE25_Task1"
    """folder that runs are to go to: is there space?"""

    def __post_init__(self):
        if self.subset not in (5, 10, 25, 50, 100):
            raise errors.UserError(f"--subset is 5, 10, 25, 50 or 100 (percent); got {self.subset}")


def installation() -> list[Finding]:
    """Python and the packages, before anything of them is imported."""
    return [
        *looked("Python", machine_checks.python),
        *looked("packages", machine_checks.packages),
        *looked("torch, torchaudio", machine_checks.torch_pair),
    ]


def machine() -> list[Finding]:
    return [
        *looked("GPU", machine_checks.gpu),
        *looked("C++ compiler", machine_checks.cxx_compiler),
        *looked("scan", machine_checks.scan_backends),
        *looked("W&B", machine_checks.wandb_login),
    ]


def places(config: DoctorConfig) -> list[Finding]:
    """Data, and space for runs and for what is made once per machine."""
    from aum.cache import cache_folder
    from dcase.data.pack import Rates
    from dcase.doctor.data import Data, data_folder

    rates = Rates(config.orig_sample_rate, config.sample_rate)
    data = Data(config.dataset_dir, config.pack_dir, rates, config.subset, config.target_length)
    runs = Path(config.project_name)
    return [
        *looked("data", lambda: data_folder(data)),
        *looked("disk: runs", lambda: machine_checks.disk("disk: runs", runs, f"df -h; du -sh {runs}")),
        *looked(
            "disk: cache",
            lambda: machine_checks.disk("disk: cache", cache_folder(), "export AUDIO_MAMBA_CACHE=/another/folder"),
        ),
    ]


def _failed(findings: list[Finding]) -> bool:
    return any(finding.state == "FAIL" for finding in findings)


def main() -> None:
    found = installation()
    if _failed(found):  # flags cannot even be read
        _end(found, "\nThe rest is looked at when this is put right.")
    from dcase.cli import parse

    config = parse(DoctorConfig, "What works on this machine, what does not, and the command that fixes it.")
    logging.getLogger("aum").setLevel(logging.ERROR)  # what it warns of is told below
    found += looked("imports", machine_checks.imports)
    if _failed(found):
        _end(found, "\nThe rest is looked at when this is put right.")
    _end([*found, *machine(), *places(config)])


def _end(findings: list[Finding], more: str = "") -> None:
    print(f"{lines(findings)}\n\n{summary(findings)}{more}")
    sys.exit(int(_failed(findings)))


if __name__ == "__main__":
    errors.run(main)
