"""Run exported C on a microcontroller that QEMU emulates: flash, RAM, stack, instructions, and PyTorch's logits.

    python benchmarks/mcu.py                                   # new models on SynthTAU; make mcu installs what it needs
    python benchmarks/mcu.py --folders scene_in_c --append     # folders of python -m dcase.export --format c

Each folder's scene.c is compiled for Cortex-M7 with hardware float32, linked with mcu.c, and run on its test clip by
qemu-system-arm. For Cortex-M4F and RISC-V (rv32imfc, without a C library) it is compiled and linked. Flash is code,
constants and what scene.c takes of the C library, without mcu.c. QEMU counts instructions; it gives no time.
"""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import machine, output_of, progress, publish, table
from dcase import cli
from dcase.errors import UserError, run

ARM, RISC_V, QEMU = "arm-none-eabi-", "riscv64-unknown-elf-", "qemu-system-arm"
FLAGS = (
    "-std=c99 -O2 -fpeel-loops -fno-inline-functions-called-once -ffp-contract=fast -fno-math-errno "
    "-ffunction-sections -Wall -Wextra -Wconversion -Wdouble-promotion -Werror"
).split()
INCLUDE = Path(__file__).resolve().parent.parent / "dcase/deployment/page/include"  # in place of a C library for RISC-V
TARGETS = {  # the compiler's prefix, its flags, the library's
    "Cortex-M7": (ARM, "-mcpu=cortex-m7 -mthumb -mfpu=fpv5-sp-d16 -mfloat-abi=hard", "-lm"),
    "Cortex-M4F": (ARM, "-mcpu=cortex-m4 -mthumb -mfpu=fpv4-sp-d16 -mfloat-abi=hard", "-lm"),
    "RV32IMFC": (
        RISC_V,
        "-march=rv32imfc -mabi=ilp32f",
        f"-isystem {INCLUDE} -ffreestanding -nostdlib -Wl,--unresolved-symbols=ignore-all",
    ),
}
FUNCTIONS = ("scene_init", "scene_set_device", "scene_push", "scene_push_int16", "scene_logits")
TICK = 40  # instructions: mcu.c
DOUBLE = re.compile(r"__aeabi_(?:d|f2d|i2d|ui2d)\w+|__(?:add|sub|mul|div|extendsf)\w*df\w+")  # the compiler's functions
TOLERANCE = 1e-4  # of a logit
TIMEOUT = 300  # seconds
HEADER = ["model", "flash, B: M7", "M4F", "RV32", "of that constants, M7", "RAM, B: struct", "stack",
          "instructions of a clip, million", "push", "logits", "largest difference of a logit"]  # fmt: skip


@dataclass(frozen=True)
class McuBenchmark:
    folders: str = ""
    """Folders that python -m dcase.export --format c has written, with commas between them; "": new models."""
    models: str = "aum_nano_8bit,aum_nano,cp_mobile"
    """Named models to make anew, with commas between them."""
    append: bool = False
    """Append the table to benchmarks/RESULTS.md."""


def called(*command) -> str:
    """Return what a command prints. Raises `UserError` where it fails."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} has not ended after {TIMEOUT} s") from error
    if done.returncode:
        raise UserError(f"{command[0]} fails: {done.stderr.strip()[-1000:]}")
    return done.stdout + done.stderr


def missing() -> list[str]:
    """Return what is not there of the programs, and of the C library for ARM."""
    absent = [name for name in (ARM + "gcc", RISC_V + "gcc", QEMU) if not shutil.which(name)]
    if not absent and not Path(called(ARM + "gcc", "-print-file-name=libm.a").strip()).is_file():
        absent = ["newlib for ARM"]
    return absent


def flash(folder: Path, target: str, place: Path) -> tuple[int, int, int]:
    """Return the bytes of code and constants, of constants alone, and of RAM beside the struct.

    Raises `UserError` where arithmetic of double is linked.
    """
    prefix, flags, library = TARGETS[target]
    elf = place / f"{target}.elf"
    keep = [f"-Wl,--gc-sections,-e,scene_init,{','.join(f'-u,{name}' for name in FUNCTIONS)}", "-nostartfiles"]
    source = folder / "scene.c"
    called(prefix + "gcc", *FLAGS, *flags.split(), source, *keep, "-o", elf, *library.split())
    if slow := sorted(set(DOUBLE.findall(called(prefix + "nm", elf)))):
        raise UserError(f"{source}: {target} would calculate in double: {', '.join(slow)}")
    sizes = {line.split()[0]: int(line.split()[1]) for line in called(prefix + "size", "-A", elf).splitlines()[2:-2]}
    ram = sum(size for name, size in sizes.items() if name.startswith((".data", ".sdata", ".bss", ".sbss", ".tbss")))
    constants = sum(size for name, size in sizes.items() if name.startswith((".rodata", ".srodata")))
    code = sum(size for name, size in sizes.items() if name.startswith((".text", ".init", ".fini", ".eh", ".ARM.ex")))
    return code + constants, constants, ram


def emulated(folder: Path, place: Path) -> dict[str, list[int]]:
    """Run the folder's test clip with each model; return the words that mcu.c prints, by name."""
    prefix, flags, _ = TARGETS["Cortex-M7"]
    clip, scene, elf = place / "clip.raw", place / "scene.o", place / "run.elf"
    clip.write_bytes((folder / "test_clip.wav").read_bytes()[44:])
    compiler = [prefix + "gcc", *FLAGS, *flags.split(), f"-I{folder}"]
    called(*compiler, "-c", folder / "scene.c", "-o", scene)
    sections = "-Wl,-e,0,--section-start=.vectors=0,-Ttext=0x400,-Tdata=0x20000000"
    main = Path(__file__).with_suffix(".c")
    called(*compiler, "-std=gnu99", f'-DCLIP="{clip}"', main, scene, "-nostartfiles", sections, "-o", elf, "-lm")
    said = called(
        QEMU, "-M", "mps2-an500", "-display", "none", "-serial", "null", "-monitor", "none", "-icount", "shift=0",
        "-semihosting-config", "enable=on,target=native", "-kernel", elf,
    )  # fmt: skip
    words: dict[str, list[int]] = {}
    for name, word in (line.split() for line in said.splitlines()):
        words.setdefault(name, []).append(int(word, 16))
    if "done" not in words:
        raise UserError(f"{folder}: the emulated program stops early: {said.strip()[-200:]}")
    return words


