"""Measure what each part of the recipe is worth: CP-Mobile and Audio Mamba trained alike, over several seeds.

    python benchmarks/accuracy.py --dataset_dir DIR --dir_path RESPONSES --seeds 3 --append
    python benchmarks/accuracy.py --seeds 3                    # SynthTAU, with made-up responses

The repository's own scripts train every row on the same clips, with the same loader, front end, epochs and seeds; rows
differ in the flags that ROWS lists. Nothing is chosen on the test split: it is used once, at each run's end, and a
run's model is its last epoch's. A tenth of the training clips is held out in all rows, for the decisions of stage 2.
Finished runs are kept in --out: after an interruption the same command continues.
"""

import json
import os
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

from benchmarks.timing import ROOT, commit, publish
from dcase import cli, errors, report
from dcase.data import synth
from dcase.data.tau22 import TRAIN_DEVICES
from dcase.errors import UserError
from dcase.files import replace_file


@dataclass(frozen=True)
class AccuracyConfig:
    dataset_dir: str | None = None
    """Data folder in TAU22's layout; None: that of TAU22_DIR in the environment, else SynthTAU."""
    dir_path: str | None = None
    """Folder of device impulse responses for training, none of them of a device in the test split. Without it and
    without a data folder, made-up ones are used (`python -m dcase.synth --responses`)."""
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
    """Project folder of the runs."""
    append: bool = False
    """Append the tables to benchmarks/RESULTS.md."""


MASKS = "--freqm 16 --timem 8"
AUGMENTED = f"{MASKS} --mixstyle_p 0.4 --mixstyle_alpha 0.3 --dir_path {{dir_path}} --dir_p 0.4"
RATES = "--batch_size 16 --lr 0.005 --warmup_steps 200"
CP_MOBILE = f"--model cp_mobile --weight_bits 16 {RATES} --mask_on log_mel --normalise True --gradient_clip_val 1"
NANO_16 = f"--model aum_nano --weight_bits 16 {RATES}"
NANO_8 = f"--model aum_nano_8bit --weight_bits 8 --qat_epochs 8 {RATES}"
TEACHERS = ("cp_aug", "nano", "nano8")
TAUGHT = f"{AUGMENTED} --teacher {','.join(f'{{{name}}}' for name in TEACHERS)}"
DEVICE = f"--ckpt_id {{distilled}} --batch_size 16 --warmup_steps 10 --mixstyle_p 0 --check_val_every_n_epoch 4 {MASKS}"


@dataclass(frozen=True)
class Row:
    """A line of the table. ``args`` may name {dir_path}, and the runs of the rows in ``after`` with the same seed."""

    name: str
    label: str
    args: str
    after: Sequence[str] = ()
    script: str = "train_base.py"

    @property
    def stage(self) -> int:
        return 1 + max((ROWS[name].stage for name in self.after), default=-1)


ROWS = {row.name: row for row in (
    Row("cp", "CP-Mobile, the baseline's augmentation",
        f"{CP_MOBILE} --mixstyle_p 0.4 --mixstyle_alpha 0.3 --freqm 48 --timem 0"),
    Row("cp_aug", "CP-Mobile, augmented as AuM-Nano", f"{CP_MOBILE} {AUGMENTED}"),
    Row("nano_plain", "AuM-Nano, 16-bit, neither MixStyle nor responses", f"{NANO_16} {MASKS} --mixstyle_p 0"),
    Row("nano", "AuM-Nano, 16-bit", f"{NANO_16} {AUGMENTED}"),
    Row("nano8", "AuM-Nano, 8-bit", f"{NANO_8} {AUGMENTED}"),
    Row("nano8_as_32", "the same models in 32 bit", "--ckpt_path {out}/{nano8}/checkpoints/best.ckpt --weight_bits 32",
        ["nano8"], "test_only.py"),
    Row("distilled", "AuM-Nano, 16-bit, distilled", f"{NANO_16} {TAUGHT}", TEACHERS),
    Row("distilled8", "AuM-Nano, 8-bit, distilled", f"{NANO_8} {TAUGHT}", TEACHERS),
    Row("pruned", "AuM-Nano, 16-bit, pruned from the 8-bit form", f"{NANO_16} {AUGMENTED} --init_from {{nano8}}",
        ["nano8"]),
    Row("device_full", "distilled 16-bit, one per device: all weights",
        f"{DEVICE} --finetune full --lr_choices 0.0003,0.001", ["distilled"], "train_device_specific.py"),
    Row("device_lora", "distilled 16-bit, one per device: low-rank",
        f"{DEVICE} --finetune lora --lr_choices 0.001,0.004", ["distilled"], "train_device_specific.py"),
)}  # fmt: skip
COLUMNS = ("macro_avg_acc", "real", "seen", "unseen")
GOALS = (  # what, a row, the row that it is compared with, group, goal in points
    ("AuM-Nano 16-bit against CP-Mobile, alike augmented", "nano", "cp_aug", "macro_avg_acc", 2.0),
    ("the same, unseen devices", "nano", "cp_aug", "unseen", 3.0),
    ("AuM-Nano 8-bit against CP-Mobile, alike augmented", "nano8", "cp_aug", "macro_avg_acc", 2.0),
    ("the same, unseen devices", "nano8", "cp_aug", "unseen", 3.0),
    ("distilled AuM-Nano 16-bit against CP-Mobile with the baseline's recipe", "distilled", "cp", "macro_avg_acc", 2.0),
    ("the same, unseen devices", "distilled", "cp", "unseen", 3.0),
    ("distilled against alone, 16-bit", "distilled", "nano", "macro_avg_acc", 1.5),
    ("distilled against alone, 8-bit", "distilled8", "nano8", "macro_avg_acc", 1.5),
    ("8-bit against 32-bit of the same model", "nano8", "nano8_as_32", "macro_avg_acc", -0.3),
    ("responses and Freq-MixStyle against neither, unseen devices", "nano", "nano_plain", "unseen", 5.0),
    ("one per device (full) against general, real devices", "device_full", "distilled", "real", 1.0),
    ("one per device (lora) against general, real devices", "device_lora", "distilled", "real", 1.0),
    ("pruned from the larger one against trained directly", "pruned", "nano", "macro_avg_acc", None),
)


