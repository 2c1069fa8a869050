"""W&B and TensorBoard: what they are given, and checkpoints that come back from W&B on another machine.

No server is asked. What `wandb sync` would send is read from the offline run's own file; a stand-in takes the place of
W&B's API.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
import wandb
from conftest import FIT, SMALL, only_run, read_results, refusal
from forked import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_file import Kept, read_kept

import train_base
import train_device_specific
from dcase.runs import artifacts
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import TrainConfig
from dcase.runs.folder import Run, RunConfig
from dcase.runs.loggers import MetricsCsv, Wandb, drop_from, tensorboard_logger, wandb_logger

OFFLINE = ["--wandb_mode", "offline", "--project_name", "P"]
DEVICE_FIT = "--n_epochs 2 --batch_size 8 --warmup_steps 2 --check_val_every_n_epoch 1 --only_devices a".split()
QUIET = "--num_workers 0 --accelerator cpu".split()


def kept_of(run: Path) -> Kept:
    return read_kept(next(run.glob(f"wandb/offline-run-*/run-{run.name}.wandb")))


@pytest.fixture(scope="module")
def offline(learnable, tmp_path_factory) -> Path:
    """The folder of a general model's run, logged offline with its checkpoints."""
    cwd = tmp_path_factory.mktemp("offline")
    args = ["--dataset_dir", learnable, *SMALL, *FIT, *OFFLINE, "--run_id", "general", "--log_checkpoints"]
    run_script("train_base.py", *args, cwd=cwd).succeeded()
    return only_run(cwd / "P")


@pytest.fixture(scope="module")
def kept(offline) -> Kept:
    return kept_of(offline)


# W&B


def test_metrics_are_grouped_and_have_the_step_as_axis(kept, offline):
    assert kept.axes == {"trainer/global_step": "", "*": "trainer/global_step"}
    steps = {name: [row["trainer/global_step"] for row in kept.history if name in row] for name in ("train/loss", "lr")}
    assert steps == {"train/loss": [2, 5, 8, 11], "lr": [2, 5, 8, 11]}  # 4 epochs of 3 steps
    assert [row["trainer/global_step"] for row in kept.history if "val/macro_avg_acc" in row] == [8, 11]
    names = {name for row in kept.history for name in row if not name.startswith("_")}
    assert {name.split("/")[0] for name in names} == {"train", "val", "test", "lr", "trainer"}
    in_csv = {line.split(",")[1] for line in (offline / "metrics.csv").read_text().splitlines()[1:]}
    assert in_csv <= names | {"train/loss_step"}


def test_the_summary_has_the_best_epoch_and_the_test(kept, offline):
    best = load_checkpoint(offline / "checkpoints" / "last.ckpt")["callbacks"]["KeepCheckpoints"]
    assert kept.summary["best/macro_avg_acc"] == best["best_score"]
    assert kept.summary["best/loss"] == pytest.approx(best["best_loss"])
    assert kept.summary["best/epoch"] == best["best_epoch"] + 1
    results = read_results(offline)
    assert kept.summary["test/macro_avg_acc"] == pytest.approx(results["macro_avg_acc"])
    assert kept.summary["complexity/macs"] == results["complexity"]["macs"]


def test_configuration_code_version_and_group(kept, offline):
    made = json.loads((offline / "config.json").read_text())
    assert kept.config["fit"] == made["config"]["fit"] and kept.config["commit"] == made["commit"]
    assert (kept.run.run_id, kept.run.run_group, kept.run.job_type) == ("general", "general", "general")
    assert kept.run.project == "P" and kept.run.display_name == "aum_tiny"


def test_charts_and_mistakes_are_there_and_no_recording(kept, offline):
    shown = {name.rpartition("/")[0] for row in kept.history for name in row if name.endswith("_type")}
    wanted = {"confusion", "devices", "confusion_matrix_table", "device_bars_table", "mistakes"}
    assert {f"test/{name}" for name in wanted} <= shown
    results = read_results(offline)
    (path,) = [path for path in kept.files if "mistakes" in path]
    (folder,) = offline.glob("wandb/offline-run-*/files")
    table = json.loads((folder / path).read_text())
    assert table["columns"] == ["log-mel", "file", "device", "scene", "predicted", "confidence"]
    wrong = results["n_clips"] * (1 - results["acc"])
    assert 1 <= len(table["data"]) <= min(12, wrong)  # one of a location
    for _, filename, device, scene, predicted, confidence in table["data"]:
        assert filename.startswith(f"audio/{scene}-") and filename.endswith(f"-{device}.wav")
        assert predicted != scene and 0 < confidence <= 1
    (with_pictures,) = [artifact for artifact in kept.artifacts if "mistakes" in artifact.name]
    pictures = [entry for entry in with_pictures.manifest.contents if entry.path.endswith(".png")]
    assert len(pictures) == len(table["data"]) and matplotlib.image.imread(pictures[0].local_path).shape[0] == 32  # mel
    sent = kept.files + [entry.path for artifact in kept.artifacts for entry in artifact.manifest.contents]
    assert not [path for path in sent if path.endswith((".wav", ".mp3", ".flac"))]


