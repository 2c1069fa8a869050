"""What each part of the recipe is worth: CP-Mobile and Audio Mamba in one house, over several seeds.

    python benchmarks/accuracy.py --dataset_dir DIR --dir_path RESPONSES --seeds 3 --append
    python benchmarks/accuracy.py --seeds 3                    # SynthTAU, with made-up responses

Every row is trained by the repository's own scripts on the same clips, with the same loader, front end, epochs and
seeds; rows differ in what their entry of ROWS says. Nothing is chosen on the test split: it is used once, at each run's
end, and a run's model is its last epoch's. A tenth of the training clips is held out in all rows alike, for the
decisions of stage 2. Interrupted, the same command goes on where it was: finished runs are kept in --out.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dcase import cli, errors, report  # noqa: E402
from dcase.data import synth  # noqa: E402
from dcase.data.tau22 import TRAIN_DEVICES  # noqa: E402
from dcase.errors import UserError  # noqa: E402
from dcase.files import replace_file  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"


@dataclass(frozen=True)
class AccuracyConfig:
    dataset_dir: str | None = None
    """Data folder in TAU22's layout; None: that of TAU22_DIR in the environment, else SynthTAU."""
    dir_path: str | None = None
    """Folder of device impulse responses for training, none of which may be of a device in the test split; without it
    and without --dataset_dir made-up ones (`python -m dcase.synth --responses`)."""
    seeds: int = 3
    """Seeds, and so runs of each row: 0, 1, ..."""
    n_epochs: int = 30
    """Epochs of every general model."""
    device_epochs: int = 12
    """Epochs of every device's model in stage 2."""
    rows: str = ""
    """Rows to run, by their names, with commas between them, and those that they need; "": all."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each with one thread."""
    out: str = "accuracy_runs"
    """Project folder of the runs."""
    append: bool = False
    """Add the tables to benchmarks/RESULTS.md."""


MASKS = "--freqm 16 --timem 8"
AUGMENTED = f"{MASKS} --mixstyle_p 0.4 --mixstyle_alpha 0.3 --dir_path {{dir_path}} --dir_p 0.4"
NANO = "--batch_size 16 --lr 0.005 --warmup_steps 200"
NANO_16 = f"--model aum_nano --weight_bits 16 {NANO}"
NANO_8 = f"--model aum_nano_8bit --weight_bits 8 --qat_epochs 8 {NANO}"
CP_MOBILE = "--model cp_mobile --weight_bits 16 --batch_size 16 --lr 0.005 --warmup_steps 200"
TEACHERS = ("cp_aug", "nano", "nano8")
TAUGHT = f"{AUGMENTED} --teacher {','.join(f'{{{name}}}' for name in TEACHERS)}"
DEVICE = "--ckpt_id {distilled} --batch_size 16 --warmup_steps 10 --mixstyle_p 0 --check_val_every_n_epoch 4"


@dataclass(frozen=True)
class Row:
    """A line of the table. ``args`` may name {dir_path}, and the runs of the rows in ``after`` with the same seed."""

    name: str
    label: str
    args: str
    after: tuple[str, ...] = ()
    script: str = "train_base.py"


ROWS = (
    Row(
        "cp",
        "CP-Mobile, the baseline's augmentation",
        f"{CP_MOBILE} --mixstyle_p 0.4 --mixstyle_alpha 0.3 --freqm 48 --timem 0",
    ),
    Row("cp_aug", "CP-Mobile, augmented as AuM-Nano", f"{CP_MOBILE} {AUGMENTED}"),
    Row("nano_plain", "AuM-Nano, 16-bit, neither MixStyle nor responses", f"{NANO_16} {MASKS} --mixstyle_p 0"),
    Row("nano", "AuM-Nano, 16-bit", f"{NANO_16} {AUGMENTED}"),
    Row("nano8", "AuM-Nano, 8-bit", f"{NANO_8} {AUGMENTED}"),
    Row(
        "nano8_as_32",
        "the same models in 32 bit",
        "--ckpt_path {nano8} --weight_bits 32",
        ("nano8",),
        "test_only.py",
    ),
    Row("distilled", "AuM-Nano, 16-bit, distilled", f"{NANO_16} {TAUGHT}", TEACHERS),
    Row("distilled8", "AuM-Nano, 8-bit, distilled", f"{NANO_8} {TAUGHT}", TEACHERS),
    Row(
        "pruned",
        "AuM-Nano, 16-bit, pruned from the 8-bit form",
        f"{NANO_16} {AUGMENTED} --init_from {{nano8}}",
        ("nano8",),
    ),
    Row(
        "device_full",
        "distilled 16-bit, one per device: all weights",
        f"{DEVICE} {MASKS} --finetune full --lr_choices 0.0003,0.001",
        ("distilled",),
        "train_device_specific.py",
    ),
    Row(
        "device_lora",
        "distilled 16-bit, one per device: low-rank",
        f"{DEVICE} {MASKS} --finetune lora --lr_choices 0.001,0.004",
        ("distilled",),
        "train_device_specific.py",
    ),
)
DEVICE_ROWS = tuple(row for row in ROWS if row.script == "train_device_specific.py")
ALL = {row.name: row for row in ROWS}


