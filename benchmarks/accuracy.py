"""Measure what each part of the recipe is worth: CP-Mobile, Audio Mamba and controls trained alike.

    python benchmarks/accuracy.py --seeds 3                    # SynthTAU, with made-up responses
    python benchmarks/accuracy.py --dataset_dir F1,F2,F3,F4 --dir_path RESPONSES --flags="--sample_rate 16000" --append

Several data folders are the folds of a cross-validation: every row is trained on each of them and tested on its test
clips. The repository's own scripts train all rows on the same clips, with the same loader, front end, epochs and seeds;
rows differ in the flags that ROWS lists. Nothing is chosen on the test clips: they are used once, at each run's end,
and a run's model is its last epoch's. A tenth of the training clips is held out in all rows, for stage 2's decisions.

A difference is paired: of the same test clips, fold by fold and seed by seed. Its 95 % interval is over the recording
locations of all folds, each drawn with all its clips and seeds; the spread of the seeds is told by each seed's own
difference. Finished runs are kept in --out: after an interruption the same command continues.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.timing import ROOT, commit, publish
from dcase import cli, errors, report
from dcase.data import synth
from dcase.data.labels import DEVICES, TRAIN_DEVICES
from dcase.data.logmel import LogMelConfig
from dcase.errors import UserError
from dcase.files import replace_file
from dcase.report.bootstrap import Estimate, Figures
from dcase.report.predictions import PREDICTIONS_CSV, Predictions, read_predictions


@dataclass(frozen=True)
class AccuracyConfig:
    dataset_dir: str | None = None
    """Data folder in TAU22's layout, or several, the folds of a cross-validation, with commas between them; None: that
    of TAU22_DIR in the environment, else SynthTAU."""
    dir_path: str | None = None
    """Folder of device impulse responses for training, none of them of a device in the test split. Without it and
    without a data folder, made-up ones are used (`python -m dcase.synth --responses`)."""
    flags: str = ""
    """Further flags of every row, as --flags="--sample_rate 16000 --n_fft 2048"."""
    teacher: str = ""
    """An outside teacher's logits for the rows that have one, as train_base.py's --teacher takes them; {fold} stands
    for the position of the data folder in --dataset_dir, from 1. "": these rows are left out."""
    seeds: int = 3
    """Number of seeds, and so of runs of each row: 0, 1, ..."""
    n_epochs: int = 30
    """Epochs of every general model."""
    device_epochs: int = 12
    """Epochs of every device's model in stage 2."""
    rows: str = ""
    """Names of the rows to run, with commas between them; the rows that they need run too. "": all."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each with one thread."""
    out: str = "accuracy_runs"
    """Folder of the runs, in a project folder for each data folder."""
    append: bool = False
    """Append the tables to benchmarks/RESULTS.md."""


MASKS = "--freqm 16 --timem 8"
AUGMENTED = f"{MASKS} --mixstyle_p 0.4 --mixstyle_alpha 0.3 --dir_path {{dir_path}} --dir_p 0.4"
RATES = "--batch_size 16 --lr 0.005 --warmup_steps 200"
COMMON = f"--weight_bits 16 {RATES} {AUGMENTED}"
ALIKE = "--mask_on log_mel --normalise True --gradient_clip_val 1"  # as AuM-Nano, whatever CP-Mobile's own defaults


@dataclass(frozen=True)
class Row:
    """A line of the table. ``args`` may name {dir_path}, {teacher}, {project}, {half_hop}, and the run of the row in
    ``after`` with the same fold and seed; they come after --flags."""

    name: str
    label: str
    args: str
    tried: int  # forms of the model and its recipe that were tried before, on other data: docs/aum_nano.md
    script: str = "train_base.py"
    after: str = ""

    @property
    def stage(self) -> int:
        return 1 + ROWS[self.after].stage if self.after else 0

    @property
    def trains(self) -> bool:
        return self.script != "test_only.py"

    @property
    def is_general(self) -> bool:
        return self.trains and not self.after