def test_checkpoints_are_an_artifact_where_asked_for(kept, offline):
    versions = [artifact for artifact in kept.artifacts if artifact.type == artifacts.KIND]
    assert len(versions) == 3  # two validations, and the end
    held = {entry.path for entry in versions[-1].manifest.contents}
    assert versions[-1].name == "checkpoints-general"
    assert held == {"config.json", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}


def test_stage_2_stands_in_the_group_of_its_stage_1(offline, learnable):
    args = ["--ckpt_id", "general", "--dataset_dir", learnable, *DEVICE_FIT, *QUIET, *OFFLINE, "--run_id", "tuned"]
    run_script("train_device_specific.py", *args, cwd=offline.parent.parent).succeeded()
    kept = kept_of(offline.parent / "tuned")
    assert (kept.run.run_group, kept.run.job_type) == ("general", "device-specific")
    assert kept.config["ckpt_id"] == "general" and "a/best/epoch" not in kept.summary  # the last one is taken
    assert not [artifact for artifact in kept.artifacts if artifact.type == artifacts.KIND]  # nobody asked


def test_a_series_of_seeds_or_the_user_names_the_group(tmp_path, monkeypatch):
    given = {}

    def init(**kwargs):
        given.update(kwargs)
        raise RuntimeError("enough")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_RUN_GROUP", "many")
    (tmp_path / "config.json").write_text('{"config": {}}')
    assert wandb_logger(TrainConfig(run=RunConfig(wandb_mode="offline")), Run(tmp_path)) is None
    assert given["group"] == "many"


# Checkpoints in W&B


class Server:
    """A stand-in for W&B: keeps what is logged, and gives it back."""

    def __init__(self):
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    def log_artifact(self, artifact) -> None:
        entries = artifact.manifest.entries
        held = {name: Path(entry.local_path).read_bytes() for name, entry in entries.items()}
        self.artifacts[f"P/{artifact.name}:latest"] = held

    def artifact(self, name: str, type: str):
        self.asked.append(name)
        if name not in self.artifacts:
            raise ValueError(f"artifact {name} not found")

        def download(root: str) -> str:
            for path, content in self.artifacts[name].items():
                (Path(root) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(root) / path).write_bytes(content)
            return root

        return SimpleNamespace(download=download)


@pytest.fixture
def server(monkeypatch) -> Server:
    server = Server()
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "Api", lambda **options: server)
    return server


@pytest.fixture
def elsewhere(server, general_run, tmp_path, monkeypatch) -> Path:
    """Another machine's project folder, empty, where W&B has the checkpoints of run "general"."""
    here = Path(shutil.copytree(general_run, tmp_path / "here" / "P" / "general"))
    Wandb(SimpleNamespace(experiment=server), Run(here), keeps_checkpoints=True).keep_checkpoints()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    return Path("P")


def call(monkeypatch, main, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args), "--project_name", "P"])
    main()


@pytest.fixture
def without_wandb(monkeypatch) -> None:
    """The stand-in takes no metrics."""
    monkeypatch.setattr("dcase.runs.loggers.wandb_logger", lambda *args: None)


