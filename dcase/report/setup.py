"""How a run came about: its configuration beside the defaults, and where it ran."""

from typing import NamedTuple

from dcase.errors import command
from dcase.report import words
from dcase.report.run_files import Finished
from dcase.runs.config import CONFIGS, defaults_from, to_plain
from dcase.runs.defaults import with_defaults
from dcase.runs.folder import Run, kind_of

PARTS = {
    "": "Run",
    "run": "Names",
    "data": "Data",
    "split": "Split",
    "model": "Model",
    "logmel": "Log-mel",
    "augment": "Augmentation",
    "distill": "Distillation",
    "fit": "Training",
    "storage": "Storage",
    "machine": "Machine",
}


class Flag(NamedTuple):
    part: str
    name: str
    value: str
    default: str

    @property
    def differs(self) -> bool:
        return self.value != self.default


def flags(run: Finished) -> list[Flag]:
    """Return a run's flags beside the defaults of the script that wrote it. The shape and the defaults that a named
    model has count as default: the name is what was chosen. So does what stage 2 or a test takes from the run that it
    started from, where that is still there."""
    config = run.config
    kind, model = kind_of(config), config.get("model", {})
    default = CONFIGS[kind]()
    name = default.model.model
    if kind == "general":
        default = with_defaults(default, model.get("model", name))
    elif before := Run(run.folder).lineage()[1:]:
        default = defaults_from(CONFIGS[kind], before[0].read_config())
        name = default.model.model
    usual = _by_part(to_plain(default))
    usual["model"] = model | {"model": name}
    return [
        Flag(PARTS.get(part, part), name, _text(value), _text(usual.get(part, {}).get(name, value)))
        for part, values in _by_part(config).items()
        for name, value in values.items()
    ]


def _by_part(config: dict) -> dict[str, dict[str, object]]:
    """Return a configuration's flags by part; those outside any part under ""."""
    alone = {name: value for name, value in config.items() if not isinstance(value, dict)}
    return {"": alone} | {name: value for name, value in config.items() if isinstance(value, dict)}


def _text(value: object) -> str:
    return "none" if value is None or value in ("", [], ()) else words.shown(value)


def differing(runs: list[Finished]) -> list[tuple[str, list[str]]]:
    """Return the flags that the training runs do not share, and the value in each."""
    values = [{(flag.part, flag.name): flag.value for flag in flags(run.training)} for run in runs]
    names = dict.fromkeys(name for found in values for name in found)
    rows = [(f"--{name[1]}", [found.get(name, "none") for found in values]) for name in names]
    return [(flag, shown) for flag, shown in rows if len(set(shown)) > 1]


def facts(runs: list[Finished]) -> list[tuple[str, list[object]]]:
    """Return where and with what each run ran, a row per fact."""
    found = []
    for run in runs:
        tested = {f"Tested: {name.replace('_', ' ')}": v for name, v in (run.results.get("tested_on") or {}).items()}
        of_run = tested | (run.made.get("versions") or {})
        of_run["Commit"] = run.made.get("commit") or "not known"
        of_run["Command"] = command(*(run.made.get("command") or [])) or "not known"
        of_run["Seed"] = "not known" if run.seed is None else run.seed
        found.append({name: "-" if value is None else value for name, value in of_run.items()})
    return [(name, [of_run.get(name, "-") for of_run in found]) for name in dict.fromkeys(n for f in found for n in f)]
