"""Make the inference package, the outputs and the meta.yaml of a submission to DCASE2025 Task 1.

    python -m dcase.submit --ckpt_path DCASE25_Task1/RUN_ID/stored --label Doe_Uni --dataset_dir /data/TAU22 \\
        --eval_dir /data/TAU25_eval
    python -m dcase.validate_submission --folder submissions/Doe_Uni --eval_dir /data/TAU25_eval

Everything goes into submissions/Doe_Uni/ (`dcase.submission.package` lists the files). Up to four systems share it:
--index 2 adds the second.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dcase import complexity
from dcase.cli import parse
from dcase.data.labels import SCENES, Labels
from dcase.data.loading import Source, find_source
from dcase.data.tau22 import DataConfig, missing_files
from dcase.errors import UserError, command, run
from dcase.runs.config import EvalConfig, find_dataset_dir, from_plain
from dcase.runs.folder import run_of
from dcase.runs.trained import load_trained
from dcase.submission import inference
from dcase.submission import meta as meta_yaml
from dcase.submission.output import evaluation_list, write_output
from dcase.submission.package import Submission, write_package
from dcase.training import evaluation
from dcase.training.lit import SceneClassifier

CHALLENGE_SUBSET = 25  # percent of TAU22's training split: the only part that the challenge allows


@dataclass(frozen=True)
class SubmitConfig:
    ckpt_path: str = ""
    """Trained models: the folder stored/ of a run, or a checkpoint of a run with --weight_bits 16 or 8."""
    label: str = ""
    """Name of the team: the corresponding author's last name and the institute's abbreviation, as Doe_Uni."""
    index: int = 1
    """Number of the system, 1 to 4."""
    out: str = "submissions"
    """Folder in which to make the submission's folder."""
    dataset_dir: str | None = None
    """TAU22 folder, for the test list in the package and a trial output; None: TAU22_DIR, else the folder that the
    checkpoint's run was given, else SynthTAU."""
    eval_dir: str | None = None
    """The challenge's evaluation set: evaluation_setup/fold1_test.csv and audio/. None: make a trial output of the
    development set's test split, output_development.csv."""
    authors: str | None = None
    """YAML or JSON file with a list of authors for meta.yaml."""
    batch_size: int = 64
    """Recordings in a batch."""


def main() -> None:
    config = parse(SubmitConfig, __doc__)
    if not config.ckpt_path:
        raise UserError("--ckpt_path is missing: give a run's folder stored/, as <project_name>/<run_id>/stored")
    submission = Submission(Path(config.out) / config.label, config.label, config.index)
    authors = meta_yaml.read_authors(Path(config.authors)) if config.authors else []
    checkpoint, cost = trained(config.ckpt_path)
    if checkpoint["config"]["split"]["subset"] != CHALLENGE_SUBSET:
        print(f"WARNING: trained on --subset {checkpoint['config']['split']['subset']}: the challenge allows only 25")
    source = find_source(DataConfig(dataset_dir=find_dataset_dir(config.dataset_dir, checkpoint, config.ckpt_path)))
    output, recordings = to_predict(config, submission, source)
    write_package(submission, checkpoint, source.folder / "split_setup" / "test.csv")
    print(f"package: {submission.package}, to be installed with: {command('pip', 'install', submission.folder)}")
    found = run_of(config.ckpt_path)
    runs = found.lineage() if found else []
    meta = meta_yaml.meta_of(submission.system, checkpoint, runs, cost, authors)
    meta_yaml.write_meta(meta_yaml.keep_filled_in(meta, submission.meta), submission.meta)
    print(f"meta data: {submission.meta}")
    if recordings:
        names, paths, device_ids = zip(*recordings, strict=True)
        models = inference.load(submission.checkpoint)
        logits = inference.predict(models, paths, device_ids, batch_size=config.batch_size)
        write_output(output, names, torch.stack(logits))
        print(f"output: {output}")
    heard = ["--eval_dir", config.eval_dir] if config.eval_dir else []
    check = command("python", "-m", "dcase.validate_submission", "--folder", submission.folder, *heard)
    print(f"check all of it: {check}")


def to_predict(
    config: SubmitConfig, submission: Submission, source: Source
) -> tuple[Path, list[tuple[str, Path, str]]]:
    """Return (output file, recordings as (name in the list, file, device id)) of --eval_dir or of the trial.

    Raises `UserError` where recordings of --eval_dir are missing; where the trial's are, there is no trial.
    """
    if config.eval_dir:
        folder = Path(config.eval_dir).expanduser()
        names, device_ids = evaluation_list(folder).T.values.tolist()
    else:
        folder, clips = source.folder, source.test
        names, device_ids = [clips.name(i) for i in range(len(clips))], [clips.labels.devices[i] for i in clips.device]
    if missing := missing_files(folder, names):
        lost = f"{len(missing)} of {len(names)} recordings are missing in {folder}, as {missing[0]}"
        if config.eval_dir:
            raise UserError(f"--eval_dir: {lost}")
        print(f"no --eval_dir, and no trial on the development set's test split either: {lost}")
        return submission.trial_output, []
    if not config.eval_dir:
        print("no --eval_dir: this is a trial on the development set's test split, whose output cannot be handed in")
    paths = [folder / name for name in names]
    output = submission.output if config.eval_dir else submission.trial_output
    return output, list(zip(names, paths, device_ids, strict=True))


def trained(path: str) -> tuple[dict, complexity.Complexity]:
    """Return (checkpoint of what --ckpt_path names, cost of one of its models as stored: all have one shape).

    Raises `UserError` as `load_trained`, and where a model is over a limit.
    """
    checkpoint = load_trained(path)
    if Labels.from_plain(checkpoint, path).scenes != SCENES:
        raise UserError(f"--ckpt_path {path}: the challenge is about TAU22's ten scenes, and this model has others")
    config = from_plain(EvalConfig, checkpoint["config"])
    if config.logmel.batch_lengths:
        raise UserError(f"--ckpt_path {path}: the challenge's clips have one length: train without --batch_lengths")
    module = SceneClassifier.from_checkpoint(checkpoint, config)
    cost = evaluation.measure(module)
    if not cost.memory_within_limit:
        fits = [bits for bits, n in cost.bytes_in_bits.items() if n <= complexity.MAX_PARAMS_MEMORY]
        way = "take a smaller model"
        if fits:
            test = f"python test_only.py {command('--ckpt_path', path)} --weight_bits {fits[0]}"
            way = f"{test} stores it smaller, in stored/"
        raise UserError(
            f"--ckpt_path {path}: a model takes {cost.total_param_bytes:,} B of {complexity.MAX_PARAMS_MEMORY:,}: {way}"
        )
    for who, macs in (("", cost.macs), (" by the challenge's checker", cost.torchinfo_macs)):
        if macs > complexity.MAX_MACS:
            raise UserError(
                f"--ckpt_path {path}: a model takes {macs:,} MACs{who} of {complexity.MAX_MACS:,}: take a smaller one"
            )
    return module.as_checkpoint(), cost


if __name__ == "__main__":
    run(main)
