"""Runs side by side on the terminal: ``python -m dcase.compare RUN_ID RUN_ID ... --project_name P``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dcase.cli import parse
from dcase.errors import UserError, run
from dcase.report.compare import grouped, in_order, read_all, report, write_csv


@dataclass(frozen=True)
class CompareConfig:
    run_ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """ids of the runs to compare, as the scripts print them"""
    project_name: str = "DCASE25_Task1"
    """folder of the runs"""
    all: bool = False
    """compare every run of the project that has been tested"""
    sort: Literal["given", "name", "macro_avg_acc", "real", "seen", "unseen", "size", "macs"] = "given"
    """order of the lines, the best first; given: the order of the ids, or with --all the oldest run first"""
    csv: str | None = None
    """file for a line per run with all figures and the flags that differ"""

    def __post_init__(self):
        if self.all == bool(self.run_ids):
            raise UserError("which runs? Give their ids, or --all (not both)")


def main() -> None:
    config = parse(CompareConfig, "Runs side by side: accuracies, sizes, and the flags that differ.")
    run_ids = config.run_ids
    if config.all:
        # A run's config.json is written once, when it begins. Sorting by name first keeps ties in order.
        configs = sorted(Path(config.project_name).glob("*/config.json"))
        run_ids = [path.parent.name for path in sorted(configs, key=lambda path: path.stat().st_mtime_ns)]
        if not run_ids:
            raise UserError(f"no run in {config.project_name}/: check --project_name")
    finished, said = read_all(config.project_name, run_ids)
    if said:
        print("\n".join([*said, ""]))
    if not finished:
        raise UserError(f"none of these {len(run_ids)} runs has results to compare")
    groups = in_order(grouped(finished), config.sort)
    print(report(groups))
    if config.csv:
        write_csv(groups, Path(config.csv))
        print(f"\nwritten: {config.csv}")
    if said and not config.all:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