FINE = "--n_mels 128 --hop_length {half_hop} --freqm 8 --timem 16"  # twice the frames, half the mel bins: equal MACs
CONTROLS = "benchmarks/controls.py"
STAGE_2 = "train_device_specific.py"
ROWS = {row.name: row for row in (
    Row("cp", "CP-Mobile, the baseline's augmentation",
        f"--model cp_mobile --weight_bits 16 {RATES}", 3),
    Row("cp_aug", "CP-Mobile, augmented as AuM-Nano", f"--model cp_mobile {COMMON} {ALIKE}", 3),
    Row("cp_norm", "the same, with AuM-Nano's input norm", f"--model cp_mobile_norm {COMMON}", 3, CONTROLS),
    Row("nano", "AuM-Nano, 16-bit", f"--model aum_nano {COMMON}", 30),
    Row("nano_conv", "the same without a scan: gated convolutions", f"--model aum_nano_conv {COMMON}", 30, CONTROLS),
    Row("nano_fine", "AuM-Nano, rows of 33 tokens for 17", f"--model aum_nano {COMMON} {FINE}", 31),
    Row("nano_fine_conv", "the same without a scan", f"--model aum_nano_fine_conv {COMMON} {FINE}", 31, CONTROLS),
    Row("nano_states", "AuM-Nano, one set of weights for both directions, 16 states for 4",
        f"--model aum_nano --direction fo_bi --d_state 16 {COMMON}", 32),
    Row("nano8", "AuM-Nano, 8-bit",
        f"--model aum_nano_8bit --weight_bits 8 --qat_epochs 8 {RATES} {AUGMENTED}", 30),
    Row("nano8_as_32", "the same models in 32 bit",
        "--ckpt_path {project}/{after}/checkpoints/best.ckpt --weight_bits 32", 30, "test_only.py", "nano8"),
    Row("taught", "AuM-Nano, 16-bit, with an outside teacher's logits",
        f"--model aum_nano {COMMON} --teacher {{teacher}}", 30),
    Row("cross_fit", "AuM-Nano, 16-bit, with its own cross-fitted teachers",
        f"--model aum_nano {COMMON} --cross_fit 3", 30),
    Row("devices", "AuM-Nano, 16-bit, one model per device", "--ckpt_id {after}", 30, STAGE_2, "nano"),
    Row("devices_all", "the same, every device's own model used", "--ckpt_id {after} --keep all", 30, STAGE_2, "nano"),
)}  # fmt: skip
UNSEEN, KNOWN = ("group", "unseen"), ("known",)
ALL = ("macro_avg_acc",)
COLUMNS = {"Macro Avg. Acc.": ALL, "Known": KNOWN, "Unseen": UNSEEN}
GOALS = (  # what, a row, the row that it is compared with, figure, goal in points
    ("AuM-Nano against CP-Mobile, augmented alike", "nano", "cp_aug", ALL, 4.0),
    ("the same, unseen devices", "nano", "cp_aug", UNSEEN, 4.0),
    ("AuM-Nano against CP-Mobile with its input norm", "nano", "cp_norm", ALL, None),
    ("AuM-Nano against CP-Mobile, the baseline's augmentation", "nano", "cp", ALL, None),
    ("AuM-Nano against its control without a scan", "nano", "nano_conv", ALL, 1.0),
    ("rows of 33 tokens, with a scan against without", "nano_fine", "nano_fine_conv", ALL, 1.0),
    ("the same against AuM-Nano", "nano_fine", "nano", ALL, None),
    ("shared directions and 16 states against the control", "nano_states", "nano_conv", ALL, 1.0),
    ("the same against AuM-Nano", "nano_states", "nano", ALL, None),
    ("an outside teacher's logits against none", "taught", "nano", ALL, 3.0),
    ("own cross-fitted teachers against none", "cross_fit", "nano", ALL, 1.5),
    ("one model per device against general, known devices", "devices", "nano", KNOWN, 1.5),
    ("the same, every device's own model", "devices_all", "nano", KNOWN, None),
    ("AuM-Nano 8-bit against CP-Mobile, augmented alike", "nano8", "cp_aug", ALL, None),
    ("8-bit against 32-bit of the same model", "nano8", "nano8_as_32", ALL, -0.3),
)


