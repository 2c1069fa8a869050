"""The configuration of the three scripts: every part's dataclass, put together, and where its defaults come from.

A checkpoint carries its configuration as plain values, and config.json of a run does too. A script that starts from
one takes its defaults from there, so that a flag that differs can only have been given by the user.
"""

import dataclasses
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import aum
from dcase import cli
from dcase.data.augment import AugmentConfig
from dcase.data.labels import SCENES
from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import TRAIN_DEVICES, DataConfig, SplitConfig
from dcase.errors import UserError
from dcase.files import write_json
from dcase.machine import MachineConfig, from_main, is_main
from dcase.model import named as models
from dcase.model.distillation import DistillConfig
from dcase.model.named import ModelConfig
from dcase.runs import artifacts
from dcase.runs.checkpoints import load_checkpoint, refuse_other_scenes
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


@dataclass(frozen=True)
class FitConfig:
    n_epochs: int = 150
    """Passes over the training clips."""
    lr: float = 0.0005
    """AdamW's highest learning rate, reached after warm-up; it then falls to 0 along a cosine."""
    warmup_steps: int = 4000
    """Optimiser steps until --lr is reached; at most a fifth of the run."""
    weight_decay: float = 0.0001
    """AdamW's weight decay; A_log, D, biases, norms and the class token are spared."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the next one, for fine-tuning pretrained weights, as 0.75: --lr is the
    head's, and the patch embedding has the lowest; 1: --lr for all."""
    freeze_epochs: int = 0
    """In the first epochs, as many, only the head is trained: pretrained weights stand still until it is of use."""
    accumulate_grad_batches: int = 1
    """Batches per optimiser step: clips per step are processes x --batch_size x this."""
    gradient_clip_val: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    check_val_every_n_epoch: int = 10
    """Validate, and keep the best model, every so many epochs and after the last one."""
    ema_decay: float = 0.0
    """Validate and keep the average of the weights over the last steps: the share of it that a step keeps, as 0.995
    (a memory of 200 steps); 0: the last step's weights."""
    qat_epochs: int = 10
    """Of the last epochs, as many as are trained with weights rounded to --weight_bits (quantisation-aware)."""
    compile: bool = False
    """torch.compile the model: a minute or more at the start of training, on GPUs fewer launches after it."""
    seed: int = 0
    """Seed of weights, order and augmentation; two runs with one seed on a CPU give the same weights."""

    def __post_init__(self):
        for name in ("n_epochs", "check_val_every_n_epoch", "accumulate_grad_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is at least 1; got {getattr(self, name)}")
        for name in ("lr", "warmup_steps", "weight_decay", "gradient_clip_val", "seed", "qat_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} is a number not below 0; got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise UserError(f"--seed is below 2^32; got {self.seed}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer_decay is above 0, and at most 1; got {self.layer_decay}")
        if not 0 <= self.freeze_epochs < self.n_epochs:
            raise UserError(f"--freeze_epochs is from 0 to below --n_epochs {self.n_epochs}; got {self.freeze_epochs}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay is from 0 to below 1; got {self.ema_decay}")


@dataclass(frozen=True)
class StorageConfig:
    weight_bits: Literal[32, 16, 8] = 32
    """Bits of the weights in stored/, which are counted and tested: 16; or 8 with a 16-bit scale per channel, and 16
    for A_log, D, biases, norms and whatever is small. 32: the checkpoint is tested, and nothing is stored beside it."""


@dataclass(frozen=True)
class EvalConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    logmel: LogMelConfig = field(default_factory=LogMelConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self):
        if self.data.dataset_dir:  # another script, in another folder, may be the next to read it
            folder = Path(self.data.dataset_dir).expanduser().absolute()
            object.__setattr__(self, "data", dataclasses.replace(self.data, dataset_dir=str(folder)))


@dataclass(frozen=True)
class TestConfig(EvalConfig):
    ckpt_path: str = ""
    """Checkpoint file to evaluate, of either stage; several of stage 2, with commas between them, are merged. Or a
    stored model: stored/general.safetensors, or the folder stored/ with all devices' models."""


@dataclass(frozen=True)
class TrainConfig(EvalConfig):
    resume: str = ""
    """Id of a run to go on with: its configuration, weights, optimiser, schedule, epoch and random state."""
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
    """Train and test as many seeds, --seed and those after it, a run each, one behind the other; at the end come mean
    and deviation over them."""
    init_from: str = ""
    """Id of a run of train_base.py whose weights to start from. Where that Audio Mamba is wider, deeper or has more
    states, its most important channels, layers and states are taken (structured pruning)."""
    pretrained: str = ""
    """Checkpoint file whose weights to start from: of Vim (ImageNet), AuM, the earlier code or a run, as .pth, .pt,
    .ckpt or .safetensors. python -m aum.pretrained FILE shows what it holds."""
    pretrained_grid: tuple[int, int] | None = None
    """Patches along mel and time that its position embedding stands for, as 8,64, where the file does not say."""

    def __post_init__(self):
        super().__post_init__()
        if self.seeds < 1:
            raise UserError(f"--seeds is at least 1; got {self.seeds}")
        if self.fit.seed + self.seeds > 2**32:
            raise UserError(f"--seed {self.fit.seed} and the {self.seeds - 1} after it are not all below 2^32")
        if self.pretrained_grid is not None:
            object.__setattr__(self, "pretrained_grid", tuple(self.pretrained_grid))  # a list, from JSON
            if min(self.pretrained_grid) < 1:
                raise UserError(f"--pretrained_grid is two numbers of at least 1; got {self.pretrained_grid}")
            if not self.pretrained:
                raise UserError("--pretrained_grid is of the file of --pretrained: give that, too")
        if self.pretrained and self.init_from:
            raise UserError("--pretrained and --init_from both say which weights to start from: give one of them")
        if self.pretrained and self.model.model in models.FIXED:
            raise UserError(f"--pretrained does not apply to {self.model.model}, only to Audio Mambas: leave it out")


@dataclass(frozen=True)
class DeviceConfig(TrainConfig):
    ckpt_id: str = ""
    """Run id of the general model, trained by train_base.py in the same --project_name."""
    only_devices: str = ""
    """Devices to fine-tune for, as a,b; without it a, b, c, s1, s2, s3. The test is then left to test_only.py."""
    finetune: Literal["full", "lora", "head"] = "full"
    """What is fine-tuned: full: every weight; lora: a low-rank addition to each matrix, merged into it at the end;
    head: the classifier."""
    lora_rank: int = 4
    """Rank of the additions of --finetune lora."""
    lr_choices: str = ""
    """Learning rates to try for each device, as 0.0001,0.0005; the device's validation clips decide. "": --lr alone."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(n_epochs=50, warmup_steps=100))

    def __post_init__(self):
        super().__post_init__()
        if self.finetune != "full" and (self.fit.layer_decay != 1 or self.fit.freeze_epochs):
            raise UserError(f"--layer_decay and --freeze_epochs need --finetune full; got {self.finetune}")
        if self.lora_rank < 1:
            raise UserError(f"--lora_rank is at least 1; got {self.lora_rank}")
        if not all(0 < lr < float("inf") for lr in self.learning_rates):
            raise UserError(f"--lr_choices {self.lr_choices}: learning rates above 0, with commas between them")
        if self.lr_choices and self.split.val_split != "test" and self.split.val_fraction == 0:
            raise UserError("--lr_choices needs validation clips, and --val_fraction is 0: give --lr instead")
        unknown = set(filter(None, self.only_devices.split(","))) - set(TRAIN_DEVICES)
        if unknown or (self.only_devices and not self.devices_to_tune):
            raise UserError(f"--only_devices {self.only_devices}: known devices are {','.join(TRAIN_DEVICES)}")

    @property
    def learning_rates(self) -> list[float]:
        """Those to try: --lr_choices, or --lr alone."""
        try:
            return [float(lr) for lr in self.lr_choices.split(",") if lr] or [self.fit.lr]
        except ValueError:
            return [float("nan")]

    @property
    def devices_to_tune(self) -> list[str]:
        named = self.only_devices.split(",")
        return [device_id for device_id in TRAIN_DEVICES if not self.only_devices or device_id in named]


Config = TypeVar("Config", bound=EvalConfig)

# What a resumed run may change: none of it changes the figures by more than rounding (compile: and by other dropout).
FREE_ON_RESUME = {
    "resume", "dataset_dir", "num_workers", "accelerator", "devices", "num_nodes", "strategy", "wandb_mode",
    "scan_backend", "deterministic", "compile", "read_from", "pack_dir", "report_audio",
    "logger", "log_checkpoints",
}  # fmt: skip
_FREE_DATA = {"dataset_dir", "read_from", "pack_dir"}  # what stage 2 and a test may choose anew


def parse_base(description: str, args: list[str] | None = None) -> tuple[BaseConfig, Run | None]:
    """train_base.py's configuration, and the run where one is resumed."""
    resumed = _resumed(BaseConfig, description, args)
    if resumed:
        return resumed
    config = cli.parse(BaseConfig, description, args=args)
    # Before any data is looked for: the clips' length is not known yet, so a patch may be of any length.
    models.fill(config.model, config.logmel.n_mels, config.logmel.target_length or 10**9)
    return config, None


def parse_device_specific(description: str, args: list[str] | None = None) -> tuple[DeviceConfig, Run | None, dict]:
    """train_device_specific.py's configuration, the run where one is resumed, and the general model's checkpoint."""
    resumed = _resumed(DeviceConfig, description, args)
    if resumed:
        config, run = resumed
        artifacts.fetch(config.run.project_name, config.ckpt_id, config.run.wandb_mode, config.run.logger)
        return config, run, load_checkpoint(find_checkpoint(config.run.project_name, config.ckpt_id))
    project_name = peek("project_name", args) or RunConfig().project_name
    ckpt_id = peek("ckpt_id", args)
    if not ckpt_id:
        cli.parse(DeviceConfig, description, args=args)  # --help, or a flag that does not exist
        raise UserError("--ckpt_id is missing: give the run id that train_base.py printed")
    artifacts.fetch(project_name, ckpt_id, peek("wandb_mode", args), peek("logger", args))
    checkpoint = load_checkpoint(find_checkpoint(project_name, ckpt_id))
    default = _like_checkpoint(DeviceConfig, checkpoint)
    config = cli.parse(DeviceConfig, description, default, args)
    decided = ("model", "logmel", "data", "split")
    _refuse_changes(default, config, decided, f"the checkpoint of --ckpt_id {ckpt_id}", free=_FREE_DATA)
    return config, None, checkpoint


def parse_test(description: str, args: list[str] | None = None) -> tuple[TestConfig, dict]:
    """test_only.py's configuration and the checkpoint."""
    path = peek("ckpt_path", args)
    if not path:
        cli.parse(TestConfig, description, args=args)
        raise UserError(
            "--ckpt_path is missing: give a checkpoint file, as <project_name>/<run_id>/checkpoints/best.ckpt"
        )
    checkpoint = load_trained(path, peek("project_name", args) or RunConfig().project_name)
    default = _like_checkpoint(TestConfig, checkpoint)
    config = cli.parse(TestConfig, description, default, args)
    _refuse_changes(default, config, ("model", "logmel", "data"), f"the checkpoint {path}", free=_FREE_DATA)
    return config, checkpoint


def find_dataset_dir(given: str | None, checkpoint: dict, ckpt_path: str | None = None) -> str | None:
    """--dataset_dir; without it and without TAU22_DIR the folder that a checkpoint's run was given, which is then said.

    Stored models name no folder of this machine: theirs is that of the run which they lie in, by ``ckpt_path``.
    Raises `UserError` where it is not there any more.
    """
    of_run = checkpoint["config"]["data"].get("dataset_dir")
    if not of_run and ckpt_path and (run := run_of(ckpt_path)):
        of_run = run.read_config()["data"]["dataset_dir"]
    if given or os.environ.get("TAU22_DIR") or not of_run:
        return given
    if not Path(of_run).expanduser().is_dir():
        raise UserError(f"the data folder of the checkpoint's run, {of_run}, is not there any more: give --dataset_dir")
    print(f"neither --dataset_dir nor TAU22_DIR is given: using the data of the checkpoint's run, {of_run}")
    return of_run


def with_data_of(checkpoint: dict, config: Config) -> Config:
    """The configuration with `find_dataset_dir`'s folder."""
    dataset_dir = find_dataset_dir(config.data.dataset_dir, checkpoint, getattr(config, "ckpt_path", None))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset_dir=dataset_dir))