@dataclass
class Runs:
    """The rows' runs in --out: <row>-<seed>/, and logs/<row>-<seed>.json with "flags" and "seconds"."""

    config: AccuracyConfig
    data: list[str]  # flags that say where the data are
    dir_path: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def folder(self, name: str, seed: int) -> Path:
        return Path(self.config.out) / f"{name}-{seed}"

    def note(self, row: Row, seed: int) -> dict:
        """Return the flags that decide a run's figures, and its seconds over all attempts.

        Raises `UserError` where the run was begun with other flags.
        """
        path = self.log(row.name, seed, "json")
        flags = f"{row.args} {self.data} {self.dir_path} {self.config.n_epochs} {self.config.device_epochs}"
        note = json.loads(path.read_text()) if path.is_file() else {"flags": flags, "seconds": 0}
        if note["flags"] != flags:
            raise UserError(f"--out {self.config.out} has runs of {row.name} with other flags: give another --out")
        return note

    def log(self, name: str, seed: int, ending: str) -> Path:
        return Path(self.config.out) / "logs" / f"{name}-{seed}.{ending}"

    def results(self, name: str, seed: int) -> dict | None:
        path = self.folder(name, seed) / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def train(self, row: Row, seed: int) -> None:
        """Run a row's script for a seed, or continue it; at its end it writes results.json."""
        folder, note, config = self.folder(row.name, seed), self.note(row, seed), self.config
        runs = {name: self.folder(name, seed).name for name in row.after}
        args = row.args.format(dir_path=self.dir_path, out=config.out, **runs).split()
        n_epochs = config.n_epochs if row.script == "train_base.py" else config.device_epochs
        if row.script == "test_only.py":
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted test starts again
        else:
            args += ["--n_epochs", n_epochs, "--seed", seed]
        if row.script == "train_base.py":
            args += ["--check_val_every_n_epoch", n_epochs, "--val_fraction", 0.1]
        args = ["--resume", folder.name] if (folder / "config.json").is_file() else [*args, "--run_id", folder.name]
        command = [sys.executable, ROOT / row.script, "--project_name", config.out, *self.data, *args]
        command += ["--wandb_mode", "disabled", "--num_workers", 0, "--accelerator", "auto"]
        print(f"{time.strftime('%H:%M:%S')} {row.name}, seed {seed}", flush=True)
        begin, log, path = time.monotonic(), self.log(row.name, seed, "txt"), self.log(row.name, seed, "json")
        replace_file(path, lambda beside: beside.write_text(json.dumps(note)))
        with open(log, "a") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
            self.processes.append(process)
            code = process.wait()
        note["seconds"] = round(note["seconds"] + time.monotonic() - begin, 1)
        replace_file(path, lambda beside: beside.write_text(json.dumps(note)))
        if code:
            raise UserError(f"{row.script} of row {row.name}, seed {seed}, failed: see {log}")

    def run_all(self, rows: list[Row]) -> None:
        """Run the jobs that have no results yet, ``config.jobs`` at a time, a stage after those that it needs."""
        jobs = [(row, seed) for row in rows for seed in range(self.config.seeds)]
        for job in jobs:
            self.note(*job)
        pool = ThreadPoolExecutor(self.config.jobs)
        try:
            for stage in sorted({row.stage for row in rows}):
                todo = [(row, n) for row, n in jobs if row.stage == stage and not self.results(row.name, n)]
                for future in as_completed([pool.submit(self.train, *job) for job in todo]):
                    future.result()
        finally:  # after an error or Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in self.processes:
                process.terminate()


