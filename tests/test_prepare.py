"""``python -m dcase.prepare``: one file of each fault, what is written, what is said."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT
from conftest import refusal as refusal_of
from data_folder import META_COLUMNS, SAMPLE_RATE, clip_row, noise, write_data_folder, write_fault, write_lists

from dcase import prepare as module
from dcase.data import tau22
from dcase.data.tau22 import load_clips
from dcase.prepare import PrepareConfig, prepare

CONFIG = PrepareConfig(num_workers=0)


@pytest.fixture
def folder(tmp_path):
    write_data_folder(tmp_path)
    return tmp_path


@pytest.fixture
def faulty(tmp_path):
    """A folder of 12 good training clips and one of each fault; the last two of them are test clips."""
    good = [clip_row("bus", "lyon", place, 0, "a") for place in range(12)]
    faults = {fault: clip_row("tram", "lyon", 50 + i, 0, "b") for i, fault in enumerate(FAULTS)}
    rows = list(faults.values())
    write_lists(tmp_path, good + rows[:-2], rows[-2:])
    (tmp_path / "audio").mkdir()
    for seed, (name, *_) in enumerate(good):
        soundfile.write(tmp_path / name, noise(seed), SAMPLE_RATE, subtype="PCM_24")
    for fault, (name, *_) in faults.items():
        write_fault(tmp_path / name, fault)
    return tmp_path


FAULTS = {  # how it is made -> the reason given
    "missing": "missing",
    "text": "unreadable",
    "truncated": "unreadable",
    "no bytes": "empty",
    "no samples": "empty",
    "nan": "NaN or infinite",
    "inf": "NaN or infinite",
    "silent": "silent",
    "offset": "silent",
    "rate": "wrong rate (1 Hz)",
    "3e38": "too loud (samples of up to 3.0e+38, full scale is 1)",
    "short": "not the most frequent length (4409 samples, not 4410)",
}


def excluded(folder: Path) -> list[list[str]]:
    header, *rows = (folder / "meta_excluded.csv").read_text().splitlines()
    assert header == "filename\treason"
    return [row.split("\t") for row in rows]


def test_all_fine(folder, capsys):
    prepare(folder, PrepareConfig(num_workers=2))
    assert "All 18 files are fine." in capsys.readouterr().out
    assert (folder / "meta_clean.csv").read_bytes() == (folder / "meta.csv").read_bytes()
    assert excluded(folder) == []


def test_one_of_each_fault_and_what_training_uses_then(faulty, capsys):
    prepare(faulty, CONFIG)
    names = [clip_row("tram", "lyon", 50 + i, 0, "b")[0] for i in range(len(FAULTS))]
    assert excluded(faulty) == [list(pair) for pair in zip(names, FAULTS.values(), strict=True)]
    meta = (faulty / "meta.csv").read_text().splitlines()
    assert (faulty / "meta_clean.csv").read_text().splitlines() == [line for line in meta if "tram" not in line]
    said = capsys.readouterr().out
    assert "12 of 24 clips are faulty" in said
    for kind in ("missing", "unreadable", "empty", "NaN or infinite", "silent", "wrong rate", "too loud"):
        assert f"  {kind:<28}  audio/tram-" in said
    assert "10  of the 22 clips of split25" in said and "2  of the 2 clips of test" in said
    assert "WARNING: 2 TEST CLIPS ARE EXCLUDED" in said and "NOT COMPARABLE" in said
    assert len(load_clips(faulty, "split25")) == 12
    assert "leaves out 10 of the 22 clips of split25" in capsys.readouterr().out


def test_a_fault_of_no_test_clip_and_a_length_that_is_not_the_usual_one(folder, capsys):
    first, other = "audio/airport-lisbon-101-1010-0-a.wav", "audio/tram-lisbon-201-2010-0-a.wav"
    soundfile.write(folder / first, noise(0, 4000), SAMPLE_RATE)
    (folder / other).unlink()
    prepare(folder, CONFIG)
    said = capsys.readouterr().out
    assert "2 of 18 clips are faulty" in said and "WARNING" not in said
    assert excluded(folder) == [[first, "not the most frequent length (4000 samples, not 4410)"], [other, "missing"]]


def of_other_lengths(folder: Path, n_clips: int) -> list[str]:
    """meta.csv's last clips, the two of the test among them, each now of a length of its own."""
    names = [line.split()[0] for line in (folder / "meta.csv").read_text().splitlines()[-n_clips:]]
    for i, name in enumerate(names):
        soundfile.write(folder / name, noise(i, 5000 + i), SAMPLE_RATE, subtype="PCM_24")
    return names