def logits_of(words: dict[str, list[int]]) -> list[float]:
    return [struct.unpack("<f", word.to_bytes(4, "little"))[0] for word in words["logit"]]


def measured(name: str, folder: Path) -> list[str]:
    """Return a row of the table. Raises `UserError` where the logits differ from PyTorch's."""
    progress(f"{name}: compiling and running")
    with tempfile.TemporaryDirectory(prefix="dcase-mcu-") as place:
        sizes = {target: flash(folder, target, Path(place)) for target in TARGETS}
        words = emulated(folder, Path(place))
    lines = (folder / "test_logits.txt").read_text().splitlines()
    expected = [float(x) for line in lines for x in line.split()[1:]]
    found = logits_of(words)
    difference = max(abs(x - y) for x, y in zip(found, expected, strict=True))
    if not difference <= TOLERANCE:  # NaN is refused too
        raise UserError(f"{folder}: logits differ from PyTorch's by up to {difference:.2g} ({TOLERANCE:g} is allowed)")
    total, constants, beside = sizes["Cortex-M7"]
    ram = f"{words['sizeof'][0]:,}" + (f" + {beside:,}" if beside else "")
    counts = [TICK * words[part][0] / 1e6 for part in ("push", "logits")]
    return [
        name, *(f"{sizes[target][0]:,}" for target in TARGETS), f"{constants:,}", ram, f"{words['stack'][0]:,}",
        *(f"{count:.1f}" for count in (sum(counts), *counts)), f"{difference:.1e}",
    ]  # fmt: skip


def new_models(names: list[str], place: Path):
    """Yield the names and folders of new models, with statistics of SynthTAU."""
    from benchmarks.export import BITS, CALIBRATION, make
    from dcase.data.dataset import Sound
    from dcase.data.loading import find_source, with_sound
    from dcase.data.tau22 import RATE, DataConfig
    from dcase.export import clips_of, export_c

    test = with_sound(find_source(DataConfig(read_from="wav")).test, Sound(RATE))
    clips = clips_of(test, test.n_samples, CALIBRATION)
    for name in names:
        if name not in BITS:
            raise UserError(f"--models: there is {', '.join(BITS)}; got {name}")
        export_c(make(name, clips), BITS[name], clips[:8], place / name)
        yield f"{name}, {BITS[name]} bit, new", place / name


def main() -> None:
    config = cli.parse(McuBenchmark, __doc__)
    if absent := missing():
        raise UserError(f"{', '.join(absent)}: not found; make mcu-tools installs the packages, as root, on Debian")
    head = machine()
    with tempfile.TemporaryDirectory(prefix="dcase-mcu-") as place:
        given = ((Path(x).name, Path(x)) for x in config.folders.split(",")) if config.folders else None
        rows = [measured(*named) for named in given or new_models(config.models.split(","), Path(place))]
    tools = "; ".join(output_of(name, "--version").partition("\n")[0] for name in (ARM + "gcc", RISC_V + "gcc", QEMU))
    text = (
        f"{head}\n\n### A microcontroller, emulated\n\nThe test clip of each folder, with mcu.c on QEMU's board "
        f"mps2-an500. RAM is the struct and the stack; instructions are those of the first model. {tools}. Flags: "
        f"`{' '.join(x for x in FLAGS if not x.startswith('-W'))}`.\n\n{table(HEADER, rows)}"
    )
    publish(text, config.append)


if __name__ == "__main__":
    run(main)