@dataclass
class Runs:
    """The runs there are: started, and kept in a ledger so that a later call finds them."""

    config: AccuracyConfig
    data: list[str]  # flags that say where the data are
    dir_path: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        return Path(self.config.out) / "accuracy.json"

    def read(self) -> dict[str, dict]:
        """ "row/seed" -> {"run", "flags" (those that decide its figures), "seconds" (over all attempts)}"""
        return json.loads(self.ledger.read_text()) if self.ledger.is_file() else {}

    def note(self, key: str, **values) -> None:
        with self.lock:
            ledger = self.read()
            ledger[key] = {**ledger.get(key, {}), **values}
            text = json.dumps(ledger, indent=1)
            replace_file(self.ledger, lambda beside: beside.write_text(text))

    def folder(self, name: str, seed: int) -> Path | None:
        run = self.read().get(f"{name}/{seed}", {}).get("run")
        return Path(self.config.out) / run if run else None

    def results(self, name: str, seed: int) -> dict | None:
        folder = self.folder(name, seed)
        path = folder and folder / "results.json"
        return json.loads(path.read_text()) if path and path.is_file() else None

    def flags(self, row: Row) -> str:
        """What, with the seed, decides the figures of a row."""
        config = self.config
        return f"{row.args} {self.data} {self.dir_path} {config.n_epochs} {config.device_epochs}"

    def refuse_others(self, jobs: list[tuple[Row, int]]) -> None:
        """Raise `UserError` where there are runs of these rows with other flags."""
        for row, seed in jobs:
            before = self.read().get(f"{row.name}/{seed}", {}).get("flags", self.flags(row))
            if before != self.flags(row):
                raise UserError(f"--out {self.config.out} has runs of {row.name} with other flags: give another --out")

    def train(self, row: Row, seed: int) -> None:
        """Run a row's script for a seed, or go on with it; its end is results.json."""
        key, folder = f"{row.name}/{seed}", self.folder(row.name, seed)
        needed = {name: self.folder(name, seed) for name in row.after}
        if row.script == "test_only.py":
            needed = {name: run / "checkpoints" / "best.ckpt" for name, run in needed.items()}
        else:
            needed = {name: run.name for name, run in needed.items()}
        args = row.args.format(dir_path=self.dir_path, **needed).split()
        if row.script == "train_base.py":
            epochs = ["--n_epochs", self.config.n_epochs, "--check_val_every_n_epoch", self.config.n_epochs]
            args += [*epochs, "--seed", seed, "--val_fraction", 0.1]
        elif row.script == "train_device_specific.py":
            args += ["--n_epochs", self.config.device_epochs, "--seed", seed]
        self.note(key, flags=self.flags(row))
        if folder and row.script != "test_only.py" and (folder / "config.json").is_file():
            args = ["--resume", folder.name]
        command = [sys.executable, ROOT / row.script, "--project_name", self.config.out, *self.data, *args]
        command += ["--wandb_mode", "disabled", "--num_workers", 0, "--accelerator", "auto"]
        begin, log = time.monotonic(), Path(self.config.out) / "logs" / f"{row.name}-{seed}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            self.processes.append(process)
            for line in process.stdout:
                file.write(line)
                file.flush()
                found = re.match(r"run (\w+): everything goes to", line)
                if found:
                    self.note(key, run=found[1])
        seconds = time.monotonic() - begin
        self.note(key, seconds=round(self.read().get(key, {}).get("seconds", 0) + seconds, 1))
        if process.wait() and not self.stopped.is_set():
            raise UserError(f"{row.script} of row {row.name}, seed {seed}, has failed: see {log}")


def main() -> None:
    config = cli.parse(AccuracyConfig, __doc__)
    rows = wanted(config.rows)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    runs = Runs(config, *data_flags(config))
    jobs = [(row, seed) for seed in range(config.seeds) for row in rows]
    runs.refuse_others(jobs)
    try:
        run_all(runs, jobs, config.jobs)
    except BaseException:
        runs.stopped.set()
        for process in runs.processes:
            process.terminate()
        raise
    text = tables(runs, rows, config)
    print(text)
    if config.append:
        content = RESULTS.read_text().rstrip() + "\n\n" + text + "\n"
        replace_file(RESULTS, lambda beside: beside.write_text(content))


def wanted(names: str) -> list[Row]:
    """The rows of these names, and those that they need before them."""
    unknown = set(filter(None, names.split(","))) - set(ALL)
    if unknown:
        raise UserError(f"--rows {names}: there is {','.join(ALL)}")
    needed, waiting = set(), [name for name in names.split(",") if name] or list(ALL)
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += ALL[name].after
    return [row for row in ALL.values() if row.name in needed]


