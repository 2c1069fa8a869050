"""The configuration of the three scripts: the dataclasses of all rooms together, and where their defaults come from.

The dataclasses' own defaults are AuM-Small's; train_base.py takes those of its --model (`defaults.py`). A checkpoint
and a run's config.json hold the configuration as plain values. A script that starts from one takes its defaults from
there, so that a flag that differs can only have been given by the user.
"""

import argparse
import dataclasses
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

import aum
from dcase import cli
from dcase.data.augment import AugmentConfig
from dcase.data.labels import TAU22_LABELS, Labels
from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import DataConfig, SplitConfig
from dcase.errors import UserError, check_range, command
from dcase.files import only_one, write_json
from dcase.machine import MachineConfig, from_main, is_main
from dcase.model import named as models
from dcase.model.distillation import DistillConfig
from dcase.model.named import ModelConfig
from dcase.runs import artifacts
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.defaults import with_defaults
from dcase.runs.folder import (
    SCRIPTS,
    Run,
    RunConfig,
    find_checkpoint,
    find_run,
    kind_of,
    new_run,
    resume_command,
    run_of,
)
from dcase.runs.trained import load_trained
from dcase.schema import checked


@dataclass(frozen=True)
class FitConfig:
    n_epochs: int = 150
    """Passes over the training clips."""
    lr: float = 0.0005
    """AdamW's highest learning rate, reached after warm-up; it then falls to 0 along a cosine."""
    warmup_steps: int = 4000
    """Optimiser steps until --lr is reached; at most a fifth of the run."""
    weight_decay: float = 0.0001
    """AdamW's weight decay; it spares A_log, D, biases, norms and the class token."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the next one, such as 0.75, for fine-tuning pretrained weights: the head
    gets --lr, the patch embedding the lowest rate. 1: --lr for all."""
    freeze_epochs: int = 0
    """Train only the head for this many epochs, so that an untrained head does not disturb pretrained weights."""
    accumulate_grad_batches: int = 1
    """Batches per optimiser step: a step uses processes x --batch_size x this many clips."""
    gradient_clip_val: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    check_val_every_n_epoch: int = 10
    """Validate every N epochs and after the last one, and keep the best model."""
    ema_decay: float = 0.0
    """Validate and keep an exponential moving average of the weights: the share of it that a step keeps, such as 0.995
    (a memory of 200 steps). 0: the last step's weights."""
    qat_epochs: int = 10
    """Train the last N epochs with weights rounded to --weight_bits (quantisation-aware)."""
    compile: bool = False
    """Compile the model with torch.compile: training starts a minute or more later, and a GPU has fewer launches."""
    seed: int = 0
    """Seed of weights, order and augmentation; on a CPU two runs with one seed give the same weights."""

    def __post_init__(self):
        check_range(self, "n_epochs check_val_every_n_epoch accumulate_grad_batches", least=1, most=10**6)
        check_range(self, "warmup_steps gradient_clip_val qat_epochs", least=0, most=10**9)
        check_range(self, "lr weight_decay", least=0, most=MOST_LR)
        check_range(self, "seed", least=0, below=2**32)
        check_range(self, "layer_decay", above=0, most=1)
        if not 0 <= self.freeze_epochs < self.n_epochs:
            raise UserError(
                f"--freeze_epochs must be from 0 to below --n_epochs {self.n_epochs}; got {self.freeze_epochs}"
            )
        check_range(self, "ema_decay", least=0, below=1)


@dataclass(frozen=True)
class StorageConfig:
    weight_bits: Literal[32, 16, 8] = 32
    """Bits of the weights in stored/, which are counted and tested. 16; or 8, with a 16-bit scale per channel and with
    A_log, D, biases, norms and small matrices in 16. 32: test the checkpoint and store nothing beside it."""


@dataclass(frozen=True)
class EvalConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    logmel: LogMelConfig = field(default_factory=LogMelConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self):
        if self.data.dataset_dir:  # the next script may run in another folder
            folder = Path(self.data.dataset_dir).expanduser().absolute()
            object.__setattr__(self, "data", dataclasses.replace(self.data, dataset_dir=str(folder)))


@dataclass(frozen=True)
class TestConfig(EvalConfig):
    ckpt_path: str = ""
    """Checkpoint file to evaluate, of either stage; several of stage 2, separated by commas, are merged. Or a stored
    model (stored/general.safetensors), or the folder stored/ with the models of all devices. Or a published checkpoint
    of the challenge's baseline (docs/models_in_and_out.md)."""