def test_resume_fetches_a_run_that_is_not_here(elsewhere, general_run, without_wandb, monkeypatch, capsys):
    call(monkeypatch, train_base.main, "--resume", "general", "--logger", "wandb")
    assert "fetched from W&B: P/general/" in capsys.readouterr().out
    assert read_results(elsewhere / "general")["confusion"] == read_results(general_run)["confusion"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["general"]  # nothing is left of the download


def test_ckpt_id_fetches_a_run_that_is_not_here(elsewhere, learnable, without_wandb, monkeypatch, capsys):
    args = ["--ckpt_id", "general", "--dataset_dir", learnable, *DEVICE_FIT, *QUIET, "--n_epochs", "1"]
    call(monkeypatch, train_device_specific.main, *args, "--run_id", "tuned")
    assert "fetched from W&B: P/general/" in capsys.readouterr().out
    assert (elsewhere / "tuned" / "checkpoints" / "best.ckpt").is_file()


def test_what_is_here_comes_first(elsewhere, server, general_run):
    shutil.copytree(general_run, elsewhere / "general")
    (elsewhere / "general" / "mark").write_text("mine")
    artifacts.fetch("P", "general", None)
    assert not server.asked and (elsewhere / "general" / "mark").exists()


@pytest.mark.parametrize(
    "run_id, mode, logger, logged_in",
    [
        *(("general", None, "none", True), ("general", None, "tensorboard", True)),
        *(("general", "offline", None, True), ("general", "disabled", None, True)),
        *(("general", None, None, False), ("../general", None, None, True)),
    ],
)
def test_wandb_is_not_asked_where_it_is_not_used(elsewhere, server, monkeypatch, run_id, mode, logger, logged_in):
    monkeypatch.setattr(wandb, "login", lambda **options: logged_in)
    artifacts.fetch("P", run_id, mode, logger)
    assert not server.asked and not (elsewhere / "general").exists()


def test_a_run_that_wandb_has_not_either(elsewhere, server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_base.py", "--resume", "other", "--project_name", "P"])
    said = refusal(train_base.main)
    assert "--resume other: no such run in P/" in said
    assert "W&B cannot give them (ValueError: artifact P/checkpoints-other:latest not found)" in capsys.readouterr().out
    assert not list(Path("P").glob("*"))


def test_half_an_artifact_is_no_run(elsewhere, server, capsys):
    del server.artifacts["P/checkpoints-general:latest"]["config.json"]
    artifacts.fetch("P", "general", None)
    assert "holds no config.json" in capsys.readouterr().out and not list(Path("P").glob("*"))


def test_files_in_the_making_are_not_uploaded(server, general_run, tmp_path):
    here = Path(shutil.copytree(general_run, tmp_path / "P" / "general"))
    (here / "checkpoints" / ".last.ckpt.123").write_bytes(b"half")
    (here / "checkpoints" / "a").mkdir()
    (here / "checkpoints" / "a" / "outcome.json").write_text("{}")
    artifacts.upload(server, Run(here))
    held = set(server.artifacts["P/checkpoints-general:latest"])
    assert held == {
        "config.json", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/a/outcome.json"
    }  # fmt: skip


def test_an_upload_that_fails_leaves_the_run_alone(general_run, capsys):
    def full(artifact):
        raise OSError("quota exceeded")

    logger = Wandb(SimpleNamespace(experiment=SimpleNamespace(log_artifact=full)), Run(general_run), True)
    logger.keep_checkpoints()
    logger.summarise({"best/epoch": 1})  # does nothing
    said = capsys.readouterr().out
    assert said.count("W&B has failed (quota exceeded); the run goes on without it") == 1


def test_log_checkpoints_needs_wandb():
    assert "--logger wandb" in refusal(lambda: RunConfig(logger="tensorboard", log_checkpoints=True))
    assert "--wandb_mode not disabled" in refusal(lambda: RunConfig(wandb_mode="disabled", log_checkpoints=True))


# TensorBoard, and nothing


def test_tensorboard_has_what_metrics_csv_has(learnable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--run_id", "one", "--logger", "tensorboard"]
    call(monkeypatch, train_base.main, *args)
    assert "TensorBoard: tensorboard --logdir P/one/tensorboard" in capsys.readouterr().out
    run = tmp_path / "P" / "one"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert set(events.Tags()["scalars"]) == {name for _, name, _ in rows}
    for name in {name for _, name, _ in rows}:
        kept = [(int(step), pytest.approx(float(value), rel=1e-6)) for step, other, value in rows if other == name]
        assert [(scalar.step, scalar.value) for scalar in events.Scalars(name)] == kept, name
    assert {"test/confusion", "test/devices"} <= set(events.Tags()["images"])


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    def lacks(*args, **kwargs):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr("dcase.runs.loggers.TensorBoardLogger.__init__", lacks)
    assert "pip install -r requirements.txt" in refusal(tensorboard_logger, Run(tmp_path))


def test_no_logger_leaves_metrics_csv_alone(learnable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [arg for arg in SMALL if arg not in ("--wandb_mode", "disabled")]
    fit = [*FIT, "--n_epochs", "1", "--run_id", "one", "--logger", "none"]
    call(monkeypatch, train_base.main, "--dataset_dir", learnable, *args, *fit)
    assert "W&B" not in capsys.readouterr().out
    assert not (tmp_path / "P/one/wandb").exists() and not (tmp_path / "P/one/tensorboard").exists()
    assert "test/macro_avg_acc" in (tmp_path / "P/one/metrics.csv").read_text()
    assert torch.isfinite(torch.tensor(read_results(tmp_path / "P/one")["loss"]))
    steps_and_names = logged(tmp_path / "P/one/metrics.csv")
    call(monkeypatch, train_base.main, "--resume", "one")  # of a run that is over: it tests once more
    assert sorted(logged(tmp_path / "P/one/metrics.csv")) == sorted(steps_and_names)


def logged(path):
    return [tuple(line.split(",")[:2]) for line in path.read_text().splitlines()[1:]]


def test_what_a_resumed_run_repeats_is_dropped_from_metrics_csv_and_nothing_else(tmp_path):
    metrics = MetricsCsv(tmp_path / "metrics.csv")
    for step in range(3):
        metrics.log_metrics({"a/train/loss": 0.5, "b/train/loss": 0.25, "epoch": step}, step)
    with open(metrics.path, "a") as file:
        file.write("3,b/tra")  # a kill cuts the last row
    drop_from([metrics], 1, "b/")
    kept = [("0", "a/train/loss"), ("0", "b/train/loss"), ("1", "a/train/loss"), ("2", "a/train/loss")]
    assert logged(metrics.path) == kept