def same_place(config: EvalConfig) -> str:
    """The flags that lead the next script to this one's runs and data, for a shell."""
    data = ["--dataset_dir", config.data.dataset_dir] if config.data.dataset_dir else []
    return shlex.join(["--project_name", config.run.project_name, *data])


def start_run(config: TrainConfig | TestConfig, run: Run | None) -> Run:
    """The run to write to: the resumed one, or a new one with its config.json written."""
    if run is not None and (run.folder / "results.json").is_file():
        print(f"run {run.id} is trained to its end: it is only tested again")
    if run is None:
        run = new_run(config.run.project_name, config.run.run_id) if is_main() else None
        run = from_main(run)
    if is_main() and not run.has_config():
        versions = {
            name: sys.modules[name].__version__ for name in ("torch", "torchaudio", "pytorch_lightning", "numpy")
        }
        write_json(
            run.folder / "config.json",
            {
                "config": to_plain(config),
                "scenes": list(SCENES),
                "command": sys.argv,
                "commit": _commit(),
                "versions": {"python": platform.python_version(), **versions},
            },
        )
    print(f"run {run.id}: everything goes to {run.folder}/")
    return run


def to_plain(config) -> dict:
    """A configuration as plain values, for a checkpoint or JSON."""
    return dataclasses.asdict(config)