def data_flags(config: AccuracyConfig) -> tuple[list[str], str]:
    """(flags that say where the data are, folder of responses)"""
    dataset_dir = config.dataset_dir or os.environ.get("TAU22_DIR")
    if dataset_dir and not config.dir_path:
        raise UserError("--dir_path is missing: a folder of device impulse responses, as MicIRP's")
    if config.dir_path:
        return ["--dataset_dir", dataset_dir] if dataset_dir else [], config.dir_path
    folder = Path(config.out) / "responses"
    if not folder.is_dir():
        synth.make_responses(folder)
    return [], str(folder)


def run_all(runs: Runs, jobs: list[tuple[Row, int]], at_a_time: int) -> None:
    """Run the jobs, each after those that it needs, as many at a time; those with results are not run again."""
    done = {(row.name, seed) for row, seed in jobs if runs.results(row.name, seed)}
    waiting = [(row, seed) for row, seed in jobs if (row.name, seed) not in done]
    running = {}
    with ThreadPoolExecutor(at_a_time) as pool:
        while waiting or running:
            ready = [(row, seed) for row, seed in waiting if all((name, seed) in done for name in row.after)]
            for row, seed in ready[: at_a_time - len(running)]:
                waiting.remove((row, seed))
                running[pool.submit(runs.train, row, seed)] = (row.name, seed)
                print(f"{time.strftime('%H:%M:%S')} {row.name}, seed {seed}", flush=True)
            time.sleep(0.5)
            for future in [future for future in running if future.done()]:
                done.add(running.pop(future))
                future.result()


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


def tables(runs: Runs, rows: list[Row], config: AccuracyConfig) -> str:
    """The results as Markdown: each row over the seeds, what the goals come to, and the gain per device."""
    found = {row.name: [runs.results(row.name, seed) for seed in range(config.seeds)] for row in rows}
    first = next(results for several in found.values() for results in several if results)
    header = ["Model", "Macro Avg. Acc.", "Real", "Seen", "Unseen", "Parameters", "Bytes", "MACs", "Minutes"]
    lines = []
    for row in rows:
        done = [results for results in found[row.name] if results]
        if done:
            complexity = done[0]["complexity"]
            ledger = runs.read()
            of_row = [
                ledger[f"{row.name}/{seed}"].get("seconds") for seed, results in enumerate(found[row.name]) if results
            ]
            seconds = [n for n in of_row if n is not None] or [math.nan]
            sizes = [f"{complexity[name]:,}" for name in ("params", "total_param_bytes", "macs")]
            accuracies = [_spread([_accuracy(results, name) for results in done]) for name in COLUMNS]
            lines.append([row.label, *accuracies, *sizes, f"{statistics.median(seconds) / 60:.1f}"])
    parts = [
        f"## {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {first['data']}: {config.n_epochs} epochs, "
        f"{config.seeds} seeds",
        f"`{' '.join(['python', 'benchmarks/accuracy.py', *sys.argv[1:]])}`, commit {_commit()}. Percent, mean ± "
        f"standard deviation over the seeds. {first['note']} It says nothing about TAU22. Minutes: of one run, test "
        "included, with one thread, others beside it.",
        report.markdown(header, lines),
        report.markdown(["Against the Goals", "Goal", "Mean Difference", "Each Seed"], list(_differences(found))),
    ]
    devices = list(_device_gains(found))
    if devices:
        parts.append(
            report.markdown(["One per Device, Points against General", *map(str.upper, TRAIN_DEVICES)], devices)
        )
    return "\n\n".join(parts)


COLUMNS = ("macro_avg_acc", "real", "seen", "unseen")


def _accuracy(results: dict, name: str) -> float:
    """In percent."""
    return 100 * (results[name] if name in results else results["device_group_acc"][name])


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _differences(found: dict[str, list[dict | None]]) -> Iterator[list[str]]:
    """Seed by seed, so that what a seed does to both cancels out."""
    for what, row, other, name, goal in GOALS:
        pairs = [pair for pair in zip(found.get(row, []), found.get(other, []), strict=False) if all(pair)]
        if pairs:
            points = [_accuracy(ours, name) - _accuracy(theirs, name) for ours, theirs in pairs]
            yield [what, "-" if goal is None else f"{goal:+.1f}", f"{statistics.mean(points):+.2f}", _signed(points)]


def _signed(points: list[float]) -> str:
    return ", ".join("-" if math.isnan(point) else f"{point:+.2f}" for point in points)


def _device_gains(found: dict[str, list[dict | None]]) -> Iterator[list[str]]:
    for row in DEVICE_ROWS:
        pairs = [pair for pair in zip(found.get(row.name, []), found.get(row.after[0], []), strict=False) if all(pair)]
        if pairs:
            gains = [
                [100 * (ours["device_acc"][d] - general["device_acc"][d]) for ours, general in pairs]
                for d in TRAIN_DEVICES
            ]
            yield [row.label, *(f"{statistics.mean(of_device):+.2f} ({_signed(of_device)})" for of_device in gains)]


def _commit() -> str:
    shown = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout.strip() or "unknown"


if __name__ == "__main__":
    errors.run(main)
