"""`python -m dcase.predict -`: sound from a pipe, a line for each window, and every end that it may come to."""

import csv
import io
import json
import os
import pty
import re
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, Program
from stored_files import with_device_models
from test_predict import expected_of, scene, write

from dcase import predict
from dcase.data.logmel import frames_of
from dcase.data.pcm import FORMATS, PcmStream
from dcase.data.sound import read_wav
from dcase.deployment import prediction
from dcase.deployment.prediction import Recording, load_module, span_of_module
from dcase.deployment.prediction import predict as predictions_of
from dcase.model.named import ModelConfig
from dcase.runs.checkpoints import save_checkpoint
from dcase.runs.config import DataConfig, EvalConfig
from dcase.training.lit import SceneClassifier


@pytest.fixture(scope="module")
def ckpt(general_run) -> Path:
    return general_run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def module(ckpt):
    return load_module(ckpt)


class Pipe:
    """A pipe's reading end with bytes written into it, ``size`` at a time, by a thread; then it ends."""

    def __init__(self, data: bytes, size: int = 2**15):
        self.end, write = os.pipe()
        threading.Thread(target=self._fill, args=(write, data, size), daemon=True).start()

    def _fill(self, write: int, data: bytes, size: int) -> None:
        for at in range(0, len(data), size):
            os.write(write, data[at : at + size])
        os.close(write)

    def fileno(self) -> int:
        return self.end

    def isatty(self) -> bool:
        return False


@pytest.fixture
def listen(call_main, ckpt, monkeypatch):
    """Run the command on bytes from a pipe: listen(data, "--pcm", "s24le", size=1)."""

    def run(data: bytes, *args, size: int = 2**15, path: Path = ckpt):
        pipe = Pipe(data, size)
        monkeypatch.setattr("sys.stdin", pipe)
        try:
            return call_main(predict.main, "--ckpt_path", path, *args, "-")
        finally:
            os.close(pipe.end)

    return run