def from_plain(cls: type[Config], plain: dict) -> Config:
    """The opposite of `to_plain`; parts and fields that are not there keep their defaults."""
    default = cls()
    parts = {}
    for f in dataclasses.fields(cls):
        value, part = plain.get(f.name), getattr(default, f.name)
        if f.name in plain:
            parts[f.name] = _from_values(type(part), value) if dataclasses.is_dataclass(part) else value
    return cls(**parts)


def _from_values(cls: type, values: dict):
    known = {f.name for f in dataclasses.fields(cls)}
    if cls is ModelConfig and values.get("depth") is not None:  # of a run before a field was there: as without it
        values = {f.name: f.default for f in dataclasses.fields(aum.AuMConfig) if f.name in known} | values
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}  # JSON has no tuples
    return cls(**tuples)


def _like_checkpoint(cls: type[Config], checkpoint: dict) -> Config:
    """A script's defaults, with the model, the front end and the split of a checkpoint."""
    saved = from_plain(cls, checkpoint["config"])
    data = DataConfig(orig_sample_rate=saved.data.orig_sample_rate)
    kept = {"model": saved.model, "logmel": saved.logmel, "data": data, "storage": saved.storage}
    if "split" in {f.name for f in dataclasses.fields(cls)}:
        kept["split"] = saved.split
    return dataclasses.replace(cls(), **kept)