def test_several_lengths_of_own_data_are_to_be_cut_not_downloaded_again(folder, capsys):
    names = of_other_lengths(folder, 3)
    prepare(folder, CONFIG)
    assert excluded(folder) == [
        [name, f"not the most frequent length ({5000 + i} samples, not 4410)"] for i, name in enumerate(names)
    ]
    said = capsys.readouterr().out
    assert "again" not in said and "2 TEST CLIPS ARE EXCLUDED" in said and "repair or replace these files" in said
    assert "All clips need one length: cut or pad the others" in said and "--target_length" in said


def test_another_length_in_tau22_is_a_damaged_file(folder, capsys, monkeypatch):
    monkeypatch.setattr(tau22, "_TEST_SHA256", sha256((folder / "split_setup/test.csv").read_bytes()).hexdigest())
    of_other_lengths(folder, 3)
    prepare(folder, CONFIG)
    said = capsys.readouterr().out
    assert (
        "not the most frequent length" in said
        and "download these files again" in said
        and "need one length" not in said
    )
    of_other_lengths(folder, 10)
    assert "download the sound files again" in refusal(folder)


def test_any_length_leaves_out_none_of_them(folder):
    of_other_lengths(folder, 10)
    message = refusal(folder)
    assert "'not the most frequent length'" in message and "cut or pad" in message and "again" not in message
    assert "--any_length" in message and "--target_length" in message
    prepare(folder, PrepareConfig(num_workers=0, any_length=True))
    assert excluded(folder) == []


def test_flags_for_rate_and_silence(folder):
    name = "audio/airport-lisbon-101-1010-0-a.wav"
    soundfile.write(folder / name, noise(0) * 0.1, SAMPLE_RATE, subtype="PCM_24")  # -40 dBFS, the others -20
    prepare(folder, PrepareConfig(num_workers=0, silence_db=-30))
    assert excluded(folder) == [[name, "silent"]]