def encoded(samples: np.ndarray, kind: str) -> bytes:
    """Return PCM, little-endian, as libsndfile writes it."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="RAW", subtype=FORMATS[kind], endian="LITTLE")
    return file.getvalue()


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "o.json").read_text())["predictions"]


def read(data: bytes, rate: int, size: int, sample_rate: int = RATE, **options) -> torch.Tensor:
    pipe = Pipe(data, size)
    stream = PcmStream(pipe.end, **{"pcm": "s16le", "rate": rate, "channels": 1} | options)
    sound = torch.cat(list(stream.pieces(sample_rate)), 1)
    os.close(pipe.end)
    return sound


@pytest.mark.parametrize("size", [1, 7, 4095, 10**6])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_format_in_any_chunks_is_what_a_file_of_it_holds(kind, size, channels, tmp_path):
    sound = np.random.default_rng(0).normal(0, 0.2, (3001, channels))
    path = write(tmp_path / "x.wav", sound, subtype=FORMATS[kind])
    got = read(encoded(sound, kind), RATE, size, pcm=kind, channels=channels)
    assert torch.equal(got, read_wav(path, RATE)) and got.std() > 0.1


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_resampling_leaves_no_trace_of_the_pieces(rate, tmp_path):
    sound = np.random.default_rng(0).normal(0, 0.1, int(1.37 * rate))
    want = read_wav(write(tmp_path / "x.wav", sound, rate, subtype="PCM_16"), 22050)
    torch.testing.assert_close(read(encoded(sound, "s16le"), rate, 999, 22050), want, rtol=0, atol=1e-6)


def test_a_piece_comes_soon_after_its_samples(alarm):
    """Of half a second, all but 0.06 s is given out while the pipe stays open."""
    end, write = os.pipe()
    os.write(write, bytes(2 * 22050))
    sound, found = PcmStream(end, "s16le", 44100, 1).pieces(32000), 0
    while found < 0.43 * 32000:  # it would wait for ever
        found += next(sound).shape[1]
    os.close(write)
    assert found + sum(piece.shape[1] for piece in sound) == 16000
    os.close(end)


@pytest.mark.parametrize("size", [1, 999])
def test_windows_are_those_of_the_file(size, listen, module, tmp_path):
    """Rows, and the mean over all, equal what the same WAV file gives."""
    sound = np.concatenate([scene(0.7), scene(0.55, name="bus")])
    path, n = write(tmp_path / "x.wav", sound, subtype="PCM_16"), span_of_module(module).window
    waveform = read_wav(path, RATE)
    done = listen(encoded(sound, "s16le"), "--rate", RATE, "--out", "o.json", size=size).succeeded()
    rows = rows_of(tmp_path)
    starts = [0, n, waveform.shape[1] - n]
    assert [row["seconds"] for row in rows] == [0.496, 0.992, 1.25]
    for row, start in zip(rows, starts, strict=True):
        want = expected_of(module, waveform[:, start : start + n])
        assert list(row["probabilities"].values()) == want.tolist()
        assert (row["file"], row["windows"], row["device_id"]) == ("-", 1, "unknown")
    (whole,) = predictions_of(module, [Recording(path)])
    (name, share), (second, less) = whole.best(2)
    assert f"mean over 1.25 s, 3 windows: {name} {100 * share:.1f} %, {second} {100 * less:.1f} %" in done.out
    assert "standard input (s16le, 8,000 Hz, channels: 1): a line every 0.50 s" in done.out
    assert "ended within a window" in done.out and "within a sample" not in done.out and "3 windows: o.json" in done.out


def test_a_line_shows_the_mean_over_the_last_seconds(listen, tmp_path):
    sound = np.concatenate([scene(0.992), scene(0.992, name="bus"), scene(0.992, name="park")])  # six windows
    done = listen(encoded(sound, "f32le"), *f"--pcm f32le --rate {RATE} --average 1.5 --out o.csv".split()).succeeded()
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scenes = list(rows[0])[7:17]
    shares = np.array([[float(row[name]) for name in scenes] for row in rows])
    lines = [line for line in done.out.splitlines() if " | " in line]
    assert len(lines) == len(rows) == 6
    for i, line in enumerate(lines):
        mean = shares[max(0, i - 2) : i + 1].mean(0)
        best, other = np.argsort(-mean)[:2]
        shown = f"{scenes[best]} {100 * mean[best]:.1f} %, {scenes[other]} {100 * mean[other]:.1f} %"
        assert line.endswith(f"| mean of {min(i + 1, 3) / 2:.1f} s: {shown}")
        first = f"{rows[i]['scene_1']} {100 * float(rows[i]['probability_1']):.1f} %, "
        assert line.startswith(f"{0.496 * (i + 1):9.2f} s  {first}")


def test_a_line_comes_each_second_of_longer_windows_and_overlap_gives_more(listen, tmp_path, monkeypatch):
    args = ["--rate", RATE, "--out", "o.json"]
    done = listen(encoded(scene(1), "s16le"), "--overlap", 0.5, *args).succeeded()
    assert [row["seconds"] for row in rows_of(tmp_path)] == [
        0.496,
        0.744,
        0.992,
        1.0,
    ] and "a line every 0.25 s" in done.out
    config = EvalConfig(model=ModelConfig("cp_mobile"), data=DataConfig(orig_sample_rate=RATE))
    longer = SceneClassifier(config, frames_of(config.logmel, round(2.5 * RATE), RATE)).eval()
    monkeypatch.setattr(predict, "load_module", lambda path: longer)
    listen(encoded(scene(4.6), "s16le"), *args).succeeded()
    assert [row["seconds"] for row in rows_of(tmp_path)] == [2.5, 3.5, 4.5, 4.6]


@pytest.mark.parametrize("kind, rate, channels", [("s16le", RATE, 1), ("f32le", 16000, 2), ("s24le", 44100, 1)])
def test_a_wav_header_tells_the_format(kind, rate, channels, listen, module, tmp_path):
    """arecord writes one, with a length that it makes up; here there are other chunks, one of an odd length, too."""
    sound = np.stack([scene(1.5, rate)] * channels, 1)
    path = write(tmp_path / "x.wav", sound, rate, subtype=FORMATS[kind])
    size = len(encoded(sound, kind)) // sound.size
    tag = 3 if kind == "f32le" else 1
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * size, channels * size, 8 * size)
    head = b"RIFF\xff\xff\xff\x7fWAVE" + b"fmt \x10\0\0\0" + form + b"LIST\5\0\0\0data!\0" + b"data\xdb\xff\xff\x7f"
    done = listen(head + encoded(sound, kind), "--out", "o.json", size=5).succeeded()
    assert f"standard input ({kind}, {rate:,} Hz, channels: {channels})" in done.out
    (whole,) = predictions_of(module, [Recording(path)])
    found = np.mean([list(row["probabilities"].values()) for row in rows_of(tmp_path)], 0)
    assert found.tolist() == pytest.approx(whole.probabilities, abs=1e-5)


def test_an_input_shorter_than_a_window_and_one_that_ends_in_a_sample(listen, module, tmp_path):
    path = write(tmp_path / "x.wav", scene(0.2), subtype="PCM_16")
    done = listen(encoded(scene(0.2), "s16le") + b"x", "--rate", RATE, "--out", "o.json").succeeded()
    (row,), (whole,) = rows_of(tmp_path), predictions_of(module, [Recording(path)])
    assert list(row["probabilities"].values()) == list(whole.probabilities) and row["seconds"] == 0.2
    assert "repeated to fill them: - " in done.err and "within a sample: 1 bytes are left out" in done.out


def test_a_device_has_its_model(listen, ckpt, tmp_path):
    save_checkpoint(with_device_models(ckpt, {"a": 1.5}), tmp_path / "by.ckpt")
    found = []
    for args in ([], ["--device_id", "a"], ["--device_id", "b"]):
        done = listen(encoded(scene(0.5), "s16le"), "--rate", RATE, "--out", "o.json", *args, path=tmp_path / "by.ckpt")
        assert ("general model predicts all" in done.succeeded().out) == (not args)
        found.append(rows_of(tmp_path)[0]["probabilities"])
    assert found[0] == found[2] != found[1]


def test_bad_samples_end_it_and_what_came_before_is_kept(listen, tmp_path):
    sound = scene(1.2)
    sound[int(1.1 * RATE)] = np.nan
    done = listen(encoded(sound, "f32le"), "--pcm", "f32le", "--rate", RATE, "--out", "o.json")
    done.refused("standard input (f32le, 8,000 Hz, channels: 1) is no recording, NaN or infinite")
    assert len(rows_of(tmp_path)) == 2 and "mean over 0.99 s, 2 windows" in done.out
    sound[5] = np.inf
    earlier = (tmp_path / "o.json").read_text()
    listen(encoded(sound, "f32le"), "--pcm", "f32le", "--rate", RATE, "--out", "o.json").refused("NaN or infinite")
    assert (tmp_path / "o.json").read_text() == earlier


def test_what_cannot_be_listened_to_is_one_line(listen, tmp_path):
    good = encoded(scene(1), "s16le")
    flac = write(tmp_path / "x.flac", scene(1)).read_bytes()
    bytes_only = write(tmp_path / "8.wav", scene(1), subtype="PCM_U8").read_bytes()
    for data, args, parts in [
        (b"", [], ["standard input (s16le, 44,100 Hz, channels: 1) is no recording, empty"]),
        (b"x", [], ["is no recording, empty"]),
        (flac, [], ["is a sound file, no PCM"]),
        (bytes_only, [], ["a WAV file, but not of s16le, s24le, s32le, f32le", "PCM_U8"]),
        (b"RIFF", [], ["a WAV file, but not of"]),
        (b"RIFFxxxxWAVELIST\xff\xff\xff\xff" + good, [], ["a WAV file, but not of"]),
        (good, ["--rate", 48001, "--pcm", "s32le"], ["48,001 Hz", "too odd a ratio"]),
        (good, ["--rate", 0], ["--rate must be at least 1"]),
        (good, ["--channels", 0], ["--channels must be at least 1"]),
        (good, ["--average", 0], ["--average must be above 0"]),
        (good, ["--list", "x"], ["--list is of files, and - is standard input: leave it out"]),
        (good, ["--embeddings", "x.npz"], ["--embeddings is of files"]),
        (good, ["--batch_size", 3], ["--batch_size is of files"]),
        (good, ["--device_id", "a", "x.flac"], ["- is standard input, and is read alone"]),
        (good, ["--device_id", "z"], ["--device_id is auto"]),
    ]:
        listen(data, *args).refused(*parts)


@pytest.mark.parametrize("flag", ["--pcm s24le", "--rate 8000", "--channels 2", "--average 3"])
def test_its_flags_are_refused_with_files(flag, call_main, ckpt):
    name, value = flag.split()
    call_main(predict.main, "x.wav", "--ckpt_path", ckpt, name, value).refused(f"{name} is of standard input")


def test_a_terminal_is_no_pipe(call_main, ckpt, monkeypatch):
    _, end = pty.openpty()
    with open(end) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        call_main(predict.main, "-", "--ckpt_path", ckpt).refused("arecord -f S16_LE -r 44100 -c 1 | python -m")
        monkeypatch.setattr("sys.stdin", None)
        call_main(predict.main, "-", "--ckpt_path", ckpt).refused("arecord")


@pytest.mark.parametrize("each, said", [(0.0, False), (1.2, True)])
def test_a_model_slower_than_its_sound_is_told_once(each, said, listen, monkeypatch):
    classify = prediction._classify

    def slowly(*args):
        time.sleep(each)
        classify(*args)

    monkeypatch.setattr(prediction, "_classify", slowly)
    monkeypatch.setattr(predict, "BEHIND", 1.0)
    done = listen(encoded(scene(2.5), "s16le"), "--rate", RATE).succeeded()
    found = re.findall(r"WARNING: slower than the sound comes: (\S+) s behind at (\S+) s", done.err)
    assert len(found) == said
    for behind, at in found:  # 0.7 s more a window, and the first does not count
        assert at == "1.5" and 1 < float(behind) < 3


# As a process

START = ("dcase.predict", "-", "--rate", RATE, "--ckpt_path")


def line_of(file, pattern: str) -> str:
    """Return the first line that comes and has the pattern."""
    while line := file.readline():
        if re.search(pattern, line):
            return line
    raise AssertionError(f"{pattern} did not come")


@pytest.fixture
def started(ckpt, tmp_path, alarm):
    """The program on two FIFOs: (it, its standard input, its output)."""
    for name in ("in", "out"):
        os.mkfifo(tmp_path / name)
    args = [*START, ckpt, "--out", "o.json"]
    program = Program(*args, cwd=tmp_path, stdin=str(tmp_path / "in"), out=str(tmp_path / "out"))
    with open(tmp_path / "in", "wb", buffering=0) as sound, open(tmp_path / "out") as out:
        yield program, sound, out
    if program.is_running():
        program.wait(0)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_it_waits_for_a_pipe_that_stops_and_ctrl_c_ends_it(started, tmp_path):
    program, sound, out = started
    sound.write(encoded(scene(0.7), "s16le")[:-1])  # within a sample
    line_of(out, r"^ +0\.50 s")
    before = cpu_seconds(program.pid)
    time.sleep(1.5)
    assert cpu_seconds(program.pid) - before < 0.3 and program.is_running()
    sound.write(encoded(scene(0.7), "s16le")[-1:] + encoded(scene(0.4), "s16le"))
    line_of(out, r"^ +0\.99 s")  # the 0.1 s after it are left out
    program.send(signal.SIGINT)
    assert "mean over 0.99 s, 2 windows" in out.read()
    done = program.wait(60)
    assert done.code == 130 and done.error == "stopped by the keyboard" and "Traceback" not in done.err
    assert len(rows_of(tmp_path)) == 2 and not list(tmp_path.glob("o.partial.*"))


def test_a_reader_that_leaves_ends_it_quietly(started, tmp_path):
    program, sound, out = started
    sound.write(encoded(scene(0.7), "s16le"))
    line_of(out, r"^ +0\.50 s")
    out.close()
    sound.write(encoded(scene(0.7), "s16le"))
    done = program.wait(60)
    assert done.code == 0 and done.err == ""
    assert len(rows_of(tmp_path)) == 2  # the second was predicted when its line found no reader


def test_ctrl_c_before_any_sound_leaves_an_earlier_file(started, tmp_path):
    program, _, out = started
    (tmp_path / "o.json").write_text("earlier")
    line_of(out, "windows of 0.50 s")
    time.sleep(0.5)
    program.send(signal.SIGINT)
    assert program.wait(60).code == 130 and (tmp_path / "o.json").read_text() == "earlier"