@dataclass(frozen=True)
class TrainConfig(EvalConfig):
    resume: str = ""
    """Id of a run to continue, with its configuration, weights, optimiser, schedule, epoch and random state."""
    split: SplitConfig = field(default_factory=SplitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.fit.layer_decay != 1 and self.model.model in models.FIXED:
            raise UserError(f"--layer_decay does not apply to {self.model.model}: leave it out")


@dataclass(frozen=True)
class BaseConfig(TrainConfig):
    seeds: int = 1
    """Train and test this many seeds one after another, each in its own run, from --seed upwards; then print mean and
    deviation over them."""
    cross_fit: int = 0
    """Train this many teachers first, each on all but one of as many parts of the training clips, by recording
    location. The model then learns each clip's logits from the teacher that has not heard its location. N teachers take
    about N - 1 times as long as the run itself. 0: none."""
    init_from: str = ""
    """Id of a run of train_base.py, or a .ckpt file of one, to start from its weights. Where that Audio Mamba is wider,
    deeper or has more states, take its most important channels, layers and states (structured pruning)."""
    pretrained: str = ""
    """Checkpoint file to start from its weights: of Vim (ImageNet), AuM, the earlier code or a run, as .pth, .pt, .ckpt
    or .safetensors; or the folder of a published model. python -m aum.pretrained FILE shows what it holds. For --model
    cp_mobile: a checkpoint of the challenge's baseline, or of a run."""
    pretrained_grid: tuple[int, int] | None = None
    """Patches along mel and time of the file's position embedding, such as 8,64, where the file does not say."""
    normalise: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Subtract the mean of the training clips' log-mel and divide by their deviation; False: leave the log-mel as it
    is, as the DCASE2025 baseline does."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "seeds", least=1, most=10_000)
        check_range(self, "cross_fit", least=0, most=100)
        if self.cross_fit == 1:
            raise UserError("--cross_fit must be 0, or at least 2 parts; got 1")
        if self.cross_fit and self.init_from:
            raise UserError("--cross_fit and --init_from: that run's model has heard every clip: give one of them")
        if self.cross_fit and self.distill.teacher_input == "live":
            raise UserError("--cross_fit needs --teacher_input cached: each teacher knows its own part of the clips")
        if self.fit.seed + self.seeds > 2**32:
            raise UserError(f"--seed {self.fit.seed}: it and the {self.seeds - 1} after it must be below 2^32")
        if self.pretrained_grid is not None:
            if min(self.pretrained_grid) < 1:
                raise UserError(f"--pretrained_grid must be two numbers of at least 1; got {self.pretrained_grid}")
            if not self.pretrained:
                raise UserError("--pretrained_grid describes the file of --pretrained: give that too")
        if self.pretrained and self.init_from:
            raise UserError("--pretrained and --init_from both say which weights to start from: give one of them")
        if self.pretrained_grid and self.model.model in models.FIXED:
            raise UserError(f"--pretrained_grid does not apply to {self.model.model}: leave it out")


@dataclass(frozen=True)
class DeviceConfig(TrainConfig):
    ckpt_id: str = ""
    """Run id of the general model, trained by train_base.py in the same --project_name."""
    only_devices: str = ""
    """Fine-tune only for these devices, such as a,b, and leave the test to test_only.py. "": all known ones."""
    finetune: Literal["full", "lora", "head"] = "full"
    """Fine-tune every weight (full); a low-rank addition to each matrix, merged into it at the end (lora); or the
    classifier (head)."""
    lora_rank: int = 4
    """Rank of the additions of --finetune lora."""
    lr_choices: str = ""
    """Learning rates to try, such as 0.0001,0.0005: the one with the clearest fall of the validation loss, as a mean
    over the devices, is taken for all of them. "": --lr."""
    own_share: float | None = None
    """Share of the fine-tuned weights in a device's model, the rest being the general model's; 1: the fine-tuned
    weights alone. None: 0.5 or 0.75, whichever has the clearer fall of the validation loss, for all devices; 0.5 where
    no clips are held out."""
    keep: Literal["clear", "all", "none"] = "clear"
    """Which devices' models are used: every one where their loss on validation clips, as a mean over the devices, falls
    by more than a standard error, except a device whose own clips clearly say the opposite (clear); every one, whatever
    validation says (all); or none of them, to see what they would be worth (none)."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(n_epochs=50, warmup_steps=100))

    def __post_init__(self):
        super().__post_init__()
        if self.finetune != "full" and (self.fit.layer_decay != 1 or self.fit.freeze_epochs):
            raise UserError(f"--layer_decay and --freeze_epochs need --finetune full; got {self.finetune}")
        check_range(self, "lora_rank", least=1, most=aum.model.MOST["embed_dim"])
        check_range(self, "own_share", above=0, most=1)
        if not all(0 < lr <= MOST_LR for lr in self.learning_rates):
            wanted = f"learning rates above 0 and at most {MOST_LR}, separated by commas"
            raise UserError(f"--lr_choices must be {wanted}; got {self.lr_choices}")
        if self.lr_choices and self.split.val_split != "test" and self.split.val_fraction == 0:
            raise UserError("--lr_choices needs validation clips, and --val_fraction is 0: give --lr instead")

    @property
    def learning_rates(self) -> list[float]:
        """Those to try: --lr_choices, or --lr."""
        try:
            return [float(lr) for lr in self.lr_choices.split(",") if lr] or [self.fit.lr]
        except ValueError:
            return [math.nan]

    @property
    def shares(self) -> tuple[float, ...]:
        """Those to try: --own_share, or `SHARES`."""
        return SHARES if self.own_share is None else (self.own_share,)

    def devices_to_tune(self, labels: Labels) -> list[str]:
        """Return the devices of --only_devices, or all that training clips are of. Raises `UserError` for another."""
        known, named = labels.train_devices, list(filter(None, self.only_devices.split(",")))
        if set(named) - set(known) or (self.only_devices and not named):
            raise UserError(f"--only_devices {self.only_devices}: known devices are {','.join(known)}")
        return [device_id for device_id in known if not named or device_id in named]


Config = TypeVar("Config", bound=EvalConfig)
CONFIGS = {"general": BaseConfig, "device-specific": DeviceConfig, "test": TestConfig}  # by `kind_of`

# What a resumed run may change: none of it changes the figures by more than rounding (compile: and by other dropout).
FREE_ON_RESUME = {
    "resume", "dataset_dir", "num_workers", "accelerator", "devices", "num_nodes", "strategy", "wandb_mode",
    "scan_backend", "deterministic", "float32_matmul", "compile", "read_from", "pack_dir", "report_audio",
    "logger", "log_checkpoints", "teacher",
}  # fmt: skip
SHARES = (0.5, 0.75)  # of the fine-tuned weights, to choose from; the first where nothing can choose
MOST_LR = 100  # beyond any that trains
LR_SHARE = 0.1  # stage 2's learning rate over the general model's, as in the challenge's baseline
_FREE_DATA = {"dataset_dir", "read_from", "pack_dir"}  # what stage 2 and a test may choose anew
# What --help says where no checkpoint is given: flags of test_only.py and of stage 2 whose default that holds.
_OF_CHECKPOINT = dict.fromkeys(cli.flags_of(EvalConfig(), ("model", "logmel", "storage")), "from the checkpoint")
_OF_CHECKPOINT["orig_sample_rate"] = "from the checkpoint"
_OF_GENERAL = _OF_CHECKPOINT | dict.fromkeys(
    [*cli.flags_of(TrainConfig(), ("split", "augment")), "batch_size", "gradient_clip_val"], "from the checkpoint"
)
_OF_GENERAL |= {"lr": f"{LR_SHARE:g} times the checkpoint's", "mixstyle_p": "0", "dir_path": "None"}


# Reading the command line


def split_flags(args: list[str] | None, *names: str) -> tuple[dict[str, str | None], list[str]]:
    """Return (values of these flags, None where not given; the command line without them), to read a few flags before
    the defaults of the others are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", dest=name)
    values, rest = parser.parse_known_args(args)
    for name, value in vars(values).items():
        cli.check_text(name, value)
    return vars(values), rest


def _place_flags(args: list[str] | None) -> dict[str, str | None]:
    """Return the flags that say which run or checkpoint a script starts from."""
    given, _ = split_flags(args, "project_name", "resume", "ckpt_id", "ckpt_path", "wandb_mode", "logger")
    return given | {"project_name": given["project_name"] or RunConfig.project_name}


def parse_base(description: str, args: list[str] | None = None) -> tuple[BaseConfig, Run | None]:
    """Return train_base.py's configuration, and the run where one is resumed."""
    if resumed := _resumed(BaseConfig, description, args):
        return resumed
    given, _ = split_flags(args, "model")
    default = with_defaults(BaseConfig(), given["model"] or ModelConfig.model)
    config = cli.parse(BaseConfig, description, default, args)
    # Before any data is looked for: the clips' length is not known yet, so a patch may be of any length.
    size = config.logmel.n_mels, config.logmel.target_length or 4096
    models.fill(config.model, *size)
    if config.logmel.batch_lengths:
        models.refuse_lengths(config.model, *size)
    return config, None


def parse_device_specific(description: str, args: list[str] | None = None) -> tuple[DeviceConfig, Run | None, dict]:
    """Return train_device_specific.py's configuration, the run where one is resumed, and the general model's
    checkpoint."""
    config, run = _resumed(DeviceConfig, description, args) or (None, None)
    given = {**vars(config.run), "ckpt_id": config.ckpt_id} if config else _place_flags(args)
    ckpt_id = given["ckpt_id"]
    if not ckpt_id:
        cli.parse(DeviceConfig, description, args=args, elsewhere=_OF_GENERAL)  # --help, or an unknown flag
        raise UserError("--ckpt_id is missing: give the run id that train_base.py printed")
    artifacts.fetch(given["project_name"], ckpt_id, given["wandb_mode"], given["logger"])
    checkpoint = load_checkpoint(find_checkpoint(given["project_name"], ckpt_id))
    if config is None:
        default = defaults_from(DeviceConfig, checkpoint["config"], f"the checkpoint of --ckpt_id {ckpt_id}")
        config = cli.parse(DeviceConfig, description, default, args)
        config.devices_to_tune(Labels.from_plain(checkpoint, "the checkpoint"))
        decided = ("model", "logmel", "data", "split")
        _refuse_changes(default, config, f"the checkpoint of --ckpt_id {ckpt_id}", _FREE_DATA, decided)
    return config, run, checkpoint


def parse_test(description: str, args: list[str] | None = None) -> tuple[TestConfig, dict]:
    """Return test_only.py's configuration and the checkpoint."""
    given = _place_flags(args)
    path = given["ckpt_path"]
    if not path:
        cli.parse(TestConfig, description, args=args, elsewhere=_OF_CHECKPOINT)
        raise UserError(
            "--ckpt_path is missing: give a checkpoint file, such as <project_name>/<run_id>/checkpoints/best.ckpt"
        )
    checkpoint = load_trained(path, given["project_name"])
    default = defaults_from(TestConfig, checkpoint["config"], f"the checkpoint {path}")
    config = cli.parse(TestConfig, description, default, args)
    _refuse_changes(default, config, f"the checkpoint {path}", _FREE_DATA, ("model", "logmel", "data"))
    return config, checkpoint


def _resumed(cls: type[Config], description: str, args: list[str] | None) -> tuple[Config, Run] | None:
    given = _place_flags(args)
    run_id, project_name = given["resume"], given["project_name"]
    if not run_id:
        return None
    artifacts.fetch(project_name, run_id, given["wandb_mode"], given["logger"])
    run = find_run(project_name, run_id, "--resume")
    saved = run.read_config()
    script = SCRIPTS[kind_of(saved)]
    if kind_of(saved) == "test":
        raise UserError(f"--resume {run_id}: that run was made by {script}: a test is not resumed, run it again")
    if kind_of(saved) != kind_of(to_plain(cls())):
        how = resume_command(script, run_id, project_name)
        raise UserError(f"--resume {run_id}: that run was made by {script}; go on with: {how}")
    default = from_plain(cls, saved, f"{run.folder}/config.json")
    place = dataclasses.replace(default.run, project_name=project_name)  # the folder may have been moved
    default = dataclasses.replace(default, resume=run_id, run=place)
    config = cli.parse(cls, description, default, args)
    before, after = default.fit.n_epochs, config.fit.n_epochs
    if after > before:
        if not (run.folder / "results.json").is_file():
            again = resume_command(script, run_id, project_name)
            raise UserError(
                f"--n_epochs {after}: run {run_id} was planned for {before} epochs: let it end first: {again}"
            )
        how = f"start a new one with --n_epochs {after}"
        if cls is BaseConfig:
            how = f"train on from its weights in a new run, with --init_from {run_id} --n_epochs {after - before}"
        raise UserError(
            f"--n_epochs {after}: run {run_id} ends after {before} epochs, over which its learning rate falls to 0; "
            f"{how} and the other flags of {run.folder}/config.json"
        )
    _refuse_changes(default, config, f"the run --resume {run_id}", FREE_ON_RESUME)
    return config, run


def defaults_from(cls: type[Config], plain: dict, what: str = "the saved configuration") -> Config:
    """Return the defaults of stage 2 or a test of a model that was trained with the configuration ``plain``: its model
    and front end; for stage 2 also its split, and what `for_one_device` takes. Raises as `from_plain`."""
    saved = from_plain(cls, plain, what)
    data = DataConfig(orig_sample_rate=saved.data.orig_sample_rate)
    default = dataclasses.replace(cls(), model=saved.model, logmel=saved.logmel, data=data, storage=saved.storage)
    if not isinstance(saved, DeviceConfig):
        return default
    return for_one_device(dataclasses.replace(default, split=saved.split), from_plain(TrainConfig, plain, what))


def for_one_device(default: DeviceConfig, general: TrainConfig) -> DeviceConfig:
    """Return stage 2's defaults: the general model's augmentation without what imitates other devices (Freq-MixStyle
    and device responses), its batch size and clipping, and a tenth of its learning rate."""
    return dataclasses.replace(
        default,
        augment=dataclasses.replace(general.augment, mixstyle_p=0.0, dir_path=None),
        machine=dataclasses.replace(default.machine, batch_size=general.machine.batch_size),
        fit=dataclasses.replace(
            default.fit, lr=float(f"{general.fit.lr * LR_SHARE:.3g}"), gradient_clip_val=general.fit.gradient_clip_val
        ),
    )


def inherited(config: DeviceConfig, checkpoint: dict) -> str:
    """Return a line that says what stage 2 takes from the general model, and which flags say otherwise."""
    default = for_one_device(config, from_plain(TrainConfig, checkpoint["config"]))
    augment, before, after = vars(default.augment), cli.flags_of(default), cli.flags_of(config)
    shown = " ".join(
        f"--{name} {value}" for name, value in augment.items() if value and not name.startswith(("dir_", "mixstyle_"))
    )
    given = [
        f"--{name} {after[name]}"
        for name in (*augment, "batch_size", "gradient_clip_val", "lr")
        if after[name] != before[name]
    ]
    given += [f"--lr_choices {config.lr_choices}"] if config.lr_choices else []
    instead = f"; given instead: {' '.join(given)}" if given else ""
    return (
        f"from the general model {config.ckpt_id}: its augmentation, with Freq-MixStyle and device responses off "
        f"({shown}), its --batch_size {before['batch_size']} and --gradient_clip_val "
        f"{before['gradient_clip_val']:g}, and a tenth of its learning rate, --lr {before['lr']:g}{instead}"
    )


def _refuse_changes(default, config, what: str, free: set[str], parts: tuple[str, ...] | None = None) -> None:
    """Raise `UserError`, with both values, where a flag (of these parts) differs from what is already decided."""
    before, after = cli.flags_of(default, parts), cli.flags_of(config, parts)
    for name, value in before.items():
        if name not in free and after[name] != value:
            shown, decided = (",".join(map(str, v)) if isinstance(v, tuple) else v for v in (after[name], value))
            raise UserError(f"--{name} {shown} contradicts {what}, which has {decided}: leave it out")


# Configurations in checkpoints and config.json


def to_plain(config) -> dict:
    """Return a configuration as plain values, for a checkpoint or JSON."""
    return dataclasses.asdict(config)


def from_plain(cls: type[Config], plain: dict, what: str = "the saved configuration") -> Config:
    """Return the configuration that `to_plain` gave ``plain`` for; missing parts and fields keep their defaults.

    Raises `UserError`, which begins with ``what``, where a value is of a wrong type or refused.
    """
    model = plain.get("model")
    if isinstance(model, dict) and model.get("depth") is not None:  # a run from before a field existed: as without it
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        before = {f.name: f.default for f in dataclasses.fields(aum.AuMConfig) if f.name in known}
        plain = plain | {"model": before | model}
    default = cls()
    parts = {}
    for field_of in dataclasses.fields(cls):
        part = getattr(default, field_of.name)
        if dataclasses.is_dataclass(part) and isinstance(plain.get(field_of.name), dict):
            parts[field_of.name] = to_plain(part) | plain[field_of.name]
    return checked(cls, plain | parts, what)


def with_all_fields(saved: dict, what: str = "") -> dict:
    """Return a run's saved configuration with every field of its parts. Raises as `from_plain`."""
    config = to_plain(from_plain(CONFIGS[kind_of(saved)], saved, what))
    return saved | {name: part for name, part in config.items() if isinstance(part, dict)}


# From one script to the next


def find_dataset_dir(given: str | None, checkpoint: dict, ckpt_path: str | None = None) -> str | None:
    """Return --dataset_dir; without it and without TAU22_DIR the data folder of the checkpoint's run, and print that.

    Stored models name no folder of this machine: theirs is the data folder of the run in which ``ckpt_path`` lies.
    Raises `UserError` where that folder is missing.
    """
    of_run = checkpoint["config"]["data"].get("dataset_dir")
    if not of_run and ckpt_path and (run := run_of(ckpt_path)):
        of_run = from_plain(EvalConfig, run.read_config(), f"{run.folder}/config.json").data.dataset_dir
    if given or os.environ.get("TAU22_DIR") or not of_run:
        return given
    if not Path(of_run).expanduser().is_dir():
        raise UserError(f"the data folder of the checkpoint's run, {of_run}, is not there any more: give --dataset_dir")
    print(f"neither --dataset_dir nor TAU22_DIR is given: using the data of the checkpoint's run, {of_run}")
    return of_run


def with_data_of(checkpoint: dict, config: Config) -> Config:
    """Return the configuration with `find_dataset_dir`'s folder."""
    folder = find_dataset_dir(config.data.dataset_dir, checkpoint, getattr(config, "ckpt_path", None))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset_dir=folder))