@dataclass(frozen=True)
class Fold:
    """A data folder, and the project folder of its runs."""

    name: str
    project: Path
    data: list[str]  # flags
    teacher: str


class Pooled:
    """The predictions of one row for the test clips of all folds, from all seeds, and figures of them."""

    def __init__(self, parts: list[tuple[str, Predictions]]):
        """``parts``: (fold's name, predictions) of each fold and seed, in an order that is the same for every row."""
        ordered = [(fold, p.select(np.argsort(p.filenames, kind="stable"))) for fold, p in parts]
        self.filenames = np.concatenate([np.char.add(f"{fold}/", p.filenames) for fold, p in ordered])
        location = np.concatenate([np.char.add(f"{fold}/", p.location) for fold, p in ordered])
        columns = [np.concatenate([getattr(p, name) for _, p in ordered]) for name in ("scene", "device", "logits")]
        together = Predictions(self.filenames, *columns[:2], location, columns[2])
        is_known = together.device < len(TRAIN_DEVICES)  # a to s3 come first in DEVICES
        self.all, self.known = Figures(together), Figures(together.select(np.flatnonzero(is_known)))

    def _of(self, figure: tuple[str, ...]) -> tuple[Figures, tuple[str, ...]]:
        """Return where a figure is computed, and its name there; ("known",): the mean of the known devices."""
        return (self.known, ("device_avg_acc",)) if figure == KNOWN else (self.all, figure)

    def __call__(self, figure: tuple[str, ...]) -> Estimate:
        figures, name = self._of(figure)
        return figures(*name)

    def minus(self, other: "Pooled", figure: tuple[str, ...]) -> Estimate:
        if not np.array_equal(self.filenames, other.filenames):
            raise UserError("two rows were tested on different clips: give another --out")
        (ours, name), (theirs, _) = self._of(figure), other._of(figure)
        return ours.minus(theirs, *name)