def _resumed(cls: type[Config], description: str, args: list[str] | None) -> tuple[Config, Run] | None:
    run_id = peek("resume", args)
    if not run_id:
        return None
    project_name = peek("project_name", args) or RunConfig().project_name
    artifacts.fetch(project_name, run_id, peek("wandb_mode", args), peek("logger", args))
    run = find_run(project_name, run_id, "--resume")
    saved = run.read_config()
    kind = kind_of(saved)
    if kind == "test":
        raise UserError(
            f"--resume {run_id}: that run was made by {SCRIPTS[kind]}: a test is not resumed, but run again"
        )
    if (kind == "device-specific") != (cls is DeviceConfig):
        how = resume_command(SCRIPTS[kind], run_id, project_name)
        raise UserError(f"--resume {run_id}: that run was made by {SCRIPTS[kind]}; go on with: {how}")
    refuse_other_scenes(run.scenes(), f"the run --resume {run_id}")
    default = dataclasses.replace(from_plain(cls, saved), resume=run_id)
    config = cli.parse(cls, description, default, args)
    parts = tuple(f.name for f in dataclasses.fields(cls))
    _refuse_changes(default, config, parts, f"the run --resume {run_id}", free=FREE_ON_RESUME)
    return config, run


def _refuse_changes(default, config, parts: tuple[str, ...], what: str, free: set[str] = frozenset()) -> None:
    """Raise `UserError`, with both values, where a flag differs from what is already decided."""
    for part in parts:
        before, after = getattr(default, part), getattr(config, part)
        fields = vars(before) if dataclasses.is_dataclass(before) else {part: before}
        for name, value in fields.items():
            given = getattr(after, name) if dataclasses.is_dataclass(after) else after
            if given != value and name not in free:
                raise UserError(f"--{name} {_shown(given)} contradicts {what}, which has {_shown(value)}: leave it out")


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def peek(name: str, args: list[str] | None) -> str | None:
    """The value of one flag, before the command line is parsed with the defaults that it leads to."""
    args = sys.argv[1:] if args is None else args
    for i, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value or (args[i + 1] if i + 1 < len(args) else None)
    return None


def _commit() -> str | None:
    """The git commit of this code, where it is a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
