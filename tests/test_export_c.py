"""Models as C: the stored model's logits for any way of pushing samples, and what is refused."""

import ctypes
import dataclasses
import os
import re
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal
from test_export import shaken

from aum.scan.build import NotAvailable, find_compiler
from dcase import export
from dcase.data.logmel import LogMelConfig
from dcase.data.tau22 import DataConfig
from dcase.deployment import c_format
from dcase.export import ExportConfig, Mismatch
from dcase.model.named import ModelConfig
from dcase.runs.config import EvalConfig
from dcase.runs.stored import GENERAL
from dcase.training.lit import SceneClassifier

try:
    COMPILER = find_compiler()
except NotAvailable as error:
    pytest.skip(f"there is no C compiler: {error}", allow_module_level=True)

FAST = ("-std=c99", "-O1")  # compiling takes longer than running
STRICT = (*FAST, "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Werror")
RATE, SAMPLES = 12000, 6000  # resampled to 8 kHz
FRONT_END = LogMelConfig(sample_rate=8000, window_length=200, hop_length=100, n_fft=256, n_mels=64)
SMALL = {"embed_dim": 12, "d_state": 3}


def made(name: str, config: LogMelConfig, rate: int, frames: int, device_ids=(), **overrides) -> SceneClassifier:
    """A module with random weights, statistics and normalisation."""
    model = ModelConfig(model=name, **overrides)
    module = SceneClassifier(
        EvalConfig(model=model, logmel=config, data=DataConfig(orig_sample_rate=rate)), frames, device_ids
    )
    module.logmel.mean.fill_(-5)
    module.logmel.std.fill_(3)
    shaken(module.model)
    for i, part in enumerate(module.device_models.values()):
        part.load_state_dict({k: v * (1.1 + 0.1 * i) for k, v in module.model.state_dict().items()})
    return module.eval()


def clips(n: int, samples: int) -> torch.Tensor:
    """Noise of several levels, with silence and full scale among them."""
    torch.manual_seed(0)
    x = torch.randn(n, samples) * torch.logspace(-4, -1, n).unsqueeze(1)
    x[0], x[1] = 0, x[1].sign()
    return x


