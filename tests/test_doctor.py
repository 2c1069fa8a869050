"""The doctor on a healthy machine, and with each thing broken in turn."""

import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import SMALL, refusal
from data_folder import SAMPLE_RATE, noise, write_data_folder

import aum
from aum.scan import BACKENDS, backends, build, cpu_kernels, cuda_kernels
from dcase import cli, errors
from dcase.data import tau22
from dcase.data.dataset import TAU22, Sound
from dcase.data.logmel import LogMelConfig
from dcase.data.pack import Pack
from dcase.data.packing import pack_clips
from dcase.data.tau22 import load_splits
from dcase.doctor import __main__ as doctor
from dcase.doctor import data as data_checks
from dcase.doctor import findings, machine
from dcase.doctor.data import OWN_DATA, DoctorConfig
from dcase.doctor.findings import Finding
from dcase.prepare import PrepareConfig, prepare


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, tmp_path):
    """Nothing that the machine has of W&B logins, data and choices of a backend."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("TAU22_DIR", raising=False)
    monkeypatch.delenv("AUM_SCAN_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A small data folder that was checked and packed."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    folder.mkdir()
    write_data_folder(folder)
    prepare(folder, PrepareConfig(num_workers=0))
    pack_clips(folder, PrepareConfig(pack=True, num_workers=0))
    return folder


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


def places(*flags) -> list[Finding]:
    return data_checks.places(cli.parse(DoctorConfig, "", args=list(map(str, flags))))


@pytest.fixture
def diagnose(data):
    """What the doctor finds in the data folder: diagnose("pack") is its last finding of that name."""

    def look(name: str, *flags) -> Finding:
        return {finding.name: finding for finding in places("--dataset_dir", data, *flags)}[name]

    return look


# As a program


def test_a_healthy_machine(data, call_main):
    done = call_main(doctor.main, "--dataset_dir", data)
    assert done.code == 0 and "FAIL" not in done.out, done.out
    for line in ("ok    packages ", "ok    imports ", "ok    scan: torch ", "ok    split lists", "ok    pack "):
        assert line in done.out
    text = " ".join(done.out.split())  # lines break where a folder's name is long
    for part in (
        "self-test passed: float32 on cpu, bfloat16 on cpu",
        "16 of split25 and 2 of test",
        "leaves out 0 recordings",
        "18 clips at 32000 Hz",
    ):
        assert part in text
    assert not (data.parent / "DCASE25_Task1").exists()


def test_a_broken_thing_ends_with_1_and_its_fix(data, call_main, monkeypatch):
    monkeypatch.setattr(machine, "imports", list)
    monkeypatch.setattr(machine, "scan_backends", list)
    next((data / "audio").iterdir()).unlink()
    shutil.rmtree(data / "pack")
    done = call_main(doctor.main, "--dataset_dir", data)
    assert done.code == 1
    assert "FAIL  recordings" in done.out and f"fix: python -m dcase.prepare --dataset_dir {data}\n" in done.out
    assert done.out.rstrip().endswith("Put right before training: recordings")


def test_flags_of_the_doctor(call_main):
    call_main(doctor.main, "--subset", "30").refused("--subset is 5, 10, 25, 50 or 100")


# Python and packages


@pytest.mark.parametrize("tested, state", [((3, 99), "FAIL"), ((3, 8), "warn")])
def test_another_python(tested, state, monkeypatch):
    monkeypatch.setattr(machine, "TESTED_PYTHON", tested)
    assert machine.python().state == state


def test_a_package_that_is_missing_stops_the_doctor_before_the_rest(tmp_path, monkeypatch, call_main):
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"torch=={torch.__version__.partition('+')[0]}\nno-such-package==1.0\nwandb==0.0.1\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", pins)
    done = call_main(doctor.main, "--not_even_a_flag")
    assert done.code == 1 and "not installed: no-such-package" in done.out and "pip install -r" in done.out
    assert "not the tested versions: wandb" in done.out and "(tested: 0.0.1)" in done.out
    assert "scan" not in done.out and "when this is put right" in done.out


def test_malware_is_named_and_never_imported(monkeypatch, call_main):
    real = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: "2.6.3" if name == "pytorch-lightning" else real(name))
    imported = []
    monkeypatch.setattr(machine.importlib, "import_module", imported.append)
    done = call_main(doctor.main)
    assert done.code == 1 and "pytorch-lightning 2.6.3 on PyPI was malware" in done.out and not imported


def test_without_requirements_and_with_torch_and_torchaudio_of_two_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path / "requirements.txt")
    versions = {"torch": "2.11.0+cu128", "torchaudio": "2.11.0"}
    monkeypatch.setattr(machine.metadata, "version", versions.get)
    (found,) = machine.packages()
    assert found.state == "warn" and "nothing to compare" in found.found
    versions["torchaudio"] = "2.10.0"
    found = machine.packages()[0]
    assert found.state == "FAIL" and "torch 2.11.0 and torchaudio 2.10.0: they must be of one version" in found.found


@pytest.mark.parametrize(
    "name, module, state", [("Broken-Package", "broken_package", "FAIL"), ("wandb",) * 2 + ("warn",)]
)
def test_a_package_that_cannot_be_imported(name, module, state, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text("raise OSError('libbroken.so.1: cannot open shared object file')\n")
    (tmp_path / f"{module}-1.0.dist-info").mkdir()
    (tmp_path / f"{module}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (tmp_path / "requirements.txt").write_text(f"{name}==1.0\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    (found,) = machine.imports()
    assert found.state == state and f"{name} cannot be imported: OSError: libbroken.so.1" in found.found


# GPU and compilers


@pytest.mark.parametrize(
    "driver, cuda, state, expected",
    [
        (None, "12.8", "warn", "runs on the CPU"),
        ("NVIDIA H100, 450.1", "12.8", "FAIL", "NVIDIA H100, 450.1 (name, driver), but"),
        ("NVIDIA H100, 450.1", "12.8", "FAIL", "driver is too old"),
        ("NVIDIA H100, 450.1", None, "FAIL", "a build without CUDA"),
    ],
)
def test_no_gpu_or_one_that_torch_does_not_see(driver, cuda, state, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n" if driver else "#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = machine.gpu()
    assert found.state == state and expected in found.found


@pytest.mark.parametrize("runs", [True, False])
def test_a_gpu_and_what_torch_was_made_for(runs, monkeypatch):
    """Stand in for torch with two GPUs; it may have been built without the second one's architecture."""

    def ones(*_, device):
        if device == "cuda:1" and not runs:
            raise RuntimeError("no kernel image is available")
        return torch.tensor(1.0)

    for name, value in {
        "is_available": True, "device_count": 2, "get_device_name": "NVIDIA Some", "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "ones", ones)
    found = machine.gpu()
    assert found.state == ("ok" if runs else "FAIL") and "NVIDIA Some (sm_90)" in found.found
    assert ("no kernel image" in found.found and "choose a build of torch" in found.found) is not runs


def test_no_cxx_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = machine.cxx_compiler()
    assert found.state == "-" and "no no-such-compiler" in found.found and found.fix == "apt install g++"


# The selective scan


def scans() -> dict[str, Finding]:
    caches = (backends._choose, build.library, backends._cpu_missing, cuda_kernels.missing)
    for cached in caches:
        cached.cache_clear()
    try:
        return {finding.name.removeprefix("scan: "): finding for finding in machine.scan_backends()}
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU according to torch, on which nothing is calculated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(aum, "self_test", lambda *_: None)


def test_gpu_backends_are_not_missed_without_a_gpu(only_cpu, monkeypatch):
    for name in ("mamba_ssm", "triton"):
        absent = replace(BACKENDS[name], devices=("cuda",), missing=lambda: "not installed")
        monkeypatch.setitem(BACKENDS, name, absent)
    monkeypatch.setattr(aum, "self_test", lambda *_: None)
    for name, found in scans().items():
        assert found.state == ("-" if name in ("mamba_ssm", "triton") else "ok") and not found.fix


def test_no_c_compiler(only_cpu, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    found = scans()
    assert found["cpu"].state == "warn" and "CC is no-such-compiler" in found["cpu"].found
    assert found["cpu"].fix == "apt install gcc libc6-dev" and found["taken"].found == "torch on cpu"


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "cannot be loaded: ImportError: undefined symbol: _ZN3c10"),
        ("bwd = 1", "selective_scan_cuda has no fwd"),
    ],
)
def test_mamba_ssm_that_is_broken(code, said, tmp_path, monkeypatch, gpu):
    (tmp_path / "selective_scan_cuda.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    found = scans()["mamba_ssm"]
    sys.modules.pop("selective_scan_cuda", None)
    assert found.state == "-" and said in found.found and "requirements-cuda.txt" in found.fix


def test_triton_that_is_broken(monkeypatch, gpu):
    broken = replace(BACKENDS["triton"], missing=lambda: "Triton cannot be imported: ImportError: libtriton")
    monkeypatch.setitem(BACKENDS, "triton", broken)
    found = scans()["triton"]
    assert found.state == "warn" and "libtriton" in found.found and "pip install" in found.fix


def test_a_scan_that_calculates_wrongly(only_cpu, monkeypatch):
    if "cpu" not in aum.available_backends():
        pytest.skip("no C compiler here")
    right = cpu_kernels.scan_forward

    def wrong(*args, **kwargs):
        y, *rest = right(*args, **kwargs)
        return (2 * y, *rest)

    monkeypatch.setattr(cpu_kernels, "scan_forward", wrong)
    found = scans()["cpu"]
    assert found.state == "FAIL" and "self-test: the scan backend 'cpu' calculates wrongly" in found.found


def test_a_backend_of_another_architecture_and_one_that_does_not_exist(only_cpu, monkeypatch):
    def fails(*args):
        raise aum.SelfTestFailed("no kernel image is available for execution on the device")

    monkeypatch.setattr(aum, "self_test", fails)
    monkeypatch.setenv("AUM_SCAN_BACKEND", "nonsense")
    found = scans()
    assert found["torch"].state == "FAIL" and "built for another GPU's architecture" in found["torch"].found
    assert found["taken"].state == "FAIL" and "nonsense" in found["taken"].found
    assert found["taken"].fix == "unset AUM_SCAN_BACKEND"


# W&B


@pytest.mark.parametrize(
    "code, key, said",
    [
        (None, "", "not logged in"),
        (None, "0" * 40, "logged in (not verified"),
        ("raise ImportError('no protobuf')", "", "cannot be used: ImportError: no protobuf"),
        ("import time; time.sleep(60)", "", "no answer in 0.5 s"),
    ],
)
def test_wandb_without_waiting_for_its_server(code, key, said, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": tmp_path, "WANDB_BASE_URL": "http://10.255.255.1", "WANDB_API_KEY": key}.items():
        monkeypatch.setenv(name, str(value))
    if code:
        (tmp_path / "wandb.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if "sleep" in (code or ""):
        monkeypatch.setattr(machine, "_WANDB_TIMEOUT", 0.5)
    found = machine.wandb_login()
    assert found.state == ("ok" if key else "warn") and said in found.found


# Data: the folder and its lists


def test_no_data_folder_given(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", str(tmp_path / "cache"))
    (found,) = [finding for finding in places() if not finding.name.startswith("disk")]
    assert found.state == "warn" and "synthetic, and make it at first use" in found.found
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache" / "audio_mamba" / "synth_tau_v2").mkdir(parents=True)
    assert "make it again at their next use" in places()[0].found


def test_a_data_folder_that_is_not_there_or_has_no_meta(data, diagnose):
    for path in data.glob("meta*.csv"):
        path.unlink()
    found = diagnose("data")
    assert found.state == "FAIL" and "meta.csv is missing" in found.found and not found.fix
    assert "python -m dcase.adopt" in found.found
    shutil.rmtree(data)
    found = diagnose("data")
    assert found.state == "FAIL" and f"{data} does not exist" in found.found and found.fix.startswith(f"ls {data}")


def test_tau22_dir_is_looked_at(data, monkeypatch):
    monkeypatch.setenv("TAU22_DIR", str(data))
    assert places()[0].found.startswith(str(data))


def taken_for_tau22(data: Path, monkeypatch) -> None:
    test_list = (data / "split_setup" / "test.csv").read_bytes()
    monkeypatch.setattr(tau22, "_TEST_SHA256", sha256(test_list).hexdigest())


@pytest.mark.parametrize("what", ["TAU22", "no lists", "own lists"])
def test_a_missing_split_list_is_not_fetched(what, data, monkeypatch):
    """TAU22's list is offered only where there are none of one's own."""
    path = data / "split_setup" / "split25.csv"
    path.unlink()
    if what == "TAU22":
        taken_for_tau22(data, monkeypatch)
    if what == "no lists":
        shutil.rmtree(data / "split_setup")
    missing = next(one for one in places("--dataset_dir", data) if one.name == "split lists" and path.name in one.found)
    assert missing.state == "warn" and "is missing: training fetches TAU22's" in missing.found
    assert ("data of your own need lists of their own" in missing.found) is (what != "TAU22")
    curl = f"curl -L --create-dirs -o {path} https://github.com/CPJKU/"
    assert missing.fix == OWN_DATA if what == "own lists" else missing.fix.startswith(curl)
    assert not path.exists()


@pytest.mark.parametrize("of_tau22", [False, True])
def test_a_damaged_split_list(of_tau22, data, diagnose, monkeypatch):
    path = data / "split_setup" / "split25.csv"
    path.write_text(path.read_text().replace("\ttram", "\ttramm"))
    if of_tau22:
        taken_for_tau22(data, monkeypatch)
    found = diagnose("split lists" if of_tau22 else "clips")
    assert found.state == "FAIL" and "'tramm'" in found.found
    put_aside = f"mv {path} {path}.old && curl -L --create-dirs -o {path} "
    assert found.fix.startswith(put_aside) if of_tau22 else found.fix == OWN_DATA  # an own list is not to be replaced


def test_a_scene_that_is_tested_but_not_trained(data, diagnose):
    path = data / "split_setup" / "split25.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(row for row in rows if not row.endswith("\ttram")))
    found = diagnose("scenes")
    assert found.state == "warn" and "no training clip of the scene(s) tram" in found.found and found.fix == OWN_DATA


def test_clips_that_meta_does_not_know(data, diagnose):
    (data / "meta_clean.csv").unlink()
    path = data / "meta.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = diagnose("clips")
    assert found.state == "FAIL" and "is not in meta.csv" in found.found and found.fix == OWN_DATA


# Data: recordings and their lengths


def test_missing_recordings(data, diagnose):
    shutil.rmtree(data / "audio")
    found = diagnose("recordings")
    assert found.state == "-" and "the pack has them" in found.found  # a pack is enough
    shutil.rmtree(data / "pack")
    found = diagnose("recordings")
    assert found.state == "FAIL" and "2 of the 2 WAV files of test are missing" in found.found


def with_another_length(data: Path, split: str, seconds: float) -> Path:
    """Write the last clip of a split anew, of so many seconds, without a pack or meta_clean.csv to hide it."""
    name = (data / "split_setup" / f"{split}.csv").read_text().split()[-2]
    soundfile.write(data / name, noise(0, int(seconds * SAMPLE_RATE)), SAMPLE_RATE)
    shutil.rmtree(data / "pack")
    (data / "meta_clean.csv").unlink()
    return data / name


def read_all(data: Path, sound: Sound) -> None:
    """As training reads its clips and those of the test."""
    train, test = load_splits(data, "split25", "test")
    like = TAU22(train, sound)
    for dataset in (like, TAU22(test, sound, like)):
        dataset.__getitems__(range(len(dataset)))


@pytest.mark.parametrize("split", ["split25", "test"])
def test_clips_of_several_lengths_are_refused_as_training_refuses_them(split, data, diagnose):
    assert diagnose("lengths").found == "3,200 samples at 32000 Hz (0.1 s) in all 18 clips"
    path = with_another_length(data, split, 0.2)
    found = diagnose("lengths")
    assert found.state == "FAIL" and "in all 18 clips: 1 have not the most frequent one, 4,410 samples" in found.found
    assert f"{path.name} has 8,820" in found.found and "cut them" in found.found and "--target_length" in found.found
    assert "exclude the others with `python -m dcase.prepare`" in found.found
    assert found.fix == f"python train_base.py --dataset_dir {data} --target_length 7"
    message = refusal(read_all, data, Sound(SAMPLE_RATE))
    assert f"{path.name} has 8820 samples" in message and "--target_length" in message
    read_all(data, Sound(SAMPLE_RATE, max_samples=8820))  # with --target_length any length will do
    found = diagnose("lengths", "--target_length", 7)
    assert found.state == "ok" and "any: --target_length 7 pads or crops every clip" in found.found
    assert diagnose("lengths", "--batch_lengths").state == "ok"
    found = diagnose("checked", "--batch_lengths")
    assert found.fix == f"python -m dcase.prepare --dataset_dir {data} --any_length"
    assert DoctorConfig(logmel=LogMelConfig(batch_lengths=True)).train(data).endswith(f"{data} --batch_lengths")


def test_several_lengths_in_a_pack(data, diagnose):
    with_another_length(data, "test", 0.2)
    pack_clips(data, PrepareConfig(pack=True, num_workers=0))
    assert diagnose("pack").state == "ok"
    found = diagnose("lengths")
    assert found.state == "FAIL" and "3,200 samples at 32000 Hz" in found.found and "has 6,400" in found.found
    assert "has 6400 samples" in refusal(read_all, data, Sound(32000, pack=Pack(data / "pack")))


def test_the_commands_have_the_flags_that_were_given(data):
    """At the default rates, so many frames would be another length of sound."""
    with_another_length(data, "test", 0.2)
    flags = ["--pack_dir", f"{data}/other pack", "--sample_rate", "8000", "--orig_sample_rate", "22050"]
    found = {one.name: one.fix for one in places("--dataset_dir", data, *flags)}
    flags = f"--pack_dir '{data}/other pack' --sample_rate 8000 --orig_sample_rate 22050"
    assert found["lengths"] == f"python train_base.py --dataset_dir {data} --target_length 2 {flags}"
    assert found["pack"] == f"python -m dcase.prepare --dataset_dir {data} --pack {flags}"
    assert found["checked"] == f"python -m dcase.prepare --dataset_dir {data} --orig_sample_rate 22050"
    shutil.rmtree(data / "audio")
    flags = ["--orig_sample_rate", "22050", "--target_length", "2"]
    found = {one.name: one.fix for one in places("--dataset_dir", data, *flags)}
    assert found["recordings"] == found["checked"]
    assert found["checked"] == f"python -m dcase.prepare --dataset_dir {data} --any_length --orig_sample_rate 22050"


def test_most_clips_cannot_be_excluded(data, diagnose):
    with_another_length(data, "test", 0.2)
    for i, path in enumerate(sorted((data / "audio").iterdir())[:10]):
        soundfile.write(path, noise(0, 5000 + i), SAMPLE_RATE)
    found = diagnose("lengths")
    assert "have not the most frequent one" in found.found and "dcase.prepare" not in found.found
    assert "(below: to 0.1136 s)" in found.found and found.fix.endswith("--target_length 8")  # nine tenths are not cut
    assert "more than half of the clips" in refusal(prepare, data, PrepareConfig(num_workers=0))


def test_lengths_of_another_rate_of_a_few_and_of_unreadable_files(data, diagnose, monkeypatch):
    path = with_another_length(data, "test", 0.1)
    soundfile.write(path, noise(0, 800), 8000)
    assert diagnose("lengths").state == "ok"  # another rate is no other length
    read_all(data, Sound(SAMPLE_RATE))
    path.write_bytes(b"Not Found")
    found = diagnose("recordings")
    assert found.state == "FAIL" and "in all 18 clips: 1 unreadable, empty or cut short" in found.found
    assert "dcase.prepare" in found.fix and diagnose("lengths").state == "ok"
    monkeypatch.setattr(data_checks, "_SECONDS", 0)
    assert "in 1 of 18 clips, drawn at random" in diagnose("lengths").found


def test_recordings_that_were_checked_or_not(data, diagnose):
    path = sorted((data / "audio").glob("*lisbon*"))[0]
    path.write_bytes(b"")
    prepare(data, PrepareConfig(num_workers=0))
    assert "leaves out 1 recordings" in diagnose("checked").found
    (data / "meta_excluded.csv").unlink()
    assert "is there without meta_excluded.csv" in diagnose("checked").found
    (data / "meta.csv").touch()
    assert "has changed since" in diagnose("checked").found
    (data / "meta_clean.csv").unlink()
    found = diagnose("checked")
    assert found.state == "warn" and found.fix == f"python -m dcase.prepare --dataset_dir {data}"


def test_recordings_of_other_rates(data, diagnose):
    """Files say their rate; the commands need no flag for it, and say which front end would fit."""
    assert diagnose("rate") == Finding("rate", "ok", "recordings are read at 44100 Hz")
    for i, path in enumerate(sorted((data / "audio").iterdir())):
        rate = 48000 if i < 2 else 16000
        soundfile.write(path, noise(i, rate // 10), rate)
    found = diagnose("pack")
    assert found.state == "FAIL" and "was resampled from 44100 to 32000 Hz" in found.found and "16000" in found.found
    assert found.fix == f"python -m dcase.prepare --dataset_dir {data} --pack --sample_rate 16000"
    pack_clips(data, PrepareConfig(pack=True, num_workers=0))
    for read_from in ("auto", "wav"):
        found = diagnose("rate", "--read_from", read_from)
        assert found.state == "warn" and "recordings are read at 16000 Hz" in found.found
        assert "of 18 looked at, 2 have 48000 Hz" in found.found and "end at 8000 Hz" in found.found
        front_end = "--sample_rate 16000 --window_length 1536 --hop_length 250 --n_fft 2048"
        assert found.fix == f"python train_base.py --dataset_dir {data} {front_end}"
        assert diagnose("lengths", "--read_from", read_from).state == "ok"
    assert diagnose("rate", "--orig_sample_rate", 44100).found.startswith("recordings are read at 44100 Hz")


def test_packs_that_do_not_fit(data, diagnose):
    found = diagnose("pack", "--sample_rate", 16000)
    assert found.state == "FAIL" and "was resampled from 44100 to 32000 Hz" in found.found and "16000" in found.found
    assert found.fix.endswith("--pack --sample_rate 16000")
    audio = sorted((data / "audio").iterdir())[0]
    audio.write_bytes(audio.read_bytes() + b"\0\0")
    found = diagnose("pack")
    assert found.state == "FAIL" and "have changed since" in found.found and "make it again" not in found.found
    assert found.fix == f"python -m dcase.prepare --dataset_dir {data} --pack"
    assert "--read_from wav: WAV files are read" in diagnose("pack", "--read_from", "wav").found
    next((data / "pack").glob("samples-*")).write_bytes(b"")
    assert "has 0 bytes" in diagnose("pack").found
    shutil.rmtree(data / "pack")
    assert diagnose("pack").state == "warn"


# Disk


def test_disks(data, diagnose, monkeypatch):
    assert diagnose("disk: runs").state == "ok"
    usage = namedtuple("usage", "total used free")
    for free, state in ((2e9, "warn"), (1e6, "FAIL")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: usage(1e12, 0, free))
        found = diagnose("disk: cache")
        assert found.state == state and "GB free" in found.found and "AUDIO_MAMBA_CACHE" in found.fix
    Path("DCASE25_Task1").write_text("no folder")
    found = diagnose("disk: runs")
    assert found.state == "FAIL" and "cannot be written" in found.found


# How it is told


def test_a_check_that_fails_itself_is_a_finding():
    (found,) = findings.looked("some", lambda: 1 / 0)
    assert found.state == "FAIL" and "ZeroDivisionError" in found.found


def test_the_conclusion():
    good, better, bad = (Finding("x", state, "") for state in ("ok", "warn", "FAIL"))
    assert findings.summary([good]) == "Everything works."
    assert "these could be better: x" in findings.summary([good, better])
    assert findings.summary([good, better, bad]) == "Put right before training: x"


@pytest.mark.parametrize(
    "args, env, told",
    [
        (("--dataset_dir", "nowhere"), {}, 1),
        (("--accelerator", "tpux"), {}, 1),
        ((), {"AUM_SCAN_BACKEND": "nonsense"}, 1),
        (("--lr", "-1"), {}, 0),  # a mistaken flag
    ],
)
def test_the_scripts_point_to_the_doctor_once(args, env, told, monkeypatch, call_main):
    import train_base

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = call_main(train_base.main, *SMALL, *args)
    assert done.code == 2 and done.error.count("dcase.doctor") == told
    assert done.error.endswith(errors.DOCTOR) or not told