@dataclass
class Runs:
    """The rows' runs: <project>/<row>-<seed>/, and <project>/logs/<row>-<seed>.json with "flags" and "seconds"."""

    config: AccuracyConfig
    folds: list[Fold]
    dir_path: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def note(self, row: Row, fold: Fold, seed: int) -> dict:
        """Return the flags that decide a run's figures, and its seconds over all attempts.

        Raises `UserError` where the run was begun with other flags.
        """
        path, config = log_of(row, fold, seed, "json"), self.config
        teacher = fold.teacher if "{teacher}" in row.args else ""
        flags = f"{row.args} {fold.data} {config.flags} {self.dir_path} {teacher} {config.n_epochs}"
        flags += f" {config.device_epochs}" if row.script == STAGE_2 else ""
        note = json.loads(path.read_text()) if path.is_file() else {"flags": flags, "seconds": 0}
        if note["flags"] != flags:
            raise UserError(f"{fold.project} has runs of {row.name} with other flags: give another --out")
        return note

    def train(self, row: Row, fold: Fold, seed: int) -> None:
        """Run a row's script for a fold and a seed, or continue it; at its end it writes results.json."""
        folder, note, config = folder_of(row, fold, seed), self.note(row, fold, seed), self.config
        given = shlex.split(config.flags)
        hop = dict(zip(given, given[1:], strict=False)).get("--hop_length", LogMelConfig.hop_length)
        words = {"dir_path": self.dir_path, "teacher": fold.teacher, "project": fold.project, "half_hop": int(hop) // 2}
        args = row.args.format(**words, after=f"{row.after}-{seed}").split()
        if row.trains:
            args += ["--n_epochs", config.n_epochs if row.is_general else config.device_epochs, "--seed", seed]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted test starts again
        if row.is_general:
            args = [*given, *args, "--check_val_every_n_epoch", config.n_epochs, "--val_fraction", 0.1]
        args = ["--resume", folder.name] if (folder / "config.json").is_file() else [*args, "--run_id", folder.name]
        command = [sys.executable, ROOT / row.script, "--project_name", fold.project, *fold.data, *args]
        command += ["--wandb_mode", "disabled", "--num_workers", 0, "--accelerator", "auto"]
        print(f"{time.strftime('%H:%M:%S')} {row.name}, {fold.name}, seed {seed}", flush=True)
        begin, log, path = time.monotonic(), log_of(row, fold, seed, "txt"), log_of(row, fold, seed, "json")
        replace_file(path, lambda beside: beside.write_text(json.dumps(note)))
        with open(log, "a") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
            self.processes.append(process)
            code = process.wait()
        note["seconds"] = round(note["seconds"] + time.monotonic() - begin, 1)
        replace_file(path, lambda beside: beside.write_text(json.dumps(note)))
        if code:
            raise UserError(f"{row.script} of row {row.name}, {fold.name}, seed {seed}, failed: see {log}")

    def run_all(self, rows: list[Row]) -> None:
        """Run the jobs that have no results yet, ``config.jobs`` at a time, a stage after those that it needs."""
        jobs = [(row, fold, seed) for seed in range(self.config.seeds) for fold in self.folds for row in rows]
        for job in jobs:
            log_of(*job, "txt").parent.mkdir(parents=True, exist_ok=True)
            self.note(*job)
        pool = ThreadPoolExecutor(self.config.jobs)
        try:
            for stage in sorted({row.stage for row in rows}):
                todo = [job for job in jobs if job[0].stage == stage and not results_of(*job)]
                for future in as_completed([pool.submit(self.train, *job) for job in todo]):
                    future.result()
        finally:  # after an error or Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in self.processes:
                process.terminate()

    def pooled(self, row: Row, seeds: Sequence[int] | None = None) -> Pooled:
        """Return a row's predictions of all folds, from all seeds or from these."""
        seeds = range(self.config.seeds) if seeds is None else seeds
        jobs = [(fold, seed) for fold in self.folds for seed in seeds]
        return Pooled([(f.name, read_predictions(folder_of(row, f, seed) / PREDICTIONS_CSV)) for f, seed in jobs])


def folder_of(row: Row, fold: Fold, seed: int) -> Path:
    return fold.project / f"{row.name}-{seed}"


def log_of(row: Row, fold: Fold, seed: int, ending: str) -> Path:
    return fold.project / "logs" / f"{row.name}-{seed}.{ending}"


def results_of(row: Row, fold: Fold, seed: int) -> dict | None:
    path = folder_of(row, fold, seed) / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def main() -> None:
    config = cli.parse(AccuracyConfig, __doc__)
    rows = wanted(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    runs = Runs(config, *folds_of(config))
    runs.run_all(rows)
    publish(tables(runs, rows), config.append)


def wanted(config: AccuracyConfig) -> list[Row]:
    """Return the rows of --rows, and those that they need before them."""
    names = [name for name in config.rows.split(",") if name]
    has_teacher = [name for name, row in ROWS.items() if "{teacher}" not in row.args or config.teacher]
    waiting, needed = names or has_teacher, set()
    while waiting:
        needed.add(name := waiting.pop())
        if name not in ROWS:
            raise UserError(f"--rows {config.rows}: there is {','.join(ROWS)}")
        if name not in has_teacher:
            raise UserError(f"--rows {name} needs --teacher")
        waiting += [ROWS[name].after] if ROWS[name].after else []
    return [row for row in ROWS.values() if row.name in needed]


def folds_of(config: AccuracyConfig) -> tuple[list[Fold], str]:
    """Return the data folders, and the folder of responses."""
    given = config.dataset_dir or os.environ.get("TAU22_DIR") or ""
    folders = [Path(folder).expanduser().absolute() for folder in given.split(",") if folder]
    if folders and not config.dir_path:
        raise UserError("--dir_path is missing: a folder of device impulse responses, as MicIRP's")
    if len({folder.name for folder in folders}) < len(folders):
        raise UserError(f"--dataset_dir {given}: the folders' own names must differ, since the runs' folders have them")
    out = Path(config.out)
    folds = [
        Fold(folder.name, out / folder.name, ["--dataset_dir", str(folder)], config.teacher.replace("{fold}", str(n)))
        for n, folder in enumerate(folders, start=1)
    ] or [Fold("synthtau", out / "synthtau", [], config.teacher)]
    responses = out / "responses"
    if not config.dir_path and not responses.is_dir():
        synth.make_responses(responses)
    return folds, config.dir_path or str(responses)


def points(estimate: Estimate) -> str:
    """Return a difference in points with its interval."""
    if estimate.low is None:
        return f"{100 * estimate.value:+.2f}"
    return f"{100 * estimate.value:+.2f} ({100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"


def tables(runs: Runs, rows: list[Row]) -> str:
    """Return the results as Markdown: each row, the differences against the goals, and the gain per device."""
    config, seeds = runs.config, range(runs.config.seeds)
    pooled = {row.name: runs.pooled(row) for row in rows}
    one_seed = {(row.name, seed): runs.pooled(row, [seed]) for row in rows for seed in seeds}
    lines, goals, devices = [], [], []
    for row in rows:
        jobs = [(row, fold, seed) for fold in runs.folds for seed in seeds]
        minutes = statistics.median(runs.note(*job)["seconds"] / 60 for job in jobs)
        complexity = results_of(*jobs[0])["complexity"]
        sizes = [f"{complexity[name]:,}" for name in ("params", "total_param_bytes", "macs")]
        accuracies = []
        for figure in COLUMNS.values():
            of_seeds = [100 * one_seed[row.name, seed](figure).value for seed in seeds]
            deviation = f" ± {statistics.stdev(of_seeds):.2f}" if len(of_seeds) > 1 else ""
            accuracies.append(f"{100 * pooled[row.name](figure).value:.2f}{deviation}")
        lines.append([row.label, *accuracies, *sizes, str(row.tried), f"{minutes:.1f}"])
    for what, row, other, figure, goal in GOALS:
        if row in pooled and other in pooled:
            of_seeds = [100 * one_seed[row, seed].minus(one_seed[other, seed], figure).value for seed in seeds]
            aim = "-" if goal is None else f"{goal:+.1f}"
            found = points(pooled[row].minus(pooled[other], figure))
            goals.append([what, aim, found, ", ".join(f"{value:+.2f}" for value in of_seeds)])
    for row in (row for row in rows if row.script == STAGE_2):
        gains = [pooled[row.name].minus(pooled[row.after], ("device", d)) for d in DEVICES if d in TRAIN_DEVICES]
        devices.append([row.label, *map(points, gains)])
    first = results_of(rows[0], runs.folds[0], 0)
    header = ["Model", *COLUMNS, "Parameters", "Bytes", "MACs", "Variants Tried", "Minutes"]
    tested = pooled[rows[0].name].all
    parts = [
        f"## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {first['data']}: {len(runs.folds)} test folds, "
        f"{config.n_epochs} epochs, {config.seeds} seeds",
        f"`{shlex.join(['python', 'benchmarks/accuracy.py', *sys.argv[1:]])}`, commit {commit()}. Percent, over the "
        f"test clips of all folds and seeds, of {len(tested.locations):,} recording locations; ± standard deviation "
        f"over the seeds. {first['note']} It says nothing about TAU22. Known: mean of the devices a to s3. Variants "
        "tried: forms of the model and its recipe, on other data, before its row was fixed. Minutes: of one run, test "
        "included, with one thread, other runs beside it.",
        report.markdown(header, lines),
        "Paired differences in points, with 95 % intervals over the recording locations:",
        report.markdown(["What", "Goal", "Difference", "Each Seed"], goals),
    ]
    if devices:
        header = ["One per Device, Points against General", *map(str.upper, TRAIN_DEVICES)]
        parts.append(report.markdown(header, devices))
    return "\n\n".join(parts)


if __name__ == "__main__":
    errors.run(main)
