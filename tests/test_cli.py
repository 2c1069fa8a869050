"""Flags: the users' document's names and defaults hold, and every command of the README parses."""

import dataclasses
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, refusal

from dcase import cli, predict
from dcase.adopt import AdoptConfig
from dcase.compare import CompareConfig
from dcase.complexity import ComplexityConfig
from dcase.data.synth import SynthConfig
from dcase.doctor.data import DoctorConfig
from dcase.export import ExportConfig
from dcase.machine import MachineConfig
from dcase.predict import PredictConfig
from dcase.prepare import PrepareConfig
from dcase.publish import PublishConfig
from dcase.runs import config
from dcase.submit import SubmitConfig
from dcase.training import fit
from dcase.validate_submission import ValidateConfig

CONFIGS = {
    "train_base.py": config.BaseConfig,
    "train_device_specific.py": config.DeviceConfig,
    "test_only.py": config.TestConfig,
    "dcase.prepare": PrepareConfig,
    "dcase.adopt": AdoptConfig,
    "dcase.synth": SynthConfig,
    "dcase.complexity": ComplexityConfig,
    "dcase.compare": CompareConfig,
    "dcase.doctor": DoctorConfig,
    "dcase.predict": PredictConfig,
    "dcase.publish": PublishConfig,
    "dcase.export": ExportConfig,
    "dcase.submit": SubmitConfig,
    "dcase.validate_submission": ValidateConfig,
}

# The flags that other people's scripts may rely on. A name may be added here, with a reason; none may go.
MODEL = "model embed_dim depth freq_norm stem stem_blocks patch_size strides n_classes d_state d_conv expand direction paired_layers pool cls_position pos_embed factorised_pos_embed row_scan local_conv head dropout drop_path"  # noqa: E501
LOGMEL = "sample_rate window_length hop_length n_fft n_mels f_min f_max target_length batch_lengths"
EVALUATION = f"project_name experiment_name run_id wandb_mode logger log_checkpoints report_audio dataset_dir orig_sample_rate read_from pack_dir {MODEL} {LOGMEL} weight_bits batch_size precision float32_matmul num_workers accelerator devices num_nodes strategy scan_backend deterministic"  # noqa: E501
TRAINING = f"{EVALUATION} resume subset val_fraction val_split roll_sec mixstyle_p mixstyle_alpha freqm timem timem_max_fraction mask_on dir_path dir_p mixup_alpha teacher teacher_input teacher_weight temperature n_epochs lr warmup_steps weight_decay accumulate_grad_batches gradient_clip_val check_val_every_n_epoch layer_decay freeze_epochs ema_decay qat_epochs compile seed"  # noqa: E501
FLAGS = {
    "train_base.py": f"{TRAINING} seeds cross_fit init_from pretrained pretrained_grid normalise",
    "train_device_specific.py": f"{TRAINING} ckpt_id only_devices finetune lora_rank lr_choices own_share keep",
    "test_only.py": f"{EVALUATION} ckpt_path",
}
DOCUMENT_DEFAULTS = (  # orig_sample_rate: the document's 44100 is what TAU22's files say
    "project_name DCASE25_Task1 num_workers 8 precision 32 check_val_every_n_epoch 10 orig_sample_rate None subset 25 "
    "n_epochs 150 batch_size 64 mixstyle_p 0.6 mixstyle_alpha 0.5 weight_decay 0.0001 roll_sec 0.1 lr 0.0005 "
    "warmup_steps 4000 sample_rate 32000 window_length 3072 hop_length 500 n_fft 4096 n_mels 256 target_length None "
    "freqm 48 timem 64 f_min 0.0 f_max None"
).split()


def flat(parsed) -> dict:
    """Field name -> value of a configuration and its parts."""
    values = {}
    for name, value in vars(parsed).items():
        values |= vars(value) if hasattr(value, "__dataclass_fields__") else {name: value}
    return values


