"""Check a submission to DCASE2025 Task 1 before you hand it in: one line per problem, and exit code 1 if there is one.

    python -m dcase.validate_submission --folder submissions/Doe_Uni --eval_dir /data/TAU25_eval

The package is imported and called as the challenge's scripts do, in a separate process that sees nothing of this
project. The limits apply to our own count of bytes and MACs as well as to the challenge's.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcase import complexity
from dcase.cli import parse
from dcase.data.labels import SCENES
from dcase.data.tau22 import TEST_CLIPS
from dcase.errors import UserError, run
from dcase.model.quantisation import bytes_by_dtype
from dcase.submission import inference, probe
from dcase.submission.meta_check import check_meta
from dcase.submission.output import check_output, evaluation_list
from dcase.submission.package import MAX_INDEX, Submission

COUNTED = ("float32", "float16", "bfloat16", "int8", "uint8", "int32")  # dtypes that the challenge counts
LIMITS = {"bytes": complexity.MAX_PARAMS_MEMORY, "macs": complexity.MAX_MACS}


@dataclass(frozen=True)
class ValidateConfig:
    folder: str = ""
    """The submission's folder, as submissions/Doe_Uni."""
    eval_dir: str | None = None
    """The challenge's evaluation set, to check output.csv against its list; None: check only the form of output.csv."""


def main() -> None:
    config = parse(ValidateConfig, __doc__)
    if not config.folder:
        raise UserError("--folder is missing: give the submission's folder, as submissions/Doe_Uni")
    problems = check_folder(Path(config.folder), Path(config.eval_dir).expanduser() if config.eval_dir else None)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems: not ready to be handed in")
        sys.exit(1)
    names = "" if config.eval_dir else " (the names in output.csv are unchecked: give --eval_dir)"
    print(f"{config.folder}: no problem found{names}")


def check_folder(folder: Path, eval_dir: Path | None = None) -> list[str]:
    """Return all problems of a submission, a line each. Raises `UserError` where the folder holds no submission."""
    systems = find_systems(folder)
    listed = evaluation_list(eval_dir)["filename"].tolist() if eval_dir else None
    problems = _check_resources(systems[0])
    for system in systems:
        problems += check_package(system)
        problems += check_meta(system)
        if system.output.is_file():
            problems += check_output(system.output, listed)
        else:
            problems.append(f"{system.output} is missing: make it with python -m dcase.submit --eval_dir")
    return problems


def find_systems(folder: Path) -> list[Submission]:
    """Return the systems of a submission's folder, in order. Raises `UserError` where there is none."""
    found = []
    for path in sorted(folder.glob("*_task1/*_task1_*.py")):
        match = re.fullmatch(r"(.+)_task1_(\d+)", path.stem)
        if match and path.parent.name == f"{match[1]}_task1":
            found.append(Submission(folder, match[1], int(match[2])))
    if not found:
        raise UserError(
            f"--folder {folder}: no package Name_Inst_task1/ with Name_Inst_task1_1.py (to _{MAX_INDEX}) in it"
        )
    return found


def check_package(system: Submission) -> list[str]:
    """Return the problems of the package's files and of what its functions give."""
    if not system.checkpoint.is_file():
        return [f"{system.checkpoint} is missing: build the package again with python -m dcase.submit"]
    command = [sys.executable, "-I", probe.__file__, system.folder.resolve(), system.name, system.index]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"{system.api}: Python ends with exit code {done.returncode} while its functions are called: {last}"]
    found = json.loads(done.stdout.splitlines()[-1])
    if "failed" in found:
        return [f"{system.api}: {found['failed']} fails: {found['error']}"]
    return [f"{system.api}: {problem}" for problem in problems_of_api(found)] + _of_costs(system)


def problems_of_api(found: dict) -> list[str]:
    """Return the problems of what `probe` found."""
    problems = []
    if not found["n_weights"]:
        problems.append(".model of what load_model gives has no weights")
    inputs = found["input_shapes"]
    if len(inputs) != len(probe.DEVICE_IDS) or any(len(shape) != 4 or shape[:2] != [1, 1] for shape in inputs):
        shapes = sorted(set(map(tuple, inputs)))
        problems.append(f"load_inputs gives {shapes}, not a tensor (1, 1, n_mels, frames) for each file")
    if unknown := sorted(set(found["dtypes"]) - set(COUNTED)):
        problems.append(f"parameters are {', '.join(unknown)}, which the challenge cannot count")
    for what, limit in LIMITS.items():
        if over := [device_id for device_id, n in found[what].items() if n > limit]:
            problems.append(
                f"by the challenge's count the model of {', '.join(over)} has {found[what][over[0]]:,} {what}, and "
                f"{limit:,} are allowed"
            )
    if found["class_order"] != list(SCENES):
        problems.append(f"predict's class order is {found['class_order']}, not {list(SCENES)}")
    logits, expected = found["logits"], found["expected"]
    if len(logits) != len(expected) or any(len(x) != len(SCENES) for x in logits):
        problems.append(f"predict does not give {len(SCENES)} logits for each of {len(expected)} files")
    elif not np.isfinite(logits).all():
        problems.append("predict gives logits that are not finite")
    elif not np.allclose(logits, expected, rtol=0.01, atol=0.01):
        problems.append("predict gives other logits than the models of get_model_for_device: is the order the files'?")
    return problems


def _of_costs(system: Submission) -> list[str]:
    """Return the models over a limit by our own count: all stored bytes, and MACs with every token and the scan."""
    try:
        models = inference.load(system.checkpoint)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, model in models.model.items():
        stored = sum(n for dtype, n in bytes_by_dtype(model.state_dict()).items() if dtype != "int64")
        if stored > LIMITS["bytes"]:
            problems.append(
                f"{system.checkpoint}: the model of {name} takes {stored:,} B, and {LIMITS['bytes']:,} are allowed: "
                "store it in fewer bits (--weight_bits)"
            )
    logmel = models.logmel.config
    macs = sum(complexity.macs_by_part(models.untrained(), (1, 1, logmel.n_mels, logmel.target_length)).values())
    if macs > LIMITS["macs"]:
        problems.append(
            f"{system.checkpoint}: a model takes {macs:,} MACs with every token and the scan, and "
            f"{LIMITS['macs']:,} are allowed: take a smaller one"
        )
    return problems


def _check_resources(system: Submission) -> list[str]:
    dummy, listed = system.resources / "dummy.wav", system.resources / "test.csv"
    if missing := [path for path in (dummy, listed) if not path.is_file()]:
        return [f"{path} is missing: build the package again with python -m dcase.submit" for path in missing]
    n = len(listed.read_text().split("\n")) - 2  # header and last line's end
    if n == TEST_CLIPS:
        return []
    return [
        f"{listed} lists {n} clips, and TAU22's test split has {TEST_CLIPS}: build the package with --dataset_dir TAU22"
    ]


if __name__ == "__main__":
    run(main)
