"""Problems of a submission's meta.yaml."""

import math

from dcase import complexity
from dcase.data.labels import DEVICES, SCENES
from dcase.errors import UserError
from dcase.submission.meta import BLOCKS, problems_of_authors, read_yaml, todo_fields
from dcase.submission.package import Submission

ABBREVIATION = 10  # letters, at most
RESULTS = "results.development_dataset"
REQUIRED = {  # fields that meta.yaml must have; some may be null
    "submission": "label name abbreviation authors",
    "system": "inference_code external_datasets",
    "system.description": "input_sampling_rate acoustic_features data_augmentation machine_learning_method "
    "external_data_usage complexity_management pipeline framework device_information num_models_at_inference "
    "model_weight_sharing",
    "system.complexity": "total_model_size total_parameters macs",
    RESULTS: " ".join(BLOCKS),
}
LIMITS = {
    "total_model_size": complexity.MAX_PARAMS_MEMORY,
    "macs": complexity.MAX_MACS,
    "total_parameters": math.inf,
}
TABLES = {"overall": (), "class_wise": SCENES, "device_wise": DEVICES}  # of a block of the results, with their rows


def check_meta(system: Submission) -> list[str]:
    """Return the problems of a system's meta.yaml: fields that are missing or to be filled in, impossible figures."""
    path = system.meta
    if not path.is_file():
        return [f"{path} is missing: make it with python -m dcase.submit"]
    try:
        meta = read_yaml(path)
    except UserError as error:
        return [str(error)]
    missing = [
        f"{block}.{name}"
        for block, names in REQUIRED.items()
        for name in names.split()
        if not isinstance(_field(meta, block), dict) or name not in _field(meta, block)
    ]
    if missing:
        return [f"{path}: {name} is missing" for name in missing]
    submission = meta["submission"]
    problems = [f"{name} is still to be filled in (TODO)" for name in todo_fields(meta)]
    if submission["label"] != system.system:
        problems.append(f"submission.label is {submission['label']!r}, not {system.system!r}")
    if len(str(submission["abbreviation"])) > ABBREVIATION:
        problems.append(f"submission.abbreviation has more than {ABBREVIATION} letters: {submission['abbreviation']!r}")
    problems += [f"submission.authors: {problem}" for problem in problems_of_authors(submission["authors"])]
    for name, limit in LIMITS.items():
        if not _is_number(value := meta["system"]["complexity"][name], 1, limit):
            most = "" if limit == math.inf else f" up to {limit:,}"
            problems.append(f"system.complexity.{name} is {value!r}, not a number{most}")
    problems += _of_results(_field(meta, RESULTS))
    return [f"{path}: {problem}" for problem in problems]


def _field(meta, dotted: str):
    """Return the value of a dotted name; None where there is none."""
    for name in dotted.split("."):
        meta = meta.get(name) if isinstance(meta, dict) else None
    return meta


def _of_results(results: dict) -> list[str]:
    problems = []
    if all(results[block] is None for block in BLOCKS):
        problems.append(f"{RESULTS} has neither {' nor '.join(BLOCKS)}: test the checkpoint first")
    if results.get("note"):
        problems.append(f"{RESULTS}.note says {results['note']!r}: give figures of TAU22")
    for block in (block for block in BLOCKS if results[block] is not None):
        for table, rows in TABLES.items():
            if not isinstance(_field(results, f"{block}.{table}"), dict):
                problems.append(f"{RESULTS}.{block}.{table} is missing")
                continue
            for place in [f"{block}.{table}.{row}" for row in rows] or [f"{block}.{table}"]:
                accuracy = _field(results, f"{place}.accuracy")
                if not _is_number(accuracy, 0, 100):
                    problems.append(f"{RESULTS}.{place}.accuracy is {accuracy!r}, not a percentage")
    return problems


def _is_number(x, low: float, high: float) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
