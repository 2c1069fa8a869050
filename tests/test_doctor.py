"""The doctor on a healthy machine, and with each thing broken in turn."""

import shutil
import sys
import time
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import SMALL
from data_folder import SAMPLE_RATE, noise, write_data_folder

import aum
from aum.scan import BACKENDS, backends, build
from dcase import errors
from dcase.data import tau22
from dcase.data.dataset import TAU22, Sound
from dcase.data.pack import Pack
from dcase.data.packing import pack_clips
from dcase.data.tau22 import load_splits
from dcase.doctor import __main__ as doctor
from dcase.doctor import findings, lengths, machine
from dcase.doctor.data import OWN_DATA
from dcase.doctor.findings import Finding
from dcase.prepare import PrepareConfig, prepare

ASKED = ("--orig_sample_rate", "44100", "--sample_rate", "32000")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, tmp_path):
    """Whatever the machine has of W&B, data and choices of a backend."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("TAU22_DIR", raising=False)
    monkeypatch.delenv("AUM_SCAN_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path) -> Path:
    """A small data folder that was checked and packed."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_data_folder(folder)
    prepare(folder, PrepareConfig(num_workers=1))
    pack_clips(folder, PrepareConfig(pack=True, num_workers=1))
    return folder


@pytest.fixture
def diagnose(data, monkeypatch, capsys):
    """What the doctor finds in the data folder: diagnose("pack") is its finding of that name."""

    def look(name: str) -> Finding:
        config = doctor.DoctorConfig(dataset_dir=str(data))
        found = [finding for finding in doctor.places(config) if finding.name == name]
        assert found, "nothing of that name"
        return found[-1]

    return look


def run_doctor(monkeypatch, capsys, *args) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        errors.run(doctor.main)
    return end.value.code, capsys.readouterr().out


# Healthy


def test_a_healthy_machine(data, monkeypatch, capsys):
    code, out = run_doctor(monkeypatch, capsys, "--dataset_dir", data)
    assert code == 0 and "FAIL" not in out, out
    for line in ("ok    packages ", "ok    imports ", "ok    scan: torch ", "ok    split lists", "ok    pack "):
        assert line in out
    text = " ".join(out.split())  # lines break where a folder's name is long
    for part in (
        "self-test passed: float32 on cpu, bfloat16 on cpu",
        "16 of split25 and 2 of test",
        "leaves out 0 recordings",
        "18 clips at 32000 Hz",
    ):
        assert part in text
    assert not (data.parent / "DCASE25_Task1").exists()


def test_a_broken_thing_ends_with_1_and_its_fix(data, monkeypatch, capsys):
    next((data / "audio").iterdir()).unlink()
    shutil.rmtree(data / "pack")
    code, out = run_doctor(monkeypatch, capsys, "--dataset_dir", data)
    assert code == 1
    assert "FAIL  recordings" in out and f"fix: python -m dcase.prepare --dataset_dir {data}\n" in out
    assert out.rstrip().endswith("1 of these must be put right before training: recordings")


def test_flags_of_the_doctor(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--subset", "30"])
    with pytest.raises(SystemExit, match="2"):
        errors.run(doctor.main)
    assert "--subset is 5, 10, 25, 50 or 100" in capsys.readouterr().err


# Python and packages


def test_another_python(monkeypatch):
    monkeypatch.setattr(machine, "TESTED_PYTHON", (3, 99))
    assert machine.python().state == "FAIL"
    monkeypatch.setattr(machine, "TESTED_PYTHON", (3, 8))
    assert machine.python().state == "warn"


def test_a_package_that_is_missing_stops_the_doctor_before_the_rest(tmp_path, monkeypatch, capsys):
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"torch=={torch.__version__.partition('+')[0]}\nno-such-package==1.0\nwandb==0.0.1\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", pins)
    code, out = run_doctor(monkeypatch, capsys, "--not_even_a_flag")
    assert code == 1 and "not installed: no-such-package" in out and f"pip install -r {pins}" in out
    assert "not the tested versions: wandb" in out and "(tested: 0.0.1)" in out
    assert "scan" not in out and "when this is put right" in out


def test_malware_is_named_and_never_imported(monkeypatch, capsys):
    real = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: "2.6.3" if name == "pytorch-lightning" else real(name))
    imported = []
    monkeypatch.setattr(machine.importlib, "import_module", imported.append)
    code, out = run_doctor(monkeypatch, capsys)
    assert code == 1 and "pytorch-lightning 2.6.3 on PyPI was malware" in out and not imported


def test_without_requirements_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path / "requirements.txt")
    (found,) = machine.packages()
    assert found.state == "warn" and "nothing to compare" in found.found


