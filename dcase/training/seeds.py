"""``--seeds N``: run train_base.py once per seed, each in its own process and run; then mean and deviation.

    <project_name>/<series_id>.json    the flags, the runs, and at the end mean and deviation of their figures

``--resume SERIES_ID`` goes on with the seed and the epoch at which a series stopped; finished runs stay.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dcase.errors import UserError, one_line
from dcase.files import write_json
from dcase.machine import SIGNALS
from dcase.report import compare
from dcase.runs.config import BaseConfig, from_plain, parse_base, same_place, split_flags
from dcase.runs.folder import Run, RunConfig, new_id, resume_command
from dcase.training.pace import FURTHER_RUNS

SCRIPT = Path(__file__).resolve().parents[2] / "train_base.py"


@dataclass(frozen=True)
class Series:
    """Runs that differ only in their seed."""

    path: Path
    args: list[str]  # of train_base.py, for every seed
    runs: dict[int, str]  # seed -> run id

    def write(self, **more: object) -> None:
        write_json(self.path, {"args": self.args, "runs": {str(seed): id for seed, id in self.runs.items()}, **more})

    def run(self, seed: int) -> Run:
        return Run(self.path.parent / self.runs[seed])

    def is_finished(self, seed: int) -> bool:
        return (self.run(seed).folder / "results.json").is_file()


def train_each(description: str) -> bool:
    """Train every seed where --seeds asks for several or --resume for a series, and return whether one of them did.

    Ends the program with the exit code of the first seed that fails, and prints how to go on.
    """
    args = sys.argv[1:]
    series, further = _to_resume(args)
    series = series or _new(args, description)
    if series is None:
        return False
    project_name = str(series.path.parent)
    for i, (seed, run_id) in enumerate(series.runs.items(), 1):
        run = series.run(seed)
        if series.is_finished(seed):
            print(f"seed {seed}: run {run_id} is finished")
            continue
        print(f"\nseed {seed}, {i} of {len(series.runs)}: run {run_id}", flush=True)
        place = ["--project_name", project_name]
        begin = [*split_flags(series.args, "project_name")[1], *place, "--seed", str(seed), "--run_id", run_id]
        resume = ["--resume", run_id, *place]
        further_runs = sum(not series.is_finished(one) for one in series.runs) - 1
        environment = {"WANDB_RUN_GROUP": series.path.stem, **os.environ, FURTHER_RUNS: str(further_runs)}
        code = _run([*(resume if run.has_config() else begin), *further], environment)
        if code:
            how = resume_command(SCRIPT.name, series.path.stem, project_name)
            print(f"\nseed {seed} (run {run_id}) ended with exit code {code}; go on with: {how}", file=sys.stderr)
            sys.exit(code)
    _finish(series, project_name)
    return True


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise UserError(
            "--seeds starts each seed itself: under torchrun or srun give one seed at a time (--seed 0, ...), or "
            "--resume one run at a time"
        )


def _new(args: list[str], description: str) -> Series | None:
    given, rest = split_flags(args, "seeds", "seed", "run_id")
    if given["seeds"] in (None, "1"):
        return None
    _refuse_several_processes()
    config, _ = parse_base(description, args)  # bad flags are found now
    series_id, project = config.run.run_id or new_id(), Path(config.run.project_name)
    seeds = range(config.fit.seed, config.fit.seed + config.seeds)
    if len(f"{series_id}-{seeds[-1]}") > 64:
        raise UserError(f"--run_id {series_id} is too long: with the seed a run's id has at most 64 characters")
    path = project / f"{series_id}.json"
    if path.exists():
        raise UserError(f"--run_id {series_id}: {path} is there already: --resume it, or give another id")
    series = Series(path, rest, {seed: f"{series_id}-{seed}" for seed in seeds})
    series.write()
    print(f"{len(seeds)} seeds, runs {', '.join(series.runs.values())}; after an interruption: --resume {series_id}")
    return series


def _to_resume(args: list[str]) -> tuple[Series | None, list[str]]:
    """Return the series that --resume names, where there is one, and the flags to resume its runs with."""
    given, rest = split_flags(args, "resume", "project_name")
    series_id = given["resume"]
    path = Path(given["project_name"] or RunConfig.project_name) / f"{series_id}.json"
    if not series_id or Path(series_id).name != series_id or not path.is_file():
        return None, []
    _refuse_several_processes()
    try:
        saved = json.loads(path.read_text())
        runs = {int(seed): run_id for seed, run_id in saved["runs"].items()}
        return Series(path, list(saved["args"]), runs), rest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): --resume its runs, one at a time") from error


def _run(args: list[str], environment: dict[str, str]) -> int:
    """Run train_base.py, pass this process's signals on to it, and return its exit code."""
    # In its own process group: a terminal's Ctrl-C would reach it twice, which ends it without saving.
    child = subprocess.Popen([sys.executable, str(SCRIPT), *args], env=environment, process_group=0)

    def pass_on(number: int, frame) -> None:
        child.send_signal(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # as a shell returns it


def _finish(series: Series, project_name: str) -> None:
    """Write mean and deviation into the series' file, and print them."""
    finished, said = compare.read_all(project_name, list(series.runs.values()))
    if said:
        raise UserError(said[0])
    together = compare.Group(finished)
    figures = {}
    for name, place in (compare.figures_of([together]) | compare.details_of([together])).items():
        mean = together.mean(place)
        if mean is not None and name not in compare.COUNTS:
            figures[place] = {"mean": mean, "deviation": together.deviation(place)}
    series.write(figures=figures)
    print(f"\n{compare.report([together])}\n\nMean and deviation of all figures: {series.path}")
    place = same_place(from_plain(BaseConfig, series.run(min(series.runs)).read_config()))
    ids = " ".join(series.runs.values())
    if len(set(finished[0].devices) & set(finished[0].labels.train_devices)) < 2:
        return  # a model per device has nothing to add
    print(f"next: for run in {ids}; do python train_device_specific.py --ckpt_id $run {place}; done")