@pytest.mark.parametrize("script", FLAGS)
def test_the_list_of_flags_is_frozen(script):
    assert set(flat(CONFIGS[script]())) == set(FLAGS[script].split())


def test_the_documents_defaults():
    got = flat(cli.parse(config.TrainConfig, "", args=[]))
    for name, value in zip(DOCUMENT_DEFAULTS[::2], DOCUMENT_DEFAULTS[1::2], strict=True):
        assert str(got[name]) == value, name
    from dcase.model.named import fill

    small = fill(cli.parse(config.TrainConfig, "", args=[]).model, 256, 65)
    assert (small.embed_dim, small.depth, small.patch_size, small.n_classes) == (384, 24, (16, 16), 10)
    stage_2 = flat(cli.parse(config.DeviceConfig, "", args=[]))
    assert (stage_2["n_epochs"], stage_2["warmup_steps"], stage_2["lr"]) == (50, 100, 0.0005)


OUT_OF_RANGE = (
    "n_epochs=0 check_val_every_n_epoch=0 accumulate_grad_batches=0 lr=-1 lr=inf warmup_steps=-1 weight_decay=nan "
    "gradient_clip_val=-1 qat_epochs=-1 seed=-1 seed=4294967296 layer_decay=0 layer_decay=1.1 freeze_epochs=150 "
    "ema_decay=-0.1 ema_decay=1"
).split()


@pytest.mark.parametrize("given", OUT_OF_RANGE)
def test_a_value_outside_a_flags_range_is_refused(given):
    name, value = given.split("=")
    assert refusal(lambda: config.FitConfig(**{name: float(value)})).startswith(f"--{name} must be ")


DOCUMENT_COMMANDS = """
train_base.py --project_name "DCASE25_Task1" --experiment_name "AUM_Small_Scratch" --embed_dim 384 --depth 24 --patch_size "16,16" --n_epochs 150 --batch_size 64 --lr 0.0005 --precision "32"
train_device_specific.py --ckpt_id abc --experiment_name "AUM_Small_DeviceSpecific" --embed_dim 384 --depth 24 --n_epochs 50 --lr 0.0005
test_only.py --ckpt_path "path/to/best-checkpoint.ckpt" --embed_dim 384 --depth 24 --patch_size "16,16" --batch_size 64 --precision "32"
"""  # noqa: E501


def parses(command: str) -> None:
    script, *args = shlex.split(command, comments=True)
    args = ["1" if "$" in arg else arg for arg in args]
    cli.parse(CONFIGS[script], "", args=args)


@pytest.mark.parametrize("command", DOCUMENT_COMMANDS.strip().splitlines())
def test_the_documents_commands_parse(command):
    parses(command)


README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]


