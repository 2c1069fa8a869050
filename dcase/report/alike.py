"""Which runs are of one configuration: they differ in nothing but their seed, and in where they were made."""

import json

from dcase.config import FREE_ON_RESUME, BaseConfig, DeviceConfig, TestConfig, from_plain, to_plain
from dcase.errors import UserError
from dcase.runs import RunConfig, find_run

# Flags that change no figure, or nothing but rounding, and what a run is called; how many processes there are counts.
NO_MATTER = (FREE_ON_RESUME - {"devices", "num_nodes"}) | {"seeds", *RunConfig.__dataclass_fields__}
_OTHER_RUNS = ("ckpt_id", "init_from")  # flags that name a run, which has a seed of its own


def flat(saved: dict) -> dict:
    """A run's configuration as flag -> value, with today's defaults for flags that were not there yet."""
    cls = DeviceConfig if "ckpt_id" in saved else TestConfig if "ckpt_path" in saved else BaseConfig
    flags = {}
    for name, value in to_plain(from_plain(cls, saved)).items():
        flags |= value if isinstance(value, dict) else {name: value}
    return flags


def configuration(flags: dict, project_name: str) -> str:
    """The same text for runs of one configuration, whatever their seed and that of the runs they start from."""
    counted = {name: value for name, value in flags.items() if name not in NO_MATTER | {"seed"}}
    for name in _OTHER_RUNS:
        if counted.get(name):
            try:
                other = find_run(project_name, counted[name], f"--{name}")
                counted[name] = configuration(flat(other.read_config()), project_name)
            except UserError:  # it is gone: its id must do
                pass
    return json.dumps(counted, sort_keys=True)
