"""How a run came about: its configuration beside the defaults, and where it ran."""

import dataclasses
import shlex

from dcase.report.html import Html, cell, el, join, table
from dcase.report.run_files import Finished
from dcase.runs.config import BaseConfig, DeviceConfig, EvalConfig, TestConfig, to_plain

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


def flags(config: dict) -> dict[str, dict[str, object]]:
    """A configuration's flags by part; those that are in no part under ""."""
    alone = {name: value for name, value in config.items() if not isinstance(value, dict)}
    return {"": alone} | {name: value for name, value in config.items() if isinstance(value, dict)}


def defaults(config: dict) -> dict[str, dict[str, object]]:
    """What the script that wrote a configuration would have taken without a flag. A named model's own shape is not
    told apart from flags: it is the name that was chosen."""
    script: type[EvalConfig] = DeviceConfig if "ckpt_id" in config else BaseConfig
    if "split" not in config:
        script = TestConfig
    plain = flags(to_plain(script()))
    chosen = config.get("model", {})
    return plain | {"model": chosen | {"model": plain["model"]["model"]}}


def differing(config: dict) -> list[tuple[str, str, object, object]]:
    """(part, flag, value, default) where they differ."""
    usual = defaults(config)
    found = []
    for part, values in flags(config).items():
        for name, value in values.items():
            default = usual.get(part, {}).get(name, dataclasses.MISSING)
            if default is not dataclasses.MISSING and text(value) != text(default):
                found.append((part, name, value, default))
    return found


def text(value: object) -> str:
    """As on the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def configuration(run: Finished) -> Html:
    return join(_configuration(run), _configuration(run.trained_by) if run.trained_by else "")


def _configuration(run: Finished) -> Html:
    if not run.config:
        return el("p", "There is no config.json in the run's folder.", class_="note")
    changed = differing(run.config)
    rows = [[f"--{name}", text(value) or "none", text(default) or "none"] for _, name, value, default in changed]
    caption = f"Run {run.id}: what differs from the defaults"
    short = table(f"changed-{run.id}", caption, ["Flag", "Value", "Default"], rows)
    differs = {(part, name) for part, name, *_ in changed}
    every = []
    for part, values in flags(run.config).items():
        for name, value in values.items():
            mark = (part, name) in differs
            shown = cell(el("b", text(value) or "none"), " ≠") if mark else cell(text(value) or "none")
            every.append([f"--{name}", PARTS.get(part, part), shown])
    whole = table(f"config-{run.id}", f"Run {run.id}: all flags; ≠: not the default", ["Flag", "Part", "Value"], every)
    shown = short if rows else el("p", f"Run {run.id}: every flag has its default.")
    return join(shown, el("details", el("summary", f"All flags of run {run.id}"), whole))


def environment(run: Finished) -> Html:
    facts: list[tuple[str, object]] = []
    for name, value in (run.results.get("tested_on") or {}).items():
        facts.append((f"Tested: {name.replace('_', ' ')}", value))
    for one in (run, *([run.trained_by] if run.trained_by else [])):
        after = f" (run {one.id})" if run.trained_by else ""
        facts += [(f"{name}{after}", value) for name, value in (one.made.get("versions") or {}).items()]
        facts.append((f"Commit{after}", one.made.get("commit") or "not known"))
        facts.append((f"Command{after}", shlex.join(map(str, one.made.get("command") or [])) or "not known"))
    facts.append(("Seed", "not known" if run.seed is None else run.seed))
    rows = [[name, cell(value, class_="text")] for name, value in facts]
    return table("environment-table", "Where and with what it ran", ["What", "Value"], rows)
