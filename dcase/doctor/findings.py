"""What `dcase.doctor` found out about one thing, and how it is shown."""

import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dcase.errors import one_line

STATES = ("ok", "-", "warn", "FAIL")


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "-", "warn", "FAIL"]
    """-: not there, and nothing lacks it; warn: training goes without it; FAIL: training does not."""
    found: str
    fix: str = ""
    """Command that puts it right, or the page that tells how."""


def looked(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What a check finds. A check that fails itself has found something wrong, too."""
    try:
        found = check()
    except Exception as error:  # of a broken installation or disk: whatever it is
        found = Finding(name, "FAIL", f"could not be looked at: {type(error).__name__}: {one_line(error)}")
    return found if isinstance(found, list) else [found]


def lines(findings: Iterable[Finding]) -> str:
    """A line per finding, wrapped to the terminal, and below it the command that fixes it."""
    findings = list(findings)
    wide = max(len(finding.name) for finding in findings)
    columns = max(60, min(160, shutil.get_terminal_size((120, 24)).columns))
    indent = " " * (wide + 8)
    shown = []
    for finding in findings:
        start = f"{finding.state:<4}  {finding.name:<{wide}}  "
        found = textwrap.wrap(finding.found, columns, initial_indent=start, subsequent_indent=indent)
        shown += found or [start.rstrip()]
        if finding.fix:
            shown.append(f"{indent}fix: {finding.fix}")  # in one line: to be copied
    return "\n".join(shown)


def summary(findings: Iterable[Finding]) -> str:
    """What it comes to, in a line."""
    findings = list(findings)
    failed = [finding.name for finding in findings if finding.state == "FAIL"]
    warned = [finding.name for finding in findings if finding.state == "warn"]
    if failed:
        return f"{len(failed)} of these must be put right before training: {', '.join(failed)}"
    if warned:
        return f"Training can start; it could do better with: {', '.join(warned)}"
    return "Everything works."
