"""What works on this machine, what does not, and the command that fixes it: ``python -m dcase.doctor``.

The exit code is 0 where all that training needs works, else 1. Training also works without a GPU, a W&B login or a
pack, so these are warnings.
"""

import logging
import sys

from dcase import errors
from dcase.doctor import machine
from dcase.doctor.findings import Finding, lines, looked, summary


def main() -> None:
    found = _looked_at({"Python": machine.python, "packages": machine.packages})
    _end_if_failed(found)  # flags cannot even be read
    try:
        from dcase.cli import parse
        from dcase.doctor.data import DoctorConfig, places
    except Exception:  # of a broken package: the next check names it
        _end_if_failed(found + looked("imports", machine.imports))
        raise
    config = parse(DoctorConfig, "What works on this machine, what does not, and the command that fixes it.")
    logging.getLogger("aum").setLevel(logging.ERROR)  # its warnings are findings below
    found += looked("imports", machine.imports)
    _end_if_failed(found)
    checks = {
        "GPU": machine.gpu,
        "C++ compiler": machine.cxx_compiler,
        "scan": machine.scan_backends,
        "W&B": machine.wandb_login,
    }
    _end([*found, *_looked_at(checks), *places(config)])


def _looked_at(checks: dict) -> list[Finding]:
    return [finding for name, check in checks.items() for finding in looked(name, check)]


def _end_if_failed(findings: list[Finding]) -> None:
    if any(finding.state == "FAIL" for finding in findings):
        _end(findings, "\nThe other checks run when this is put right.")


def _end(findings: list[Finding], more: str = "") -> None:
    print(f"{lines(findings)}\n\n{summary(findings)}{more}")
    sys.exit(int(any(finding.state == "FAIL" for finding in findings)))


if __name__ == "__main__":
    errors.run(main)
