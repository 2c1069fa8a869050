"""What `dcase.doctor` finds out about one thing, and how it is shown."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dcase.errors import one_line


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "-", "warn", "FAIL"]
    """-: absent, and not needed; warn: training works without it; FAIL: training does not."""
    found: str
    fix: str = ""
    """Command that puts it right, or the page that tells how."""


def looked(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """Return a check's findings. A check that raises an error is a finding, too."""
    try:
        found = check()
    except Exception as error:  # anything may come of a broken installation or disk
        found = Finding(name, "FAIL", f"the check failed: {type(error).__name__}: {one_line(error)}")
    return found if isinstance(found, list) else [found]


def lines(findings: Sequence[Finding]) -> str:
    """Return a line per finding, wrapped to the terminal, and below it the command that fixes it."""
    wide = max(len(finding.name) for finding in findings)
    columns = max(60, min(160, shutil.get_terminal_size((120, 24)).columns))
    indent = " " * (wide + 8)
    shown = []
    for finding in findings:
        start = f"{finding.state:<4}  {finding.name:<{wide}}  "
        shown += textwrap.wrap(finding.found, columns, initial_indent=start, subsequent_indent=indent)
        if finding.fix:
            shown.append(f"{indent}fix: {finding.fix}")  # in one line: to be copied
    return "\n".join(shown)


def summary(findings: Sequence[Finding]) -> str:
    """Return the conclusion, a line."""
    failed = [finding.name for finding in findings if finding.state == "FAIL"]
    warned = [finding.name for finding in findings if finding.state == "warn"]
    if failed:
        return f"Put right before training: {', '.join(failed)}"
    return f"Training can start; these could be better: {', '.join(warned)}" if warned else "Everything works."