def main() -> None:
    config = cli.parse(AccuracyConfig, __doc__)
    rows = wanted(config.rows)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    runs = Runs(config, *data_flags(config))
    runs.run_all(rows)
    publish(tables(runs, rows), config.append)


def wanted(names: str) -> list[Row]:
    """Return the rows of these names, and those that they need before them."""
    waiting, needed = [name for name in names.split(",") if name] or list(ROWS), set()
    while waiting:
        needed.add(name := waiting.pop())
        if name not in ROWS:
            raise UserError(f"--rows {names}: there is {','.join(ROWS)}")
        waiting += ROWS[name].after
    return [row for row in ROWS.values() if row.name in needed]


def data_flags(config: AccuracyConfig) -> tuple[list[str], str]:
    """Return the flags that say where the data are, and the folder of responses."""
    dataset_dir = config.dataset_dir or os.environ.get("TAU22_DIR")
    if dataset_dir and not config.dir_path:
        raise UserError("--dir_path is missing: a folder of device impulse responses, as MicIRP's")
    if config.dir_path:
        return ["--dataset_dir", dataset_dir] if dataset_dir else [], config.dir_path
    folder = Path(config.out) / "responses"
    if not folder.is_dir():
        synth.make_responses(folder)
    return [], str(folder)


def tables(runs: Runs, rows: list[Row]) -> str:
    """Return the results as Markdown: each row over the seeds, the goals, and the gain per device."""

    def percent(results: dict, name: str) -> float:
        return 100 * (results[name] if name in results else results["device_group_acc"][name])

    def signed(points: list[float]) -> str:
        return ", ".join(f"{point:+.2f}" for point in points)

    found = {row.name: [runs.results(row.name, seed) for seed in range(runs.config.seeds)] for row in rows}
    lines, goals, devices = [], [], []
    for row in rows:
        done = [results for results in found[row.name] if results]
        minutes = [runs.note(row, seed)["seconds"] / 60 for seed, results in enumerate(found[row.name]) if results]
        sizes = [f"{done[0]['complexity'][name]:,}" for name in ("params", "total_param_bytes", "macs")]
        accuracies = []
        for values in ([percent(results, name) for results in done] for name in COLUMNS):
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            accuracies.append(f"{statistics.mean(values):.2f}{deviation}")
        lines.append([row.label, *accuracies, *sizes, f"{statistics.median(minutes):.1f}"])
    for what, row, other, name, goal in GOALS:
        if row in found and other in found:  # seed by seed, so that a seed's effect on both cancels out
            pairs = zip(found[row], found[other], strict=True)
            points = [percent(ours, name) - percent(theirs, name) for ours, theirs in pairs]
            aim = "-" if goal is None else f"{goal:+.1f}"
            goals.append([what, aim, f"{statistics.mean(points):+.2f}", signed(points)])
    for row in (row for row in rows if row.script == "train_device_specific.py"):
        cells = []
        for d in TRAIN_DEVICES:
            pairs = zip(found[row.name], found["distilled"], strict=True)
            gains = [100 * (ours["device_acc"][d] - general["device_acc"][d]) for ours, general in pairs]
            cells.append(f"{statistics.mean(gains):+.2f} ({signed(gains)})")
        devices.append([row.label, *cells])
    config, first = runs.config, found[rows[0].name][0]
    header = ["Model", "Macro Avg. Acc.", "Real", "Seen", "Unseen", "Parameters", "Bytes", "MACs", "Minutes"]
    parts = [
        f"## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {first['data']}: {config.n_epochs} epochs, "
        f"{config.seeds} seeds",
        f"`{' '.join(['python', 'benchmarks/accuracy.py', *sys.argv[1:]])}`, commit {commit()}. Percent, mean ± "
        f"standard deviation over the seeds. {first['note']} It says nothing about TAU22. Minutes: of one run, test "
        "included, with one thread, other runs beside it.",
        report.markdown(header, lines),
        report.markdown(["Against the Goals", "Goal", "Mean Difference", "Each Seed"], goals),
    ]
    if devices:
        header = ["One per Device, Points against General", *map(str.upper, TRAIN_DEVICES)]
        parts.append(report.markdown(header, devices))
    return "\n\n".join(parts)


if __name__ == "__main__":
    errors.run(main)