CASES = {
    "aum_nano, 44.1 kHz": (("aum_nano", LogMelConfig(), 44100, 65), {}, 44100, 16),
    "8 bit, devices, cut": (
        ("aum_nano_8bit", dataclasses.replace(FRONT_END, target_length=33), 8000, 33, ("a", "s1")),
        {**SMALL, "stem": (4, 10), "stem_blocks": 2, "depth": 3, "d_conv": 3, "freq_norm": 0.0},
        4000,
        8,
    ),
    "padded, window as long as the FFT, other classes": (
        ("aum_nano", LogMelConfig(8000, 128, 50, 128, 40, 100, 3500, target_length=50), 22050, 50),
        {**SMALL, "stem": (5,), "stem_blocks": 0, "patch_size": (3, 1), "expand": 1},
        6000,
        16,
    ),
    "rows of 4 tokens, panels that are filled up, an odd window": (
        ("aum_nano", LogMelConfig(8000, 99, 50, 128, 16, 100, 3500, target_length=16), 8000, 16),
        {"embed_dim": 5, "expand": 1, "d_state": 3, "stem_blocks": 1, "depth": 2},
        900,
        8,
    ),
    "cp_mobile, 8 bit, a device": (("cp_mobile", FRONT_END, 8000, 41, ("b",)), {}, 4000, 8),
    "cp_mobile, 16 bit, upwards": (("cp_mobile", FRONT_END, 6000, 41), {}, 3000, 16),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(c_format, "FLAGS", STRICT)


@pytest.mark.parametrize("name", CASES)
def test_c_gives_pytorchs_logits(name, quick, tmp_path):
    arguments, overrides, samples, bits = CASES[name]
    module = made(*arguments, **overrides)
    parity = export.export_c(module, bits, clips(6, samples), tmp_path / "out")
    assert parity.difference < 1e-5 and parity.changed == 0 and parity.clips == 7
    there = {path.name for path in (tmp_path / "out").iterdir()}
    sources = {"scene.c", "scene.h", "weights.h", "main.c", "Makefile", "README.md"}
    assert there == sources | {"test_clip.wav", "test_logits.txt"}
    assert "@" not in (tmp_path / "out/README.md").read_text()
    logits = [line.split() for line in (tmp_path / "out/test_logits.txt").read_text().splitlines()]
    assert [line[0] for line in logits] == [GENERAL, *module.device_models]
    if module.device_models:
        assert logits[0][1:] != logits[1][1:]
        check = partial(
            subprocess.run, ["make", "-s", "check", "CFLAGS=-O1"], cwd=tmp_path / "out", capture_output=True
        )
        done = check(text=True)
        assert done.returncode == 0 and "largest difference" in done.stdout, done.stderr
        for wrong in (str(float(logits[0][1]) + 0.001), "nan"):
            changed = "\n".join(" ".join([line[0], wrong, *line[2:]]) for line in logits)
            (tmp_path / "out/test_logits.txt").write_text(changed + "\n")
            assert check().returncode != 0


# The functions


@pytest.fixture(scope="module")
def module() -> SceneClassifier:
    """A model whose scan matters: in one with initial weights, it moves logits by less than the check allows."""
    torch.manual_seed(5)
    module = made("aum_nano_8bit", FRONT_END, RATE, 41, ("a",), **SMALL, depth=1)
    with torch.no_grad():
        for model in (module.model, *module.device_models.values()):
            mixer = model.layers[0].mixer
            for suffix in ("", "_b"):
                getattr(mixer, f"x_proj{suffix}").weight.mul_(4)
                getattr(mixer, f"dt_proj{suffix}").bias.add_(3)
            mixer.out_proj.weight.mul_(8)
    return module


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    state = {GENERAL: module.model.state_dict(), "a": module.device_models["a"].state_dict()}
    c_format.write(module, state, 8, SAMPLES, folder)
    c_format.compile_program(folder, folder / "scene", FAST)
    return folder


class Scene:
    """scene.c as a library."""

    def __init__(self, folder: Path, flags: tuple[str, ...] = FAST):
        path = folder / f"scene{''.join(flags)}.so"
        if not path.exists():
            command = [*COMPILER, *flags, "-fPIC", "-shared", "-o", path, folder / "scene.c", "-lm"]
            subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.scene_push.restype = self.library.scene_push_int16.restype = ctypes.c_size_t
        self.state = ctypes.create_string_buffer(b"\xff" * c_format.sizeof(folder / "scene"))
        self.library.scene_init(self.state)

    def push(self, samples: np.ndarray) -> int:
        """Return how many were taken."""
        name = "scene_push_int16" if samples.dtype == np.int16 else "scene_push"
        samples = np.ascontiguousarray(samples)
        pointer = samples.ctypes.data_as(ctypes.c_void_p)
        return getattr(self.library, name)(self.state, pointer, ctypes.c_size_t(len(samples)))

    def logits(self) -> tuple[int, np.ndarray]:
        logits = np.full(10, 7, np.float32)
        return self.library.scene_logits(self.state, logits.ctypes.data_as(ctypes.c_void_p)), logits


@pytest.mark.parametrize("chunk", [1, 4095, 10**6])
def test_samples_are_pushed_in_any_pieces(folder, chunk):
    x = clips(3, SAMPLES).numpy()
    expected = c_format.run_program(folder / "scene", torch.from_numpy(x), RATE).numpy()
    scene, found, left = Scene(folder), [], x.flatten()
    while len(left):
        taken = scene.push(left[:chunk])
        left = left[taken:]
        full, logits = scene.logits()
        assert full in (0, 1)
        if full:
            found.append(logits)
    assert np.array_equal(np.stack(found), expected)


def test_the_callers_long_doubles_stay_whole(folder):
    """Code that leaves registers of MMX in use turns the next long double into NaN."""
    scene = Scene(folder, c_format.FLAGS)
    scene.push(clips(2, SAMPLES).numpy()[1])
    assert scene.logits()[0] == 1 and np.longdouble("1") / 4 == 0.25


def test_integers_are_what_their_floats_are_and_devices_have_their_own_model(folder, module):
    x = c_format.test_clip(SAMPLES, RATE)
    scene, found = Scene(folder), []
    for samples, device in ((x, 0), (x.astype(np.float32) / 32768, 0), (x, 1)):
        assert scene.library.scene_set_device(scene.state, device) == 0
        assert scene.push(samples) == len(x) and scene.push(samples) == 0
        found.append(scene.logits()[1])
    assert np.array_equal(found[0], found[1]) and np.abs(found[0] - found[2]).max() > 0.01
    assert scene.library.scene_set_device(scene.state, 2) == -1 == scene.library.scene_set_device(scene.state, -1)


def test_the_log_mel_is_pytorchs_in_quiet_mel_bins_beside_a_loud_tone(tmp_path):
    module = made("aum_nano", LogMelConfig(), 44100, 65, **SMALL)
    c_format.write(module, {GENERAL: module.model.state_dict()}, 16, 44100, tmp_path)
    c_format.compile_program(tmp_path, tmp_path / "scene", FAST)
    tone = 0.9 * torch.sin(torch.arange(44100))  # 7 kHz
    with torch.no_grad():
        expected = export.log_mels(module, tone[None])[0, 0].numpy()
    scene = Scene(tmp_path)
    scene.push(tone.numpy())
    start = 4 * int(re.search(r"define LOG_MEL (\d+)", (tmp_path / "weights.h").read_text())[1])
    found = np.frombuffer(scene.state.raw[start : start + expected.nbytes], np.float32).reshape(expected.shape)
    assert np.abs(found - expected).max() < 0.01  # 0.12 where the resampling kernels are off by 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38])
def test_a_clip_with_a_sample_that_is_no_sound_is_dropped(folder, value):
    x = clips(2, SAMPLES).numpy()
    wrong = x[1].copy()
    wrong[5] = value
    scene = Scene(folder)
    scene.push(wrong)
    done, logits = scene.logits()
    assert done == -1 and (logits == 7).all()
    scene.push(x[1])
    done, logits = scene.logits()
    assert done == 1 and np.isfinite(logits).all()
    soundfile.write(folder / "wrong.wav", wrong, RATE, subtype="FLOAT")
    done = subprocess.run([folder / "scene", folder / "wrong.wav"], capture_output=True, text=True)
    assert done.returncode == 1 and "not finite" in done.stderr


# The program


@pytest.fixture(scope="module")
def checked(folder) -> Path:
    """The program with the compiler's own checks of every access and every sum."""
    flags = (*FAST, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    try:
        c_format.compile_program(folder, folder / "checked", flags)
    except c_format.UserError as error:
        pytest.skip(f"the compiler has no sanitizers: {error}")
    return folder / "checked"


def run(program: Path, *args, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([program, *map(str, args)], capture_output=True, timeout=60, **options)
    assert b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr, done.stderr
    return done


def test_no_access_is_out_of_bounds(checked, folder):
    x = clips(3, SAMPLES)
    expected = c_format.run_program(folder / "scene", x, RATE)
    assert (c_format.run_program(checked, x, RATE, "a") - expected).abs().max() > 0.01
    assert (c_format.run_program(checked, x, RATE) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("subtype, exact", [("PCM_16", 2e-2), ("PCM_24", 1e-3), ("FLOAT", 0)])
def test_wav_files_of_several_kinds_are_read(checked, tmp_path, subtype, exact):
    x = 0.3 * clips(6, SAMPLES)[-1:].numpy()
    both = np.stack([x[0] * 0.5, x[0] * 1.5], 1)
    soundfile.write(tmp_path / "both.wav", both, RATE, subtype=subtype)
    soundfile.write(tmp_path / "extensible.wav", x[0], RATE, subtype=subtype, format="WAVEX")
    expected = c_format.run_program(checked, torch.from_numpy(x), RATE).numpy()
    for name in ("both", "extensible"):
        got = np.array(run(checked, "--logits", tmp_path / f"{name}.wav").stdout.split(), float)
        assert np.abs(got - expected[0]).max() <= exact + 1e-5, name


def test_pcm_comes_from_standard_input(checked):
    x = c_format.test_clip(SAMPLES, RATE)
    done = run(checked, "-", input=x.tobytes() * 2 + b"\0\0\0")  # and a part of a window, and half a sample
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and b"(general)" in done.stdout
    assert run(checked, "--device", "a", "-", input=x.tobytes()).stdout.endswith(b"(a)\n")
    for few in (b"", b"\0", x[:-1].tobytes()):
        done = run(checked, "-", input=few)
        assert done.returncode == 1 and done.stderr.startswith(b"error: standard input: it is shorter than one window")
    assert run(checked, "--device", "x", "-").returncode == 2 == run(checked).returncode


def wav(fmt: bytes, data: bytes = bytes(2000), size: int | None = None) -> bytes:
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def fmt(kind=1, channels=1, rate=RATE, bits=16, block=None) -> bytes:
    return struct.pack(
        "<HHIIHH", kind, channels, rate, 0, channels * bits // 8 % 65536 if block is None else block, bits
    )


MALFORMED = {
    "empty": (b"", "ends early"),
    "other file": (b"fLaC" + bytes(100), "no WAV file"),
    "cut in the header": (wav(fmt())[:30], "ends early"),
    "cut in the sound": (wav(fmt())[:-5], "cut short"),
    "sound that never ends": (wav(fmt(), size=0xFFFFFFFE), "cut short"),
    "no format": (b"RIFF\0\0\0\0WAVEdata" + bytes(100), "before its format"),
    "short format": (wav(b"1234567890"), "shorter than 16"),
    "no channels": (wav(fmt(channels=0)), "no or more than 64 channels"),
    "many channels": (wav(fmt(channels=65535)), "no or more than 64 channels"),
    "8 bits": (wav(fmt(bits=8)), "not PCM of 16 or 24"),
    "mp3": (wav(fmt(kind=0x55)), "not PCM of 16 or 24"),
    "other rate": (wav(fmt(rate=44100)), "44100 Hz, the model's 12000 Hz"),
    "wrong block": (wav(fmt(block=9)), "contradicts itself"),
    "half a sample": (wav(fmt(), bytes(2001)), "within a sample"),
    "huge chunk": (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\xff" + bytes(100), "ends early"),
    "two formats": (wav(fmt())[:36] + wav(fmt(channels=64, bits=8))[12:], "not PCM of 16 or 24"),
    "too short": (wav(fmt()), "shorter than one window"),
}


def test_a_fuzzer_finds_no_fault_in_the_readers(tmp_path):
    """FUZZ_SECONDS=600 python -m pytest -s tests/test_export_c.py -k fuzzer    # without FUZZ_SECONDS: 2,000 runs"""
    front_end = LogMelConfig(8000, 24, 12, 32, 8, 100, 3500, target_length=8)  # small, so that a run is short
    sizes = {"embed_dim": 4, "d_state": 1, "stem": (4,), "stem_blocks": 0, "depth": 1, "patch_size": (2, 1)}
    module = made("aum_nano", front_end, RATE, 8, ("a",), **sizes)
    state = module.model.state_dict()
    c_format.write(module, {GENERAL: state, "a": state}, 16, 160, tmp_path)
    (tmp_path / "corpus").mkdir()
    for form, subtype in (("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAVEX", "PCM_16")):
        for channels in (1, 2):
            path = tmp_path / f"corpus/{form} {subtype} {channels}"
            soundfile.write(path, 0.1 * torch.randn(400, channels).numpy(), RATE, subtype, format=form)
    odd = wav(fmt())[:12] + b"LIST\x05\0\0\0INFO\0\0" + wav(fmt())[12:]
    for name, (content, _) in {**MALFORMED, "odd chunk": (odd, "")}.items():
        (tmp_path / "corpus" / name).write_bytes(content)
    program = tmp_path / "fuzz"
    flags = ["-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-I", tmp_path]
    sources = [Path(__file__).with_name("fuzz_wav.c"), tmp_path / "scene.c", "-lm"]
    nothing = tmp_path / "nothing.c"
    nothing.write_text("int LLVMFuzzerTestOneInput(const char *data, long size) { return data && size < 0; }")
    try:
        subprocess.run(["clang", *flags, "-o", program, nothing], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"clang or its libFuzzer (libclang-rt-dev) does not work: {error}")
    subprocess.run(["clang", *flags, "-o", program, *sources], check=True)
    seconds = os.environ.get("FUZZ_SECONDS")
    limit = f"-max_total_time={seconds}" if seconds else "-runs=2000"
    options = [limit, "-seed=1", "-close_fd_mask=3", "-max_len=4096", "-print_final_stats=1"]
    done = subprocess.run([program, *options, "corpus"], cwd=tmp_path, capture_output=True, text=True)
    print(done.stderr[-1500:])
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_wav_is_told(checked, tmp_path, name):
    content, said = MALFORMED[name]
    (tmp_path / "x.wav").write_bytes(content)
    done = run(checked, tmp_path / "x.wav")
    assert done.returncode == 1 and said in done.stderr.decode() and not done.stdout
    assert done.stderr.startswith(b"error: ") and len(done.stderr.splitlines()) == 1


def test_a_file_that_is_not_there_is_told(checked, tmp_path):
    assert b"No such file" in run(checked, tmp_path / "x.wav").stderr


# Refusals


FAULTS = {  # a line of scene.c and what it becomes
    "window": ("j = is_falling ? WINDOW - i :", "j = is_falling ? WINDOW - i + 1 :"),
    "mel": ("falling += (1.0f - share)", "falling += share"),
    "resampler": ("s->phase %= UP;", "s->phase = 0;"),
    "stem": ("to[t % 2 ? 1 + t / 2", "to[t % 2 ? 0 + t / 2"),
    "residual": ("if (centre) slide(w, x + above", "if (centre > 1) slide(w, x + above"),
    "scan direction": ("is_backward ? GRID_TIME - 1 - step : step", "step"),
    "softplus": ("power_of_2(-LOG2_E * fabsf(x))", "power_of_2(-LOG2_E * fabsf(x + 0.01f))"),
    "gate": ("y[i] *= 0.5f * inner[i]", "y[i] *= 0.51f * inner[i]"),
    "head": ("x < 0 ? 0 : x;", "x;"),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_fault_in_a_part_is_found_and_nothing_is_left(part, module, tmp_path, monkeypatch):
    right, wrong = FAULTS[part]
    sources = shutil.copytree(c_format.SOURCES, tmp_path / "sources")
    text = (sources / "scene.c").read_text()
    assert text.count(right) == 1
    (sources / "scene.c").write_text(text.replace(right, wrong))
    monkeypatch.setattr(c_format, "FLAGS", ("-std=c99", "-O0"))
    monkeypatch.setattr(c_format, "SOURCES", sources)
    with pytest.raises(Mismatch, match="logits differ from PyTorch's by up to"):
        export.export_c(module, 8, clips(4, SAMPLES), tmp_path / "out")
    assert [*tmp_path.iterdir()] == [sources]


def test_what_c_cannot_express_is_refused(quick, tmp_path, monkeypatch):
    small = made("aum_nano", FRONT_END, RATE, 41, **SMALL, head="linear")
    message = refusal(export.export_c, small, 16, clips(2, SAMPLES), tmp_path / "out")
    assert message == "--format c cannot express aum_nano: head is linear, and only patch is known"
    assert "give --weight_bits 16" in refusal(c_format.refuse_unknown, small, 32)
    overrides = {"direction": "fo_bi", "pos_embed": False, "row_scan": False, "stem": (), "patch_size": (2, 2)}
    for name, value in overrides.items():
        others = {"stem_blocks": 0} if name == "stem" else {}
        module = made("aum_nano", FRONT_END, RATE, 41, **SMALL, **others, **{name: value})
        assert f"aum_nano: {name} is" in refusal(c_format.refuse_unknown, module, 16)
    overlapping = made("aum_nano", FRONT_END, RATE, 41, **SMALL, patch_size=(4, 1), strides=(2, 1))
    assert "only N,1 without overlap" in refusal(c_format.refuse_unknown, overlapping, 16)
    odd = made("aum_nano", dataclasses.replace(FRONT_END, n_fft=250), RATE, 41, **SMALL)
    assert "n_fft is 250; it must be a power of two" in refusal(c_format.refuse_unknown, odd, 16)
    assert "aum_small: head is mlp" in refusal(
        c_format.refuse_unknown, made("aum_small", LogMelConfig(), 44100, 65, depth=1), 16
    )
    assert "leave out --input" in refusal(lambda: ExportConfig(ckpt_path="x", format="c", device_id="a"))
    good = made("aum_nano", FRONT_END, RATE, 41, **SMALL)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    message = refusal(export.export_c, good, 16, clips(2, SAMPLES), tmp_path / "there")
    assert "exists already" in message
    monkeypatch.setenv("CC", "no_such_compiler")
    message = refusal(export.export_c, good, 16, clips(2, SAMPLES), tmp_path / "out")
    assert "--format c compiles and runs what it writes" in message and "no_such_compiler" in message
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