def test_torch_and_torchaudio_of_two_versions(monkeypatch):
    versions = {"torch": "2.11.0+cu128", "torchaudio": "2.11.0"}
    monkeypatch.setattr(machine, "version_of", versions.get)
    assert machine.torch_pair().state == "ok"
    versions["torchaudio"] = "2.10.0"
    found = machine.torch_pair()
    assert found.state == "FAIL" and "2.11.0+cu128 and 2.10.0: they must be of one version" in found.found


@pytest.mark.parametrize("name, state", [("broken-package", "FAIL"), ("wandb", "warn")])
def test_a_package_that_cannot_be_imported(name, state, tmp_path, monkeypatch):
    module = name.replace("-", "_")
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


def fake_driver(tmp_path, monkeypatch, said: str) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{machine.os.environ['PATH']}")


def test_no_gpu_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: "")
    found = machine.gpu()
    assert found.state == "warn" and "CPU" in found.found


def test_a_gpu_that_torch_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fake_driver(tmp_path, monkeypatch, "NVIDIA H100, 450.1")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = machine.gpu()
    assert found.state == "FAIL" and "NVIDIA H100, 450.1" in found.found and "driver is too old" in found.found
    monkeypatch.setattr(torch.version, "cuda", None)
    found = machine.gpu()
    assert found.state == "FAIL" and "a build without CUDA" in found.found and "pip install" in found.fix


@pytest.mark.parametrize(
    "made_for, capability, runs",
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80", "sm_90"], (8, 6), True),  # later of the same major version
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),  # PTX is compiled for it by the driver
        (["sm_100", "sm_120"], (12, 0), True),
        (["sm_90a"], (7, 5), False),
        ([], (9, 0), False),
    ],
)
def test_architectures(made_for, capability, runs):
    assert machine.runs_on(made_for, *capability) is runs