def same_place(config: EvalConfig) -> str:
    """Return the flags that lead the next script to this one's runs and data, for a shell."""
    data = ["--dataset_dir", config.data.dataset_dir] if config.data.dataset_dir else []
    return command("--project_name", config.run.project_name, *data)


def next_after(config: BaseConfig, run: Run, n_devices: int) -> str:
    """Return the last line of stage 1: what to do next with a model trained on clips of so many devices."""
    if n_devices > 1:
        return f"next: python train_device_specific.py {command('--ckpt_id', run.id)} {same_place(config)}"
    predict = command("python", "-m", "dcase.predict", "RECORDINGS", "--ckpt_path", run.trained)
    return f"one recording device: stage 2, a model per device, has nothing to add\nnext: {predict}"


@contextmanager
def start_run(
    config: TrainConfig | TestConfig, run: Run | None, labels: Labels = TAU22_LABELS, more: dict | None = None
) -> Iterator[Run]:
    """Yield the run to write to, locked: the resumed one, or a new one with its config.json written. ``labels``, of the
    data, and ``more`` go into that beside the configuration.

    Raises `UserError` where another process trains the run. A new training that bad input ends before it has made
    anything leaves nothing behind.
    """
    began = run is None
    print(end="", flush=True)  # where nothing can be printed, nothing is left behind either
    if run is None:
        run = from_main(new_run(config.run.project_name, config.run.run_id) if is_main() else None)
    elif (run.folder / "results.json").is_file():
        print(f"run {run.id} is trained to its end: it is only tested again")
    with only_one(run.folder, f"run {run.id}") if is_main() else nullcontext():
        try:
            if is_main() and not run.has_config():
                _write_config(config, run, {**labels.plain(), **(more or {})})
            print(f"run {run.id}: everything goes to {run.folder}/")
            yield run
        except UserError:
            if began and is_main() and isinstance(config, TrainConfig) and run.has_only_begun():
                print(f"nothing was trained: {run.folder}/ is removed")
                shutil.rmtree(run.folder, ignore_errors=True)
            raise


def _write_config(config: EvalConfig, run: Run, more: dict) -> None:
    libraries = ("torch", "torchaudio", "pytorch_lightning", "numpy")
    versions = {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in libraries}}
    made = {"command": sys.argv, "commit": _commit(), "versions": versions}
    write_json(run.folder / "config.json", {"config": to_plain(config), **made, **more})


def _commit() -> str | None:
    """Return the git commit of this code, where it is a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
