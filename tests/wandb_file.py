"""Reads what an offline run of W&B has kept for `wandb sync`: LevelDB's log format, a protobuf message a record.

Source: github.com/google/leveldb, doc/log_format.md; a file of W&B begins with a header of 7 bytes.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # bytes


@dataclass
class Kept:
    """What would be sent."""

    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)  # name or pattern of a metric -> the metric of its x-axis
    files: list[str] = field(default_factory=list)
    artifacts: list = field(default_factory=list)
    run: object = None


def messages(path: Path):
    data = path.read_bytes()
    place, parts = HEADER, []
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # a block's end, too short for a header
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_kept(path: Path) -> Kept:
    kept = Kept()
    for record in messages(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            kept.run = record.run
            kept.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            kept.history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        elif kind == "summary":
            for item in record.summary.update:
                kept.summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "metric":
            kept.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "files":
            kept.files += [file.path for file in record.files.files]
        elif kind == "artifact":
            kept.artifacts.append(record.artifact)
    return kept
