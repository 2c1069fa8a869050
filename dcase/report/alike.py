"""Which runs are of one configuration: they differ in nothing but their seed, and in where they were made."""

import json

from dcase.errors import UserError
from dcase.report.run_files import tested_run
from dcase.runs.config import FREE_ON_RESUME, BaseConfig, DeviceConfig, TestConfig, from_plain, to_plain
from dcase.runs.folder import Run, RunConfig, find_run, kind_of

# Flags that change no figure, or nothing but rounding, and what a run is called; how many processes there are counts.
NO_MATTER = (FREE_ON_RESUME - {"devices", "num_nodes"}) | {"seeds", *RunConfig.__dataclass_fields__}
_OTHER_RUNS = ("ckpt_id", "init_from")  # flags that name a run, which has a seed of its own
_CONFIGS = {"general": BaseConfig, "device-specific": DeviceConfig, "test": TestConfig}  # of `runs.kind_of`
_OF_TRAINING = {"batch_size", "devices", "num_nodes"}  # flags of a test, too, whose figures they hardly change


def flat(saved: dict) -> dict:
    """A run's configuration as flag -> value, with today's defaults for flags that were not there yet."""
    flags = {}
    for name, value in to_plain(from_plain(_CONFIGS[kind_of(saved)], saved)).items():
        flags |= value if isinstance(value, dict) else {name: value}
    return flags


def flags_of(run: Run) -> dict:
    """`flat`; of a test, with the flags of the run whose model it tested, where that is there.

    Raises `UserError` where config.json is damaged.
    """
    saved = run.read_config()
    own = flat(saved)
    tested = tested_run(run.folder, saved)
    if tested is None:
        return own
    try:
        trained = flags_of(Run(tested))
    except UserError:  # a published model has another config.json
        return own
    return trained | {name: value for name, value in own.items() if value is not None and name not in _OF_TRAINING}


def configuration(flags: dict, project_name: str) -> str:
    """The same text for runs of one configuration, whatever their seed and that of the runs they start from."""
    counted = {name: value for name, value in flags.items() if name not in NO_MATTER | {"seed"}}
    counted |= {name: configuration(other, project_name) for name, other in _other_runs(flags, project_name).items()}
    return json.dumps(counted, sort_keys=True)


def seeds(flags: dict, project_name: str) -> tuple:
    """The run's seed, and those of the runs it starts from."""
    others = _other_runs(flags, project_name).values()
    return (flags.get("seed"), *(seeds(other, project_name) for other in others))


def _other_runs(flags: dict, project_name: str) -> dict[str, dict]:
    """Of each flag that names a run, the flags of that run. One that is gone is left out: its id must do."""
    found = {}
    for name in _OTHER_RUNS:
        if flags.get(name):
            try:
                found[name] = flat(find_run(project_name, flags[name], f"--{name}").read_config())
            except UserError:
                continue
    return found
