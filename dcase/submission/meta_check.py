"""What is wrong with a submission's meta.yaml."""

import math

from dcase import complexity
from dcase.data.labels import DEVICES, SCENES
from dcase.errors import UserError
from dcase.submission.meta import BLOCKS, problems_of_authors, read_yaml, todo_fields
from dcase.submission.package import Submission

ABBREVIATION = 10  # letters, at most
# Dotted names of what meta.yaml must have; some may be null.
META = (
    *(f"submission.{name}" for name in ("label", "name", "abbreviation", "authors")),
    "system.inference_code",
    *(
        f"system.description.{name}"
        for name in (
            "input_sampling_rate", "acoustic_features", "data_augmentation", "machine_learning_method",
            "external_data_usage", "complexity_management", "pipeline", "framework", "device_information",
            "num_models_at_inference", "model_weight_sharing",
        )
    ),
    *(f"system.complexity.{name}" for name in ("total_model_size", "total_parameters", "macs")),
    "system.external_datasets",
    *(f"results.development_dataset.{block}" for block in BLOCKS),
)  # fmt: skip


def check_meta(system: Submission) -> list[str]:
    """Problems of a system's meta.yaml: fields that are missing or to be filled in, and figures that cannot be."""
    path = system.meta
    if not path.is_file():
        return [f"{path} is missing: make it with python -m dcase.submit"]
    try:
        meta = read_yaml(path)
    except UserError as error:
        return [str(error)]
    missing = [name for name in META if not _has(meta, name)]
    if missing:
        return [f"{path}: {name} is missing" for name in missing]
    problems = [f"{name} is still to be filled in (TODO)" for name in todo_fields(meta)]
    submission, costs = meta["submission"], meta["system"]["complexity"]
    if submission["label"] != system.system:
        problems.append(f"submission.label is {submission['label']!r}, not {system.system!r}")
    if len(str(submission["abbreviation"])) > ABBREVIATION:
        problems.append(f"submission.abbreviation has more than {ABBREVIATION} letters: {submission['abbreviation']!r}")
    problems += [f"submission.authors: {problem}" for problem in problems_of_authors(submission["authors"])]
    problems += _of_figures(costs, meta["results"]["development_dataset"])
    return [f"{path}: {problem}" for problem in problems]


def _has(meta, dotted: str) -> bool:
    for name in dotted.split("."):
        if not isinstance(meta, dict) or name not in meta:
            return False
        meta = meta[name]
    return True


def _of_figures(costs: dict, results: dict) -> list[str]:
    problems = []
    for name, limit in (("total_model_size", complexity.MAX_PARAMS_MEMORY), ("macs", complexity.MAX_MACS)):
        if not _is_number(costs[name], 1, limit):
            problems.append(f"system.complexity.{name} is {costs[name]!r}, not a number up to {limit:,}")
    if not _is_number(costs["total_parameters"], 1, math.inf):
        problems.append(f"system.complexity.total_parameters is {costs['total_parameters']!r}, not a number")
    if all(results[block] is None for block in BLOCKS):
        problems.append(f"results.development_dataset has neither {' nor '.join(BLOCKS)}: test the checkpoint first")
    if results.get("note"):
        problems.append(f"results.development_dataset.note says {results['note']!r}: give figures of TAU22")
    for block in (block for block in BLOCKS if results[block] is not None):
        tables = {"overall": None, "class_wise": SCENES, "device_wise": DEVICES}
        for table, names in tables.items():
            where = f"results.development_dataset.{block}.{table}"
            if not _has(results, f"{block}.{table}") or not isinstance(results[block][table], dict):
                problems.append(f"{where} is missing")
                continue
            values = results[block][table]
            for name in [None] if names is None else names:
                figures = values if name is None else values.get(name)
                accuracy = figures.get("accuracy") if isinstance(figures, dict) else None
                if not _is_number(accuracy, 0, 100):
                    place = where if name is None else f"{where}.{name}"
                    problems.append(f"{place}.accuracy is {accuracy!r}, not a percentage")
    return problems


def _is_number(x, low: float, high: float) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
