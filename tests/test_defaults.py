"""Defaults that belong to a model: each reaches the configuration, a flag wins, and a resumed run keeps its own."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_results
from data_folder import FIT, SMALL

import train_base
from dcase import cli
from dcase.data.augment import Augment
from dcase.data.labels import SCENES
from dcase.data.logmel import LogMel
from dcase.files import write_json
from dcase.model import named
from dcase.model.named import ModelConfig
from dcase.report.run_files import Finished
from dcase.report.setup import flags
from dcase.runs.config import BaseConfig, parse_base, to_plain
from dcase.runs.defaults import DEFAULTS, NAMES, taken
from dcase.runs.folder import RunConfig

FRONT_END = SMALL[SMALL.index("--orig_sample_rate") :]  # without the flags of an Audio Mamba's shape
OTHER = {  # for each flag with defaults of a model: a value that no model has
    "batch_size": 7, "lr": 0.123, "warmup_steps": 77, "mixstyle_p": 0.11, "mixstyle_alpha": 0.22, "freqm": 33,
    "timem": 3, "weight_bits": 32, "gradient_clip_val": 0.7,
}  # fmt: skip


def parsed(*args) -> dict:
    """Flag -> value of train_base.py's configuration."""
    config, run = parse_base("", list(map(str, args)))
    assert run is None
    return cli.flags_of(config)


def own(model: str) -> dict:
    """Flag -> value that a model should have by default."""
    return cli.flags_of(BaseConfig()) | DEFAULTS.get(model, {}) | {"model": model}


@pytest.mark.parametrize("model", named.names())
def test_a_models_defaults_reach_the_configuration_and_nothing_else_changes(model):
    assert parsed("--model", model) == parsed(f"--model={model}") == own(model)


def test_defaults_are_flags_of_models_that_exist():
    assert set(DEFAULTS) <= set(named.names())
    assert set(NAMES) <= set(cli.flags_of(BaseConfig()))


def test_without_a_model_the_users_documents_defaults_hold():
    assert parsed() == cli.flags_of(BaseConfig()) == own("aum_small")
    assert not {"aum_tiny", "aum_small", "aum_base"} & set(DEFAULTS)


def test_cp_mobiles_are_the_baselines():
    """As CPJKU/dcase2025_task1_baseline's train_base.py has them."""
    assert DEFAULTS["cp_mobile"] == {
        "batch_size": 256, "lr": 0.005, "warmup_steps": 2000, "mixstyle_p": 0.4, "mixstyle_alpha": 0.3, "freqm": 48,
        "timem": 0, "mask_on": "mel", "normalise": False, "gradient_clip_val": 0, "weight_bits": 16,
    }  # fmt: skip
    shared = {"n_epochs": 150, "weight_decay": 0.0001, "roll_sec": 0.1, "n_mels": 256, "n_fft": 4096, "subset": 25}
    assert parsed("--model", "cp_mobile").items() >= shared.items()


@pytest.mark.parametrize("model", DEFAULTS)
def test_a_flag_wins(model):
    given = {name: value for name, value in OTHER.items() if name in DEFAULTS[model]}
    args = [text for name, value in given.items() for text in (f"--{name}", value)]
    assert parsed(*args, "--model", model) == own(model) | given


def test_cp_mobile_with_our_input_norm_and_masks_is_a_matter_of_flags():
    got = parsed(*"--model cp_mobile --normalise True --mask_on log_mel --gradient_clip_val 1".split())
    assert got == own("cp_mobile") | {"normalise": True, "mask_on": "log_mel", "gradient_clip_val": 1.0}


@pytest.mark.parametrize("model", ["aum_small", "aum_nano", "cp_mobile"])
def test_help_shows_the_models_defaults(model, capsys):
    with pytest.raises(SystemExit):
        parse_base("", ["--help", "--model", model])
    shown = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for name in NAMES:
        found = re.search(rf"--{name} (?:INT|FLOAT|{{\S+}}) .*?\(default: (\S+)\)", shown)
        assert found[1] == str(own(model)[name]), name


def test_the_line_names_what_no_flag_has_changed():
    line = taken(parse_base("", ["--model", "aum_nano", "--lr", "0.1", "--freqm", "3"])[0])
    assert line.startswith("defaults of aum_nano (measured, docs/training.md): ")
    expected = own("aum_nano")
    named_there = dict(pair.split() for pair in line.partition(": --")[2].split(" --"))
    assert named_there == {name: str(expected[name]) for name in NAMES if name not in ("lr", "freqm")}
    assert "--lr 0.0005 " in taken(parse_base("", [])[0])


@pytest.mark.parametrize("model", named.names())
def test_a_report_shows_what_differs_from_the_models_defaults(model):
    config, _ = parse_base("", ["--model", model, "--lr", "0.1"])
    run = Finished(Path("nowhere"), {}, to_plain(config), {})
    assert [flag.name for flag in flags(run) if flag.differs] == ["model", "lr"][model == "aum_small" :]


@pytest.mark.parametrize("model", DEFAULTS)
def test_a_resumed_run_keeps_its_own(model, tmp_path, monkeypatch):
    """One from before its model had defaults, too."""
    monkeypatch.chdir(tmp_path)
    saved = to_plain(BaseConfig(run=RunConfig(project_name="P"), model=ModelConfig(model)))
    del saved["normalise"], saved["augment"]["mask_on"]  # flags that are newer than the run
    write_json(tmp_path / "P" / "old" / "config.json", {"config": saved, "scenes": list(SCENES)})
    config, run = parse_base("", ["--resume", "old", "--project_name", "P"])
    assert run.id == "old" and config.model.model == model
    before, now = cli.flags_of(BaseConfig()), cli.flags_of(config)
    assert {name: now[name] for name in NAMES} == {name: before[name] for name in NAMES}


@pytest.mark.parametrize("normalise", [False, True])
def test_a_run_takes_them_and_says_so(normalise, learnable, call_main, tmp_path, monkeypatch):
    seen, log_mel = [], Augment.log_mel

    def watched(self, x, silence, *lengths):
        seen.append(silence.item())
        return log_mel(self, x, silence, *lengths)

    monkeypatch.setattr(Augment, "log_mel", watched)
    monkeypatch.syspath_prepend(ROOT)
    args = [
        "--model",
        "cp_mobile",
        "--dataset_dir",
        learnable,
        *FRONT_END,
        *FIT,
        "--n_epochs",
        1,
        "--project_name",
        "P",
    ]
    args += ["--run_id", "one", "--report_audio", "False"] + ["--normalise", "True"] * normalise
    done = call_main(train_base.main, *args).succeeded()
    (line,) = (line for line in done.out.splitlines() if line.startswith("defaults of cp_mobile"))
    assert "--mask_on mel" in line and "--lr" not in line and ("--normalise False" in line) == (not normalise)
    run = tmp_path / "P" / "one"
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["augment"]["mask_on"] == "mel" and config["fit"]["lr"] == 0.01 and config["normalise"] == normalise
    assert read_results(run)["complexity"]["weight_bits"] == 16 and (run / "stored").is_dir()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    logmel = LogMel(parse_base("", list(map(str, args)))[0].logmel, 8000)
    logmel.mean, logmel.std = state["logmel.mean"], state["logmel.std"]
    assert ((logmel.mean.item(), logmel.std.item()) == (0, 1)) == (not normalise)
    assert seen and set(seen) == {logmel.silence.item()}
