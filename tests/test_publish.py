"""Published models: the folder, its round trip, the card, and what is refused."""

import copy
import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import RATE, ROOT, only_run, read_results, refusal, tone
from huggingface_hub import ModelCard, ModelHubMixin, PyTorchModelHubMixin
from stored_files import with_device_models
from torch import nn

import aum
import test_only
from aum import hub
from dcase import publish
from dcase.data.tau22 import SCENES
from dcase.deployment.prediction import load_module
from dcase.files import write_json
from dcase.model.named import ModelConfig, build
from dcase.runs.checkpoints import load_checkpoint, save_checkpoint
from dcase.runs.folder import Run
from dcase.runs.published import front_end_of, save_published
from dcase.runs.trained import load_trained

SHAPE = {"n_mels": 24, "target_length": 20, "patch_size": (8, 5), "embed_dim": 16, "depth": 2, "d_state": 3}
FRONT_END = {"sample_rate": 32000, "mean": -5.123456789, "f_max": None, "scenes": ["a", "ä"], "run": {"x": [1, 2]}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tiny(**overrides) -> aum.AudioMamba:
    torch.manual_seed(0)
    return aum.AudioMamba(aum.AuMConfig(**{**SHAPE, **overrides})).eval()


def clips() -> torch.Tensor:
    return torch.randn(2, 1, 24, 20, generator=torch.Generator().manual_seed(1))


# aum


@pytest.mark.parametrize("shape", [{}, {"pos_embed": True, "head": "linear"}, {"stem": (4,), "patch_size": (4, 5)}])
def test_round_trip_bit_for_bit(shape, tmp_path):
    model = tiny(**shape)
    model.save_pretrained(tmp_path / "m", front_end=FRONT_END)
    loaded = aum.AudioMamba.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded(clips()), model(clips())) and not loaded.training
    assert loaded.config == model.config and loaded.front_end == FRONT_END
    loaded.save_pretrained(str(tmp_path / "again"))  # the front end goes on with the model
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_without_a_front_end(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert "front_end" not in json.loads((tmp_path / "config.json").read_text())
    assert aum.AudioMamba.from_pretrained(tmp_path).front_end is None


def test_a_card_is_written_and_one_that_is_there_stays(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "audio_mamba"
    (tmp_path / "README.md").write_text("mine")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    tiny().save_pretrained(tmp_path, card="other")
    assert (tmp_path / "README.md").read_text() == "other"


def test_fields_can_be_overridden_where_the_weights_fit(tmp_path):
    tiny().save_pretrained(tmp_path)
    loaded = aum.AudioMamba.from_pretrained(tmp_path, drop_path=0.2, target_length=40)
    assert (loaded.config.drop_path, loaded.config.target_length, loaded.config.embed_dim) == (0.2, 40, 16)
    for overrides, part in [
        ({"embed_dims": 3}, "AuMConfig has no field embed_dims"),
        ({"depth": 0}, "depth is a whole number from 1"),
        ({"embed_dim": 32}, "model.safetensors does not fit config.json"),
    ]:
        with pytest.raises(ValueError, match=part) as error:
            aum.AudioMamba.from_pretrained(tmp_path, **overrides)
        assert "\n" not in str(error.value)


def test_what_json_cannot_hold_leaves_the_folder_alone(tmp_path):
    for front_end in ({"mean": torch.tensor(1.0)}, {"mean": float("nan")}):
        with pytest.raises(ValueError, match="front_end is not made of plain values"):
            tiny().save_pretrained(tmp_path / "m", front_end=front_end)
    assert not (tmp_path / "m").exists()


def damage_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def add_tensor(folder: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(state | {"more": torch.zeros(2)}, folder / "model.safetensors")


DAMAGES = {
    "flipped bit": (damage_weights, "model.safetensors is damaged: its checksum"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), "cut short"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(print)), "no .safetensors file"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be read (No such file"),
    "another tensor": (add_tensor, "does not fit config.json beside it: Unexpected key(s)"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read (No such file"),
    "half a config": (lambda f: (f / "config.json").write_text('{"depth": 2'), "config.json is no JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "another program's"),
    "of another program": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "another program's"),
    "a text": (lambda f: (f / "config.json").write_text('{"depth": "two"}'), "config.json makes no AuMConfig"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(damage, tmp_path):
    tiny().save_pretrained(tmp_path / "m")
    do, part = DAMAGES[damage]
    do(tmp_path / "m")
    with pytest.raises(ValueError) as error:
        aum.AudioMamba.from_pretrained(tmp_path / "m")
    assert part in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such_folder/at/all", "no name", "user/name"])
def test_neither_folder_nor_repository(name):
    with pytest.raises(ValueError, match=f"^{name} is no folder here, and could not be had from the Hugging Face Hub"):
        aum.AudioMamba.from_pretrained(name, local_files_only=True)


def test_the_mixins_own_folders_are_the_same(tmp_path):
    class Theirs(aum.AudioMamba, PyTorchModelHubMixin):
        save_pretrained = PyTorchModelHubMixin.save_pretrained
        from_pretrained = ModelHubMixin.__dict__["from_pretrained"]

        def __init__(self, config: aum.AuMConfig):
            super().__init__(config)

    torch.manual_seed(0)
    theirs = Theirs(aum.AuMConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(aum.AudioMamba.from_pretrained(tmp_path / "theirs")(clips()), theirs(clips()))
    tiny().save_pretrained(tmp_path / "ours", front_end=FRONT_END)
    assert torch.equal(Theirs.from_pretrained(tmp_path / "ours")(clips()), tiny()(clips()))


def test_a_repository_is_read_and_written_through_huggingface_hub(tmp_path, monkeypatch):
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            assert token == "t"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return type("Url", (), {"repo_id": f"user/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, hub / repo_id)
            return f"https://huggingface.co/{repo_id}/commit/1"

    def download(name, allow_patterns, revision, **options):
        assert revision == "main" and set(allow_patterns) == {"config.json", "model.safetensors"}
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = tiny()
    model.front_end = FRONT_END
    assert model.push_to_hub("nano", private=True, token="t").endswith("user/nano/commit/1")
    loaded = aum.AudioMamba.from_pretrained("user/nano", revision="main")
    assert torch.equal(loaded(clips()), model(clips())) and loaded.front_end == FRONT_END


def test_models_are_what_they_were(tmp_path):
    """Names, pickles and copies do not know of the Hub, and importing does not load it."""
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = aum.AudioMamba.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert set(vars(loaded)) - set(vars(model)) == {"front_end"}
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(other(clips()), model(clips()))
    code = "import aum, sys; print('huggingface_hub' in sys.modules, 'safetensors' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# dcase


@pytest.fixture
def call(call_main):
    return partial(call_main, publish.main)


@pytest.fixture(scope="module")
def published(general_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "pub"
    publish.publish(publish.PublishConfig(str(general_run / "checkpoints" / "best.ckpt"), str(folder)))
    return folder


@pytest.fixture
def pub(published, tmp_path, monkeypatch) -> Path:
    """The published run, in the current folder, to damage."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(published, "pub"))


@pytest.fixture
def by_device(general_run, tmp_path) -> Path:
    """The checkpoint of a run in which devices a and s1 have models of their own, and its results.json."""
    run = Run(tmp_path / "P" / "by_device")
    save_checkpoint(with_device_models(general_run / "checkpoints" / "best.ckpt", {"a": 1.5, "s1": 0.5}), run.best)
    shutil.copy(general_run / "config.json", run.folder)
    write_json(run.folder / "results.json", read_results(general_run) | {"device_models": ["a", "s1"]})
    return run.best


def logits(path, devices=(-1, 0, 3, 5)) -> torch.Tensor:
    sound = torch.from_numpy(tone("bus", "a", 1)).float().expand(len(devices), 1, -1)
    return load_module(path)(sound, torch.tensor(devices))


def test_the_next_command_is_quoted(call, general_run):
    done = call("--ckpt_path", general_run / "checkpoints" / "best.ckpt", "--out", "a b;c").succeeded()
    assert done.out.endswith("predict with it: python -m dcase.predict RECORDINGS --ckpt_path 'a b;c'\n")
    assert "dcase.predict recording.wav --ckpt_path 'a b;c'" in Path("a b;c/README.md").read_text()


def test_a_published_run_gives_the_same_logits(call, general_run, tmp_path):
    ckpt = general_run / "checkpoints" / "best.ckpt"
    done = call("--ckpt_path", ckpt, "--out", "pub")
    assert done.code == 0 and "pub/: config.json, model.safetensors, README.md" in done.out, done.err
    for path in ("pub", "pub/model.safetensors"):
        assert torch.equal(logits(path), logits(ckpt))
    front_end = json.loads((tmp_path / "pub" / "config.json").read_text())["front_end"]
    state = load_checkpoint(ckpt)["state_dict"]
    assert (front_end["mean"], front_end["std"]) == (state["logmel.mean"].item(), state["logmel.std"].item())
    assert front_end["scenes"] == list(SCENES) and front_end["orig_sample_rate"] == RATE
    assert str(tmp_path.parent) not in (tmp_path / "pub" / "config.json").read_text()  # no paths of this machine


def test_each_device_has_a_folder(call, by_device, tmp_path):
    assert call("--ckpt_path", by_device, "--out", "pub").code == 0
    assert sorted(path.name for path in (tmp_path / "pub").iterdir()) == ["a", "general", "s1"]
    assert torch.equal(logits("pub"), logits(by_device))
    assert torch.equal(logits("pub/a"), logits(by_device, (0,) * 4))  # alone it is every device's
    assert call("--ckpt_path", by_device, "--out", "one", "--device_id", "s1").code == 0
    assert torch.equal(logits("one"), logits(by_device, (3,) * 4))
    assert "It was fine-tuned for recordings of device s1" in (tmp_path / "one" / "README.md").read_text()
    again = load_trained("pub")
    assert again["device_ids"] == ["a", "s1"]
    call("--ckpt_path", by_device, "--out", "pub", "--device_id", "a").refused("--out pub: pub/general holds a model")
    call("--ckpt_path", by_device, "--out", "one").refused("--out one: one holds a model")
    shutil.copytree(tmp_path / "pub" / "a", tmp_path / "pub" / "b")
    assert "b is of another run than general, or of another device" in refusal(load_trained, "pub")


def test_weights_are_published_as_they_were_tested(call, general_run, tmp_path):
    save_checkpoint(with_device_models(general_run / "checkpoints" / "best.ckpt", {}, 8), tmp_path / "8.ckpt")
    assert call("--ckpt_path", "8.ckpt", "--out", "pub").code == 0
    weight = aum.AudioMamba.from_pretrained(tmp_path / "pub").layers[0].mixer.in_proj.weight
    assert all(len(row.unique()) <= 255 for row in weight) and torch.equal(logits("pub"), logits("8.ckpt"))
    assert "rounded to 8 bits" in (tmp_path / "pub" / "README.md").read_text()


def test_the_card_has_the_runs_figures(call, by_device, general_run, tmp_path):
    assert call("--ckpt_path", by_device, "--out", "pub", "--license", "mit").code == 0
    results = read_results(general_run)
    for part in ("general", "a", "s1"):
        card = ModelCard.load(tmp_path / "pub" / part / "README.md")
        assert card.data.license == "mit" and card.data.pipeline_tag == "audio-classification"
        assert card.data.datasets == ["data"] and card.data.metrics == ["accuracy"]
        assert card.data.eval_results[0].metric_value == results["macro_avg_acc"]
        row = re.search(r"^\| aum_tiny +\|(.*)\|$", card.text, re.MULTILINE)[1].split("|")
        accuracies = [results["scene_acc"][scene] for scene in SCENES] + [results["macro_avg_acc"]]
        assert [cell.strip() for cell in row] == ["-" if x is None else f"{100 * x:.2f}" for x in accuracies]
        assert f"{100 * results['device_acc']['s4']:.2f}" in card.text and results["note"] in card.text
        assert (
            f"{results['complexity']['macs']:,}" in card.text and "devices a, s1 have models of their own" in card.text
        )
        assert "Epochs: 4; highest learning rate: 0.01" in card.text


def test_figures_are_those_of_just_this_model_or_none(call, general_run, tmp_path):
    last = general_run / "checkpoints" / "last.ckpt"  # the test was of best.ckpt
    assert call("--ckpt_path", last, "--out", "pub").code == 0
    card = ModelCard.load(tmp_path / "pub" / "README.md")
    assert "No figures" in card.text and card.data.eval_results is None and card.data.datasets is None
    assert call("--ckpt_path", "pub", "--out", "again").code == 0  # a published model can be published
    assert torch.equal(logits("again"), logits(last))


def test_the_cards_snippets_run(call, by_device, tmp_path, capsys):
    assert call("--ckpt_path", by_device, "--out", "nano_a", "--device_id", "a").code == 0
    text = (tmp_path / "nano_a" / "README.md").read_text()
    soundfile.write(tmp_path / "recording.wav", tone("tram", "a", 2), RATE)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2 and all(len(code.strip().splitlines()) <= 6 for code in snippets)
    exec("".join(snippets), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.count("('") == 3 and first.endswith("0.5") and second in SCENES


def test_test_only_repeats_the_runs_figures(call_main, pub, general_run, learnable, tmp_path):
    flags = "--num_workers 0 --wandb_mode disabled --accelerator cpu --project_name T --batch_size 16".split()
    call_main(test_only.main, "--ckpt_path", pub, "--dataset_dir", learnable, *flags).succeeded()
    again, before = read_results(only_run(tmp_path / "T")), read_results(general_run)
    assert again.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-6)
    assert again == before


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content["front_end"])
    path.write_text(json.dumps(content))


EDITS = {
    "no mean": (lambda f: f.pop("mean"), "it lacks 'mean'"),
    "std 0": (lambda f: f.update(std=0), "mean, std or orig_sample_rate"),
    "mean": (lambda f: f.update(mean="x"), "could not convert"),
    "rate": (lambda f: f.update(sample_rate=-1), "--sample_rate must be at least 1"),
    "n_mels": (lambda f: f.update(n_mels=64), "64 mel bins, and the model has 32"),
    "scenes": (lambda f: f.update(scenes=[1, 2]), "scenes are no list of names"),
    "fewer scenes": (lambda f: f.update(scenes=["forest", "kitchen"]), "2 scenes, and the model has 10"),
    "device": (lambda f: f.update(devices=["a", "../b"]), "'../b' in its devices is no name"),
    "run": (lambda f: f.update(run=3), "config.json was not written by dcase.publish"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_front_end_that_cannot_be_is_refused(name, pub):
    change, part = EDITS[name]
    edit(pub / "config.json", change)
    message = refusal(load_trained, "pub")
    assert part in message and "pub/config.json" in message


def test_damaged_and_foreign_folders(pub, general_run):
    damage_weights(pub)
    assert "pub/model.safetensors is damaged" in refusal(load_trained, "pub")
    (pub / "model.safetensors").unlink()
    assert "pub/model.safetensors cannot be read" in refusal(load_trained, "pub")
    tiny().save_pretrained("bare")
    assert 'bare/config.json was not written by dcase.publish: under "front_end"' in refusal(load_trained, "bare")
    assert "is a run's folder" in refusal(load_trained, str(general_run))  # which has a config.json too


def test_bad_input_is_one_line(call, general_run, by_device, tmp_path):
    ckpt = general_run / "checkpoints" / "best.ckpt"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for args, parts in [
        (["--out", "x"], ["--ckpt_path is missing"]),
        (["--ckpt_path", ckpt], ["--out is missing"]),
        (["--ckpt_path", "none.ckpt", "--out", "x"], ["none.ckpt does not exist"]),
        (["--ckpt_path", ckpt, "--out", "full"], ["--out full holds something else"]),
        (["--ckpt_path", ckpt, "--out", "file"], ["--out file cannot be written"]),
        (
            ["--ckpt_path", ckpt, "--out", "x", "--device_id", "a"],
            ["--device_id a", "has models of general"],
        ),
        (["--ckpt_path", by_device, "--out", "x", "--device_id", "b"], ["has models of general, a, s1"]),
    ]:
        call(*args).refused(*parts)
    assert (tmp_path / "full" / "README.md").read_text() == (tmp_path / "file").read_text() == "mine"
    (by_device.parent.parent / "results.json").write_text("{}")
    call("--ckpt_path", by_device, "--out", "x").refused("results.json cannot be read (macro_avg_acc: Field required)")
    assert not (tmp_path / "x").exists()


def test_cp_mobile_is_refused(general_run, tmp_path):
    model: nn.Module = build(ModelConfig(model="cp_mobile"), 256, 65)
    front_end = front_end_of(load_checkpoint(general_run / "checkpoints" / "best.ckpt"), "general")
    front_end["run"]["model"] = "cp_mobile"
    message = refusal(save_published, model, tmp_path / "x", front_end, "")
    assert "only an Audio Mamba can be published, not cp_mobile" in message and not (tmp_path / "x").exists()


def test_a_kill_while_weights_are_written_leaves_no_other_models_configuration(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    model = aum.create_model("aum_tiny", depth=1, embed_dim=16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
