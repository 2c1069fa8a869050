"""Lists from a fuzzer: ``python -m drills.lists FOLDER SEED N`` damages the lists of a folder N times, in this process.

Each time `dcase.data.tau22.load_clips` must load clips that make sense, or raise a `UserError` of one line that names
the list. In the same way the manifest of its pack. The last line printed is JSON: the number of tries and
the failures.
"""

import json
import os
import sys
from pathlib import Path
from random import Random

import numpy as np

from dcase.data import pack, tau22
from dcase.errors import UserError, run

LISTS = ("meta.csv", "split_setup/split25.csv", "split_setup/test.csv")
_OUTSIDE = (
    "../outside.wav",
    "/etc/passwd",
    "C:\\sound.wav",
    "audio/../../x.wav",
    "audio\\..\\x.wav",
    "audio/a\0.wav",
    "..",
)


def mutated(content: bytes, rng: Random) -> tuple[str, bytes]:
    """What was done, and what it gave."""
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    place = rng.randrange(len(content))
    how = rng.choice(
        "flip cut-line double-line swap-lines swap-columns commas nul utf8 long crlf bom quotes outside empty truncate "
        "drop-field add-field cr latin mixed-ends".split()
    )
    if how == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return how, bytes(changed)
    if how in ("nul", "utf8", "cr", "latin"):
        piece = {"nul": b"\0", "utf8": b"\xff\xfe\x80", "cr": b"\r", "latin": "\u2028\x85é".encode()}[how]
        return how, content[:place] + piece + content[place:]
    if how in ("commas", "crlf", "bom", "empty", "truncate"):
        return how, {
            "commas": content.replace(b"\t", b","),
            "crlf": content.replace(b"\n", b"\r\n"),
            "bom": b"\xef\xbb\xbf" + content,
            "empty": rng.choice((b"", b"\n", b"\n\n\n", lines[0], lines[0] + b"\n")),
            "truncate": content[:place],
        }[how]
    fields = lines[i].split(b"\t")
    if how == "cut-line":
        lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
    elif how == "double-line":
        lines.insert(j, lines[i])
    elif how == "swap-lines":
        lines[i], lines[j] = lines[j], lines[i]
    elif how == "swap-columns":
        lines = [b"\t".join(reversed(line.split(b"\t"))) for line in lines] if rng.random() < 0.5 else lines
        lines[i] = b"\t".join(rng.sample(fields, len(fields)))
    elif how == "long":
        lines[i] += rng.choice((b"x", b"\t", b"\ty", b'"')) * rng.choice((1000, 300_000))
    elif how == "quotes":
        lines[i] = b'"' + lines[i].replace(b"\t", rng.choice((b"\t", b'"\t"'))) + rng.choice((b"", b'"'))
    elif how == "outside":
        lines[i] = b"\t".join([rng.choice(_OUTSIDE).encode(), *fields[1:]])
    elif how == "drop-field":
        lines[i] = b"\t".join(fields[:-1])
    elif how == "add-field":
        lines[i] = b"\t".join([*fields, b"more"])
    elif how == "mixed-ends":
        lines = [line + rng.choice((b"", b"\r", b" ")) for line in lines]
    return how, b"\n".join(lines)


def moved_outside(kept: dict[str, bytes], rng: Random) -> dict[str, bytes]:
    """All lists, with one clip that none of them has in the folder: a single list's would be refused by the others."""
    name = rng.choice(kept[LISTS[1]].split(b"\n")[1:-1]).split(b"\t")[0]
    outside = rng.choice(_OUTSIDE).encode()
    return {path: kept[path].replace(name, outside) for path in LISTS}


def fault_of_clips(folder: Path, name: str) -> str:
    """What is wrong with how the folder's lists, one of them damaged, are read; "" where nothing is."""
    try:
        for split in ("split25", "test"):
            clips = tau22.load_clips(folder, split)
            for filename in map(bytes.decode, clips.filenames.tolist()):
                inside = os.path.normpath(os.path.join("/data", filename)).startswith("/data/")
                if not inside or os.path.isabs(filename) or "\\" in filename or "\0" in filename:
                    return f"{filename!r} leaves the folder"
            for column, values in ((clips.scene, tau22.SCENES), (clips.device, tau22.DEVICES)):
                if len(column) != len(clips) or not len(clips) or not np.isin(column, range(len(values))).all():
                    return "scenes or devices that there are not"
    except UserError as error:
        return _fault_of_message(str(error), Path(name).name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fault_of_pack(folder: Path, name: str) -> str:
    try:
        pack.Pack(folder / "pack").rows(np.array([b"audio/none.wav"]))
    except UserError as error:
        return _fault_of_message(str(error), "pack")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "a clip that is not in the pack was found"


def _fault_of_message(message: str, name: str) -> str:
    if len(message.splitlines()) != 1:
        return f"a message of several lines: {message!r}"
    return "" if name in message else f"{name} is not named: {message}"


def main() -> None:
    folder, seed, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    failures = []
    for i in range(n):
        rng = Random(f"{seed} {i}")
        name = rng.choice((*LISTS, "pack/manifest.json"))
        kept = {path: (folder / path).read_bytes() for path in (*LISTS, name)}
        if rng.random() < 0.1:
            name, how, damaged = ".csv", "outside-everywhere", moved_outside(kept, rng)
        else:
            how, damaged = mutated(kept[name], rng)
            damaged = {name: damaged}
        for path, content in damaged.items():
            (folder / path).write_bytes(content)
        fault = (fault_of_pack if name.startswith("pack") else fault_of_clips)(folder, name)
        for path, content in kept.items():
            (folder / path).write_bytes(content)
        if fault:
            failures.append(f"{name}, {how}, seed {seed!r}, number {i}: {fault[:1000]}")
    print(json.dumps({"tried": n, "failures": failures}))


if __name__ == "__main__":
    run(main)