@pytest.mark.parametrize("capability, state", [((9, 0), "ok"), ((6, 1), "FAIL")])
def test_a_gpu_and_what_torch_was_made_for(capability, state, monkeypatch):
    """Without a GPU: what torch says of one."""
    for name, value in {
        "is_available": True, "device_count": 1, "get_arch_list": ["sm_80", "sm_90"],
        "get_device_name": "NVIDIA Some", "get_device_capability": capability,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = machine.gpu()
    assert found.state == state and f"NVIDIA Some (sm_{capability[0]}{capability[1]})" in found.found
    assert ("choose a build of torch" in found.found) is (state == "FAIL")


def test_no_cxx_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = machine.cxx_compiler()
    assert found.state == "-" and "no no-such-compiler" in found.found and found.fix == "apt install g++"


# The selective scan


def scans() -> dict[str, Finding]:
    backends._choose.cache_clear()
    try:
        return {finding.name.removeprefix("scan: "): finding for finding in machine.scan_backends()}
    finally:
        backends._choose.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as torch's answer goes, on which nothing is calculated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(aum, "self_test", lambda *_: None)


@pytest.mark.parametrize("name", ["mamba_ssm", "triton"])
def test_what_is_for_gpus_alone_is_no_fault_of_a_machine_without_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = replace(BACKENDS[name], devices=("cuda",), missing=lambda: "not installed")
    monkeypatch.setitem(BACKENDS, name, absent)
    found = scans()[name]
    assert found.state == "-" and "for NVIDIA GPUs" in found.found and not found.fix


def test_no_c_compiler(monkeypatch):
    for cached in (build.library, backends._cpu_missing):
        cached.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        found = scans()
    finally:
        for cached in (build.library, backends._cpu_missing):
            cached.cache_clear()
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
    from aum.scan import cuda_kernels

    (tmp_path / "selective_scan_cuda.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    cuda_kernels.missing.cache_clear()
    try:
        found = scans()["mamba_ssm"]
    finally:
        cuda_kernels.missing.cache_clear()
        sys.modules.pop("selective_scan_cuda", None)
    assert found.state == "-" and said in found.found and "requirements-cuda.txt" in found.fix


def test_triton_that_is_broken(monkeypatch, gpu):
    broken = replace(BACKENDS["triton"], missing=lambda: "Triton cannot be imported: ImportError: libtriton")
    monkeypatch.setitem(BACKENDS, "triton", broken)
    found = scans()["triton"]
    assert found.state == "warn" and "libtriton" in found.found and "pip install" in found.fix


def test_a_scan_that_calculates_wrongly(monkeypatch):
    from aum.scan import cpu_kernels

    if "cpu" not in aum.available_backends():
        pytest.skip("no C compiler here")
    right = cpu_kernels.scan_forward

    def wrong(*args, **kwargs):
        y, *rest = right(*args, **kwargs)
        return (2 * y, *rest)

    monkeypatch.setattr(cpu_kernels, "scan_forward", wrong)
    found = scans()["cpu"]
    assert found.state == "FAIL" and "self-test: the scan backend 'cpu' calculates wrongly" in found.found


def test_a_backend_of_another_architecture(monkeypatch):
    def fails(*args):
        raise aum.SelfTestFailed("no kernel image is available for execution on the device")

    monkeypatch.setattr(aum, "self_test", fails)
    found = scans()["torch"]
    assert found.state == "FAIL" and "built for another GPU's architecture" in found.found


def test_a_backend_asked_for_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("AUM_SCAN_BACKEND", "nonsense")
    found = scans()
    assert found["taken"].state == "FAIL" and "nonsense" in found["taken"].found
    assert found["taken"].fix == "unset AUM_SCAN_BACKEND" and found["torch"].state == "ok"


# W&B


@pytest.fixture
def no_wandb(tmp_path, monkeypatch):
    """A home without a W&B login, whose server does not answer."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://10.255.255.1")
    return tmp_path


def test_wandb_logged_in_or_not_without_waiting_for_its_server(no_wandb, monkeypatch):
    found = machine.wandb_login()
    assert found.state == "warn" and "not logged in" in found.found and found.fix == "wandb login"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    begun = time.monotonic()
    found = machine.wandb_login()
    assert found.state == "ok" and "logged in" in found.found
    assert time.monotonic() - begun < machine._WANDB_TIMEOUT


def test_wandb_that_is_broken_or_never_answers(no_wandb, monkeypatch):
    (no_wandb / "wandb.py").write_text("raise ImportError('no protobuf')")
    monkeypatch.setenv("PYTHONPATH", str(no_wandb))
    found = machine.wandb_login()
    assert found.state == "warn" and "cannot be used: ImportError: no protobuf" in found.found
    (no_wandb / "wandb.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(machine, "_WANDB_TIMEOUT", 0.5)
    assert "no answer in 0.5 s" in machine.wandb_login().found


# Data


def test_no_data_folder_given(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", str(tmp_path / "cache"))
    (found,) = [finding for finding in doctor.places(doctor.DoctorConfig()) if not finding.name.startswith("disk")]
    assert found.state == "warn" and "synthetic, and make it at first use" in found.found
    assert not (tmp_path / "cache").exists()


def test_a_data_folder_that_is_not_there(data, diagnose):
    shutil.rmtree(data)
    found = diagnose("data")
    assert found.state == "FAIL" and f"{data} does not exist" in found.found


def test_tau22_dir_is_looked_at(data, monkeypatch):
    monkeypatch.setenv("TAU22_DIR", str(data))
    assert doctor.places(doctor.DoctorConfig())[0].found.startswith(str(data))


def taken_for_tau22(data: Path, monkeypatch) -> None:
    test_list = (data / "split_setup" / "test.csv").read_bytes()
    monkeypatch.setattr(tau22, "_TEST_SHA256", sha256(test_list).hexdigest())


@pytest.mark.parametrize("what", ["TAU22", "no lists", "own lists"])
def test_a_missing_split_list_is_not_fetched(what, data, diagnose, monkeypatch):
    """TAU22's list is offered only where there are none of one's own."""
    path = data / "split_setup" / "split25.csv"
    path.unlink()
    if what == "TAU22":
        taken_for_tau22(data, monkeypatch)
    if what == "no lists":
        shutil.rmtree(data / "split_setup")
    found = [one for one in doctor.places(doctor.DoctorConfig(str(data))) if one.name == "split lists"]
    missing = next(one for one in found if path.name in one.found)
    assert missing.state == "warn" and "is missing: training fetches TAU22's" in missing.found
    assert ("data of your own need lists of their own" in missing.found) is (what != "TAU22")
    curl = f"curl -L --create-dirs -o {path} https://github.com/CPJKU/"
    assert missing.fix == OWN_DATA if what == "own lists" else missing.fix.startswith(curl)
    assert not path.exists()


def test_a_damaged_split_list(data, diagnose):
    path = data / "split_setup" / "split25.csv"
    path.write_text(path.read_text().replace("\ttram", "\ttramm"))
    found = diagnose("split lists")
    assert found.state == "FAIL" and "'tramm'" in found.found
    assert found.fix == OWN_DATA and "docs/extending.md" in found.fix  # a user's own list is never to be overwritten


def test_a_damaged_list_of_tau22_is_put_aside(data, diagnose, monkeypatch):
    taken_for_tau22(data, monkeypatch)
    path = data / "split_setup" / "split25.csv"
    path.write_text("<html>Not Found</html>")
    found = diagnose("split lists")
    assert found.state == "FAIL" and found.fix.startswith(f"mv {path} {path}.old && curl -L --create-dirs -o {path} ")


def test_a_folder_without_meta(data, diagnose):
    for path in data.glob("meta*.csv"):
        path.unlink()
    found = diagnose("data")
    assert found.state == "FAIL" and "meta.csv is missing" in found.found and not found.fix
    assert 'docs/extending.md, "A data set"' in found.found


def test_a_scene_that_is_tested_alone(data, diagnose):
    path = data / "split_setup" / "split25.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(row for row in rows if not row.endswith("\ttram")))
    found = diagnose("scenes")
    assert found.state == "warn" and "no training clip of the scene(s) tram, of which the test has 1" in found.found
    assert found.fix == OWN_DATA


def test_clips_that_meta_does_not_know(data, diagnose):
    (data / "meta_clean.csv").unlink()
    path = data / "meta.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = diagnose("clips")
    assert found.state == "FAIL" and "is not in meta.csv" in found.found and found.fix == OWN_DATA


def test_missing_recordings(data, diagnose):
    shutil.rmtree(data / "audio")
    found = diagnose("recordings")
    assert found.state == "-" and "the pack has them" in found.found  # a pack alone is enough
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
def test_clips_of_several_lengths_are_refused_as_training_refuses_them(split, data, diagnose, monkeypatch, capsys):
    assert diagnose("lengths").found == "3,200 samples at 32000 Hz (0.1 s) in all 18 clips"
    path = with_another_length(data, split, 0.2)
    found = diagnose("lengths")
    assert found.state == "FAIL" and "in all 18 clips: 1 have not the most frequent one, 4,410 samples" in found.found
    assert f"{path.name} has 8,820" in found.found and "cut them" in found.found and "--target_length" in found.found
    assert "leave the others out with `python -m dcase.prepare`" in found.found
    assert found.fix == f"python train_base.py --dataset_dir {data} --target_length 7"
    with pytest.raises(errors.UserError, match=rf"{path.name} has 8820 samples .* --target_length"):
        read_all(data, Sound(SAMPLE_RATE))
    code, out = run_doctor(monkeypatch, capsys, "--dataset_dir", data)
    assert code == 1 and "must be put right before training: lengths" in out
    read_all(data, Sound(SAMPLE_RATE, max_samples=8820))  # with --target_length any length will do
    code, out = run_doctor(monkeypatch, capsys, "--dataset_dir", data, "--target_length", "7")
    assert code == 0 and "any: --target_length 7 pads or crops every clip" in out


def test_several_lengths_in_a_pack(data, diagnose):
    with_another_length(data, "test", 0.2)
    pack_clips(data, PrepareConfig(pack=True, num_workers=1))
    assert diagnose("pack").state == "ok"
    found = diagnose("lengths")
    assert found.state == "FAIL" and "3,200 samples at 32000 Hz" in found.found and "has 6,400" in found.found
    with pytest.raises(errors.UserError, match="has 6400 samples"):
        read_all(data, Sound(32000, pack=Pack(data / "pack")))


def test_the_commands_have_the_flags_that_were_given(data):
    """At the default rates, so many frames would be another length of sound."""
    with_another_length(data, "test", 0.2)
    given = {"orig_sample_rate": 22050, "sample_rate": 8000, "subset": 25, "pack_dir": str(data / "other pack")}
    found = {one.name: one.fix for one in doctor.places(doctor.DoctorConfig(str(data), **given))}
    flags = f"--pack_dir '{data}/other pack' --sample_rate 8000 --orig_sample_rate 22050"
    assert found["lengths"] == f"python train_base.py --dataset_dir {data} {flags} --target_length 2"
    assert found["pack"] == f"python -m dcase.prepare --dataset_dir {data} --pack {flags}"
    assert found["checked"] == f"python -m dcase.prepare --dataset_dir {data} --orig_sample_rate 22050"
    config = doctor.DoctorConfig(str(data), orig_sample_rate=22050, target_length=2)
    (checked,) = [one.fix for one in doctor.places(config) if one.name == "checked"]
    assert checked.endswith(f"{data} --orig_sample_rate 22050 --any_length")
    shutil.rmtree(data / "audio")
    found = {one.name: one.fix for one in doctor.places(doctor.DoctorConfig(str(data), **given))}
    assert found["recordings"] == found["checked"] and "--orig_sample_rate 22050" in found["recordings"]


def test_most_clips_cannot_be_left_out(data, diagnose):
    with_another_length(data, "test", 0.2)
    for i, path in enumerate(sorted((data / "audio").iterdir())[:10]):
        soundfile.write(path, noise(0, 5000 + i), SAMPLE_RATE)
    found = diagnose("lengths")
    assert "have not the most frequent one" in found.found and "dcase.prepare" not in found.found
    with pytest.raises(errors.UserError, match="more than half of the clips are at fault"):
        prepare(data, PrepareConfig(num_workers=1))


def test_another_rate_is_no_other_length(data, diagnose):
    path = with_another_length(data, "test", 0.1)
    soundfile.write(path, noise(0, 800), 8000)
    assert diagnose("lengths").state == "ok"
    read_all(data, Sound(SAMPLE_RATE))


def test_lengths_are_looked_at_for_some_seconds_only(data, diagnose, monkeypatch):
    with_another_length(data, "test", 0.1)
    monkeypatch.setattr(lengths, "_SECONDS", 0)
    found = diagnose("lengths")
    assert found.state == "ok" and "in 1 of 18 clips, drawn at random" in found.found


def test_recordings_that_cannot_be_read(data, diagnose):
    with_another_length(data, "test", 0.1).write_bytes(b"Not Found")
    assert "in all 18 clips: 1 unreadable, empty or cut short" in diagnose("recordings").found
    assert diagnose("recordings").state == "FAIL" and "dcase.prepare" in diagnose("recordings").fix
    assert diagnose("lengths").state == "ok"


def test_recordings_that_nobody_has_checked(data, diagnose):
    (data / "meta_excluded.csv").unlink()
    assert diagnose("checked").state == "warn"
    (data / "meta_clean.csv").unlink()
    found = diagnose("checked")
    assert found.state == "warn" and found.fix == f"python -m dcase.prepare --dataset_dir {data}"


def test_recordings_that_were_left_out(data, diagnose):
    (path, *_) = sorted((data / "audio").glob("*lisbon*"))
    path.write_bytes(b"")
    prepare(data, PrepareConfig(num_workers=1))
    assert "leaves out 1 recordings" in diagnose("checked").found
    (data / "meta.csv").touch()
    assert "has changed since" in diagnose("checked").found


def test_packs_that_do_not_fit(data, diagnose):
    audio = sorted((data / "audio").iterdir())[0]
    content = audio.read_bytes()
    audio.write_bytes(content + b"\0\0")
    found = diagnose("pack")
    assert found.state == "FAIL" and "have changed since" in found.found
    assert found.fix == f"python -m dcase.prepare --dataset_dir {data} --pack"
    other = doctor.DoctorConfig(dataset_dir=str(data), sample_rate=16000)
    (found,) = [finding for finding in doctor.places(other) if finding.name == "pack"]
    assert "resampled from 44100 to 32000 Hz, not from 44100 to 16000" in found.found
    assert found.fix.endswith("--pack --sample_rate 16000")
    next((data / "pack").glob("samples-*")).write_bytes(b"")
    assert "has 0 bytes" in diagnose("pack").found
    shutil.rmtree(data / "pack")
    assert diagnose("pack").state == "warn"


# Disk


def test_disks(data, diagnose, tmp_path, monkeypatch):
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


def test_what_it_comes_to():
    good, better, bad = (Finding("x", state, "") for state in ("ok", "warn", "FAIL"))
    assert findings.summary([good]) == "Everything works."
    assert "it could do better with: x" in findings.summary([good, better])
    assert "1 of these must be put right before training: x" in findings.summary([good, better, bad])


@pytest.mark.parametrize(
    "args, env",
    [(("--dataset_dir", "nowhere"), {}), (("--accelerator", "tpux"), {}), ((), {"AUM_SCAN_BACKEND": "nonsense"})],
)
def test_the_scripts_point_to_the_doctor_once(args, env, monkeypatch, capsys):
    import train_base

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_base.py", *SMALL, *args])
    with pytest.raises(SystemExit, match="2"):
        errors.run(train_base.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(errors.DOCTOR) and error.count("dcase.doctor") == 1


def test_a_script_does_not_point_to_the_doctor_for_a_mistaken_flag(monkeypatch, capsys):
    import train_base

    monkeypatch.setattr(sys, "argv", ["train_base.py", "--lr", "-1"])
    with pytest.raises(SystemExit, match="2"):
        errors.run(train_base.main)
    assert "dcase.doctor" not in capsys.readouterr().err