def test_another_rate_and_two_channels_are_no_fault(folder, capsys):
    """A newcomer's recordings: most of one rate, a few of another, some in stereo, all of one length in seconds."""
    paths = sorted((folder / "audio").iterdir())
    for i, path in enumerate(paths):
        rate = 48000 if i < 2 else 16000
        soundfile.write(path, noise(i, rate // 10) if i % 3 else noise(i, rate // 5).reshape(-1, 2), rate)
    prepare(folder, CONFIG)
    said = capsys.readouterr().out
    assert excluded(folder) == [] and "All 18 files are fine." in said
    assert "2 of 18 files are resampled from 48000 to 16000 Hz where training reads them" in said
    assert "6 of 18 files are mixed down from 2 channels" in said


def test_crlf_and_further_columns_are_kept(folder):
    path = folder / "meta.csv"
    lines = path.read_text().splitlines()
    path.write_bytes("\r\n".join([f"{lines[0]}\tnote", *(f'{line}\t"quoted' for line in lines[1:])]).encode())
    (folder / "audio/airport-lisbon-101-1010-0-a.wav").unlink()
    prepare(folder, CONFIG)
    expected = [f"{lines[0]}\tnote", *(f'{line}\t"quoted' for line in lines[2:])]
    assert (folder / "meta_clean.csv").read_bytes() == "".join(f"{line}\n" for line in expected).encode()
    assert len(load_clips(folder, "split25")) == 15


# When most is wrong, something else is


def refusal(folder: Path, config: PrepareConfig = CONFIG) -> str:
    return refusal_of(prepare, folder, config)


def test_sound_not_unpacked(folder, capsys):
    os.rename(folder / "audio", folder / "elsewhere")
    message = refusal(folder)
    assert "more than half" in message and "'missing'" in message and "unpacked" in message and "--force" in message
    assert "18 of 18 clips are faulty" in capsys.readouterr().out
    assert not (folder / "meta_clean.csv").exists() and not (folder / "meta_excluded.csv").exists()


def test_one_fault_everywhere(folder):
    assert "--silence_db" in refusal(folder, PrepareConfig(num_workers=0, silence_db=0))


def test_force_writes_anyway(folder):
    for path in sorted((folder / "audio").iterdir())[:10]:
        path.unlink()
    refusal(folder)
    prepare(folder, PrepareConfig(num_workers=0, force=True))
    assert len(excluded(folder)) == 10


# Mistakes in the folder and in the flags


def test_lists_are_checked_as_for_training(folder):
    (folder / "split_setup" / "split5.csv").write_text("filename,scene_label\n")
    assert "split5.csv is comma-separated" in refusal(folder)
    (folder / "split_setup" / "split5.csv").unlink()
    meta = (folder / "meta.csv").read_text()
    (folder / "meta.csv").write_text(meta + meta.splitlines()[1] + "\n")
    assert "meta.csv, line 20" in refusal(folder) and "second time" in refusal(folder)
    (folder / "meta.csv").unlink()
    assert "meta.csv is missing" in refusal(folder)
    assert "does not exist" in refusal(folder / "nowhere")


@pytest.mark.parametrize("flag, value", [("num_workers", -1), ("orig_sample_rate", 0), ("subset", 7)])
def test_flag_refused(flag, value):
    assert f"--{flag}" in refusal_of(lambda: PrepareConfig(**{flag: value}))


def kill_own_process(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_an_error_not_a_wait(folder, monkeypatch):
    monkeypatch.setattr(module, "check_file", kill_own_process)
    assert "--num_workers" in refusal(folder, PrepareConfig(num_workers=2))
    assert not (folder / "meta_clean.csv").exists()


# As a program


def test_program(faulty, call_main):
    done = call_main(module.main, "--dataset_dir", faulty, "--num_workers", 1)
    assert done.code == 0 and "12 of 24 clips are faulty" in done.out and "meta_clean.csv: 12 clips" in done.out
    assert "files/s" in done.err  # the progress bar
    os.rename(faulty / "audio", faulty / "elsewhere")
    done = call_main(module.main, "--dataset_dir", faulty)
    done.refused("more than half of the clips")
    assert "24 of 24 clips are faulty" in done.out and len(excluded(faulty)) == 12


def test_folder_by_environment(folder, monkeypatch, call_main):
    monkeypatch.delenv("TAU22_DIR", raising=False)
    call_main(module.main).refused("--dataset_dir or set TAU22_DIR")
    monkeypatch.setenv("TAU22_DIR", str(folder))
    assert call_main(module.main, "--num_workers", 0).code == 0 and excluded(folder) == []


def test_interrupted_program_leaves_the_old_list(tmp_path):
    """Ctrl-C in a terminal reaches the workers too: nothing is written, nothing but one line is said."""
    rows = [clip_row("bus", "lyon", i, 0, "a") for i in range(3000)]
    write_lists(tmp_path, rows[1:], rows[:1])
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "long.wav", noise(0, 441000), SAMPLE_RATE)
    for name, *_ in rows:
        os.link(tmp_path / "long.wav", tmp_path / name)
    (tmp_path / "meta_clean.csv").write_text("\t".join(META_COLUMNS) + "\n" + "\t".join(rows[0]) + "\n")
    old = (tmp_path / "meta_clean.csv").read_bytes()
    # As a terminal starts it: a process group of its own, and SIGINT not ignored, as it is below a background shell.
    program = subprocess.Popen(
        [sys.executable, "-m", "dcase.prepare", "--dataset_dir", str(tmp_path), "--num_workers", "1"],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    while not children.read_text():  # it has started to read
        assert program.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # Python loses a signal that arrives while it forks
    os.killpg(program.pid, signal.SIGINT)
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 130 and "Traceback" not in said and "stopped by the keyboard" in said
    assert (tmp_path / "meta_clean.csv").read_bytes() == old
    assert not (tmp_path / "meta_excluded.csv").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
