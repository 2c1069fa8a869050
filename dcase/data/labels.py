"""The scenes, recording devices and groups of devices of a data folder, by name and number.

`tau22` reads those of a folder. A checkpoint carries those that it was trained on.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dcase.errors import UserError

# TAU22's, in the order of its numbers, so that an index means the same in every checkpoint and on every subset.
SCENES = (
    "airport",
    "bus",
    "metro",
    "metro_station",
    "park",
    "public_square",
    "shopping_mall",
    "street_pedestrian",
    "street_traffic",
    "tram",
)
DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
TRAIN_DEVICES = DEVICES[:6]
DEVICE_GROUPS = {"real": ("a", "b", "c"), "seen": ("s1", "s2", "s3"), "unseen": ("s4", "s5", "s6")}

LABELS_JSON = "labels.json"  # in a data folder
_MOST = {"scenes": 600, "devices": 100}  # more are a mistake, and counts by device, scene and scene would be large
# Names with a meaning of their own: columns of predictions, folders of models, parts of a page and of torch's modules.
_TAKEN = {
    "scenes": {
        *(
            "filename",
            "scene_label",
            "device_id",
            "location",
            "file",
            "seconds",
            "windows",
            "macro_avg_acc",
            "size",
            "macs",
        ),
        *(f"{name}_{n}" for name in ("scene", "probability") for n in (1, 2, 3)),
        *DEVICE_GROUPS,
    },
    "devices": {"general", "unknown", "auto", "all", *DEVICE_GROUPS, *dir(nn.ModuleDict())},
}


@dataclass(frozen=True)
class Labels:
    """What the numbers of scenes and devices mean."""

    scenes: tuple[str, ...]  # in the order of the logits
    devices: tuple[str, ...]
    device_groups: Mapping[str, tuple[str, ...]]  # those of "real", "seen" and "unseen" that have devices

    @classmethod
    def from_plain(cls, plain: Mapping, what: str) -> "Labels":
        """Return the labels in a checkpoint, a config.json or a labels.json; whatever else it holds does not count.

        A file of an earlier version names no devices, and may name no scenes: they are TAU22's. Without groups, all
        devices are seen in training. Raises `UserError`, beginning with ``what``, for names that cannot be used.
        """
        scenes = plain.get("scenes")
        scenes = _checked(SCENES if scenes is None else scenes, "scenes", what)
        if plain.get("devices") is None:
            return cls(scenes, DEVICES, DEVICE_GROUPS)
        devices = _checked(plain["devices"], "devices", what)
        if len(scenes) < 2 or not devices:
            raise UserError(f"{what}: it needs two scenes and one device at least")
        if both := set(scenes) & set(devices):
            raise UserError(f"{what}: {min(both)!r:.60} is a scene and a device: give one of them another name")
        groups = plain.get("device_groups") or {"seen": devices}
        if not isinstance(groups, Mapping) or set(groups) - set(DEVICE_GROUPS):
            raise UserError(f"{what}: device_groups must be lists of devices under {', '.join(DEVICE_GROUPS)}")
        groups = {name: _checked(groups[name], "devices", what) for name in DEVICE_GROUPS if groups.get(name)}
        grouped = Counter(device for members in groups.values() for device in members)
        if grouped != Counter(devices):
            wrong = min({*grouped, *devices} - {name for name in devices if grouped[name] == 1})
            raise UserError(
                f"{what}: the device {wrong!r:.60} must be among the devices, and in one of the device_groups"
            )
        return cls(scenes, devices, groups)

    def plain(self) -> dict:
        """Return the opposite of `from_plain`."""
        groups = {name: list(devices) for name, devices in self.device_groups.items()}
        return {"scenes": list(self.scenes), "devices": list(self.devices), "device_groups": groups}

    @property
    def train_devices(self) -> tuple[str, ...]:
        """The devices that training clips are of."""
        return tuple(device for device in self.devices if device not in self.device_groups.get("unseen", ()))

    def device_index(self, device_id: str) -> int:
        """Return the number of a device; -1 for any other name."""
        return self.devices.index(device_id) if device_id in self.devices else -1


TAU22_LABELS = Labels(SCENES, DEVICES, DEVICE_GROUPS)


def refuse_other_scenes(trained: Labels, data: Labels, what: str) -> None:
    """Raise `UserError` where ``what`` was trained on other scenes than these data have, or in another order."""
    if trained.scenes != data.scenes:
        raise UserError(
            f"{what} was trained on the scenes {', '.join(trained.scenes)}; these data have "
            f"{', '.join(data.scenes)}: give data of those scenes (their {LABELS_JSON} sets the order), or train again"
        )


def _checked(names: object, kind: str, what: str) -> tuple[str, ...]:
    """Return a list of names of one ``kind``, "scenes" or "devices"."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what}: {kind} are no list of names")
    if len(names) > _MOST[kind]:
        raise UserError(f"{what}: it has {len(names):,} {kind}, and {_MOST[kind]} are the most: is that column right?")
    pattern = r"\w[\w-]{0,39}" if kind == "devices" else r"[^\s-](.{0,58}\S)?"  # a device's name is a folder's, too
    folders = [name.lower() if kind == "devices" else name for name in names]  # a disk may not tell a from A
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            also = ", as A is a" if kind == "devices" else ""
            raise UserError(f"{what}: {name!r:.60} is in its {kind} twice{also}")
        if name in _TAKEN[kind]:
            raise UserError(f"{what}: {name!r:.60} in its {kind} has a meaning of its own here: give it another name")
        if not (re.fullmatch(pattern, name) and name.isprintable()):
            of = "up to 40 letters, digits, _ and -" if kind == "devices" else "up to 60 visible characters"
            raise UserError(
                f"{what}: {name!r:.60} in its {kind} is no name: a name has {of}, and does not begin with -"
            )
    return tuple(names)