def commands_in(text: str) -> list[str]:
    """Those of its code blocks, each once."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"^ *(?:\w+=\S+ )*python (?:-m )?((?:train|test|dcase)\S.*)$", blocks, re.MULTILINE)
    return list(dict.fromkeys(found))


def test_the_documents_show_every_script():
    shown = commands_in("\n".join(page.read_text() for page in PAGES))
    assert {command.split()[0] for command in shown} == set(CONFIGS)


def test_the_readme_alone_leads_from_the_data_to_a_prediction():
    shown = [command.split()[0] for command in commands_in(README.read_text().partition("## The data")[2])]
    way = "dcase.prepare train_base.py train_device_specific.py test_only.py dcase.compare dcase.predict".split()
    assert list(dict.fromkeys(shown))[:6] == way


# docs/extending.md shows flags and models that are there after its changes; its own test runs them.
SHOWN = "\n".join(page.read_text() for page in PAGES if page.name != "extending.md")


@pytest.mark.parametrize("command", commands_in(SHOWN))
def test_shown_commands_parse(command):
    parses(command)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def names_of(cls: type) -> list[str]:
    """Flags of a configuration: the fields of it and of its parts."""
    names = []
    for field in dataclasses.fields(cls):
        part = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        names += names_of(part) if dataclasses.is_dataclass(part) else [field.name]
    return names


@pytest.mark.parametrize("script", CONFIGS)
def test_help_explains_every_flag(script, capsys):
    shown = re.sub(r"[│╭╮╰╯─\s]+", " ", help_of(script, capsys).partition("options")[2])
    no_flags = {"fit", "paths", "run_ids", "recordings"}  # a part made by a lambda; what has no flag before it
    names = [name for name in names_of(CONFIGS[script]) if name not in no_flags]
    assert len(names) > 1
    for name in names:
        shown_at = re.findall(rf"--{name}\b(.*?)\((?:default|required)", shown)  # other flags' help may name it too
        without_type = [re.sub(r"\{[^}]*\}", "", text) for text in shown_at]
        assert any(re.search(r"\b[a-z]{2,}\b", text) for text in without_type), f"--{name} has no help: {shown_at}"


def helptexts(shown: str) -> list[list[str]]:
    """The lines of each flag's help, all padded to the width of their column."""
    rows = [line[2:].removesuffix(" │") for line in shown.splitlines() if line.startswith(("│ ", "  "))]
    column = next(row.index("show this help") for row in rows if "show this help" in row)
    texts = []
    for row in rows:
        if row[:column].strip():
            texts.append([])
        if row[:column].endswith("  ") and row[column:].strip():  # a longer name has a row of its own
            texts[-1].append(row[column:])
    return texts


def help_of(script: str, capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli.parse(CONFIGS[script], "", args=["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("script", ["train_base.py", "dcase.submit"])
def test_help_breaks_lines_where_they_are_full(script, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for lines in helptexts(help_of(script, capsys)):
        for line, following in zip(lines, lines[1:], strict=False):
            word = following.split()[0]
            assert len(line.rstrip()) + 1 + len(word) > len(line), f"a break before {word!r}: {lines}"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_description_is_as_wide_as_the_terminal_and_commands_stay(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        cli.parse(PredictConfig, predict.__doc__, args=["-h"])
    description = capsys.readouterr().out.partition("usage: ")[0].rstrip("\n")
    first, commands, last = description.split("\n\n")
    assert commands in predict.__doc__ and len(commands.splitlines()) == 5
    assert first.split() + last.split() == (predict.__doc__.replace(commands, "")).split()
    assert columns - 15 < max(map(len, last.splitlines())) <= columns
    assert description.startswith("Name the scenes of recordings: files, folders, or a list")


@pytest.mark.parametrize("name", ["dcase.predict", "dcase.report"])
def test_the_usage_of_a_module_is_how_it_is_run(name, script):
    assert f"usage: python -m {name} [-h]" in script(name, "--help").succeeded().out


def test_help_of_a_script_that_needs_a_checkpoint(script):
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", script("train_device_specific.py", "--help").succeeded().out).split())
    for flag in ("ckpt_id", "n_mels", "depth", "val_fraction", "freqm", "lr", "mixstyle_p", "n_epochs"):
        default = re.search(rf" --{flag} .*?\(default: (.*?)\)", shown)[1]
        expected = {"ckpt_id": "''", "lr": "0.1 times the checkpoint's", "mixstyle_p": "0", "n_epochs": "50"}
        assert default == expected.get(flag, "from the checkpoint"), flag


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("how", ["highest", "high", "medium"])
def test_how_float32_is_rounded_is_a_gpus_alone(device, how, monkeypatch):
    """Without a GPU: what torch is told where Lightning chose one."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    monkeypatch.setattr(fit, "make_trainer", lambda *_: SimpleNamespace(world_size=1, strategy=strategy))
    monkeypatch.setattr(fit, "choose", lambda *_: "triton")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        fit.check_machine(MachineConfig(float32_matmul=how))
        after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert after == (before if device == "cpu" else (how, how != "highest"))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
