"""Exported C on an emulated Cortex-M7: the host's logits, what is counted, and a fault that is found."""

import shutil

import pytest
from conftest import refusal
from test_export_c import FRONT_END, RATE, SAMPLES, SMALL, clips, made

from benchmarks import mcu
from dcase.export import export_c

if absent := mcu.missing():
    pytest.skip(f"not found: {', '.join(absent)} (make mcu-tools)", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    module = made("aum_nano_8bit", FRONT_END, RATE, 41, ("a",), **SMALL, depth=1)
    out = tmp_path_factory.mktemp("mcu") / "c"
    export_c(module, 8, clips(2, SAMPLES), out)
    return out


def test_the_board_gives_the_same_logits_and_what_is_needed_is_counted(folder, tmp_path):
    words = mcu.emulated(folder, tmp_path)
    lines = [line.split()[1:] for line in (folder / "test_logits.txt").read_text().splitlines()]
    assert len(lines) == 2 and lines[0] != lines[1]
    assert mcu.logits_of(words) == pytest.approx([float(x) for line in lines for x in line], abs=1e-5)
    row = dict(zip(mcu.HEADER, mcu.measured("small", folder), strict=True))
    for name in ("flash, B: M7", "M4F", "RV32"):
        weights, code = int(row["of that constants, M7"].replace(",", "")), int(row[name].replace(",", ""))
        assert weights + 5_000 < code < weights + 30_000
    assert 100 < words["stack"][0] < 8192
    multiplications = 2 * SAMPLES * 8 / 12  # at least, for resampling
    assert multiplications < mcu.TICK * words["push"][0] < 1000 * SAMPLES and len(words["logits"]) == 2


def test_a_fault_in_the_board_s_code_is_found(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    text = (copy / "scene.c").read_text()
    right = "for (size_t j = 0; j < D_CONV; j++) w[j] ="
    assert text.count(right) == 1
    (copy / "scene.c").write_text(text.replace(right, "for (size_t j = 0; j < D_CONV; j++) w[j] = 0.5f *"))
    assert "logits differ from PyTorch's by up to" in refusal(mcu.measured, "fault", copy)


def test_a_crash_and_double_arithmetic_are_told(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    text = (copy / "scene.c").read_text()
    right = "    int refused = s->refused;\n"
    assert text.count(right) == 1
    (copy / "scene.c").write_text(text.replace(right, right + "    *(volatile int *)0xf0000000;\n"))
    message = refusal(mcu.emulated, copy, tmp_path)
    assert message.startswith("qemu-system-arm fails: ") and "fault" in message
    (copy / "scene.c").write_text(text.replace(right, right + "    logits[0] = (float)((double)logits[0] * 3.1);\n"))
    message = refusal(mcu.flash, copy, "Cortex-M7", tmp_path)
    assert "Cortex-M7 would calculate in double: " in message and "__aeabi_dmul" in message
