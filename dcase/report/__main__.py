"""Make the page of a finished run again, or a page of several runs side by side.

    python -m dcase.report RUN_ID                      <project_name>/RUN_ID/report/index.html
    python -m dcase.report RUN_ID RUN_ID [RUN_ID ...]  <project_name>/comparison/RUN_ID_RUN_ID.html

It reads no checkpoint: only plain files of the runs' folders and, for pictures and sound, the recordings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dcase import cli, errors
from dcase.errors import UserError
from dcase.report.comparison import write_comparison
from dcase.report.page import write_page
from dcase.report.run_files import read_finished
from dcase.runs.folder import RunConfig, find_run


@dataclass(frozen=True)
class ReportConfig:
    run_ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """ids of finished runs; of several, the others are compared with the first"""
    project_name: str = RunConfig().project_name
    """folder that the runs are in"""
    dataset_dir: str | None = None
    """folder of the recordings; None: the one that the run was tested with"""
    report_audio: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """include the sound of the most confident mistakes; False: only pictures"""


def main() -> None:
    config = cli.parse(ReportConfig, __doc__)
    if not config.run_ids:
        raise UserError("which run? Give one id, or several to compare")
    if len(set(config.run_ids)) < len(config.run_ids):
        raise UserError(f"{' '.join(config.run_ids)} has a run twice: give each once")
    runs = [read_finished(find_run(config.project_name, run_id, "run").folder) for run_id in config.run_ids]
    folder = Path(config.dataset_dir).expanduser() if config.dataset_dir else None
    if len(runs) == 1:
        print(f"report: {write_page(runs[0], folder, config.report_audio)}")
    else:
        place = Path(config.project_name) / "comparison"
        print(f"report: {write_comparison(runs, place, folder, config.report_audio)}")


if __name__ == "__main__":
    errors.run(main)
