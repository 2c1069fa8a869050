"""The challenge's meta.yaml of a submitted system, as far as a run can fill it in.

The fields are those of DCASE2025 Task 1. What only the authors know is `TODO`, which `dcase.validate_submission`
refuses; what no test has measured is null, as the challenge asks for.
"""

from pathlib import Path

import yaml

from dcase.complexity import Complexity
from dcase.data.labels import DEVICES, SCENES
from dcase.errors import UserError, one_line
from dcase.files import replace_file
from dcase.model.named import FIXED
from dcase.runs.config import with_all_fields
from dcase.runs.folder import CROSS_FIT, Run

TODO = "TODO"
AUTHOR = {
    "lastname": TODO,
    "firstname": TODO,
    "email": TODO,
    "corresponding": True,
    "affiliation": {"abbreviation": TODO, "institute": TODO, "department": TODO, "location": TODO},
}
# What the challenge's template asks of each author; the department is optional, and one author is corresponding.
OF_AUTHOR = ("lastname", "firstname", "email")
OF_AFFILIATION = ("abbreviation", "institute", "location")
BLOCKS = ("device_specific", "general")  # of the results
FINE_TUNING = {
    "full": "per-device end-to-end fine-tuning",
    "lora": "per-device low-rank fine-tuning, merged into the weights",
    "head": "per-device classifiers",
}
SHARING = {"full": "fully device-specific", "lora": "fully device-specific", "head": "partially shared"}
AUGMENTATION = {  # what the challenge calls it -> the flag that turns it on
    "freq-mixstyle": "mixstyle_p",
    "mixup": "mixup_alpha",
    "dir augmentation": "dir_path",
    "time rolling": "roll_sec",
    "frequency masking": "freqm",
    "time masking": "timem",
}
OF_BITS = {32: [], 16: ["precision_16"], 8: ["weight quantization"]}  # complexity management
KEPT = {  # what authors may fill in, and keep when the file is made again
    "submission": ("name", "abbreviation", "authors"),
    "system": ("inference_code", "source_code", "external_datasets"),
}


def meta_of(system: str, checkpoint: dict, runs: list[Run], cost: Complexity, authors: list[dict]) -> dict:
    """Return the content of meta.yaml.

    Args:
        system: the system's label, Doe_Uni_task1_1.
        checkpoint: what is submitted.
        runs: the run that it belongs to and those before it (`Run.lineage`).
        cost: of one of its models, as stored.
        authors: those of --authors; empty: to be filled in.

    Raises `UserError` where a file of a run is damaged.
    """
    model = checkpoint["config"]["model"]["model"]
    configs = [with_all_fields(run.read_config(), f"{run.folder}/config.json") for run in runs]
    external = _external(configs)
    return {
        "submission": {
            "label": system,
            "name": configs[0]["run"]["experiment_name"] or model if configs else model,
            "abbreviation": model[:10],
            "authors": authors or [AUTHOR],
        },
        "system": {
            "inference_code": TODO,
            "source_code": None,
            "description": _description(checkpoint, [config for config in configs if "augment" in config]),
            "complexity": {
                "total_model_size": cost.total_param_bytes,  # bytes, all that is stored of the largest model
                "total_parameters": cost.params,
                "macs": cost.torchinfo_macs,  # the field asks for torchinfo's, which leave out most of a Mamba
                "macs_with_every_token_and_scan": cost.macs,
            },
            "external_datasets": [{"name": name, "url": TODO, "total_audio_length": None} for name in external.values()]
            or None,
        },
        "results": {"development_dataset": _results(checkpoint, runs)},
    }


def keep_filled_in(meta: dict, path: Path) -> dict:
    """Return ``meta`` with what its authors have filled in (`KEPT`) in an earlier file of it."""
    before = read_yaml(path) if path.is_file() else None
    for block, fields in KEPT.items():
        filled = before.get(block) if isinstance(before, dict) else None
        for name in fields:
            if isinstance(filled, dict) and filled.get(name) and not todo_fields(filled[name]):
                if name != "authors" or meta[block][name] == [AUTHOR]:
                    meta[block][name] = filled[name]
    return meta


def write_meta(meta: dict, path: Path) -> None:
    text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=120)
    replace_file(path, lambda beside: beside.write_text(text))


def read_yaml(path: Path):
    """Return the plain values of a YAML or JSON file. Raises `UserError`, naming it, where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({one_line(error)})") from error


def read_authors(path: Path) -> list[dict]:
    """Return the authors of --authors. Raises `UserError`, with all problems, where the challenge asks for more."""
    if not path.is_file():
        raise UserError(f"--authors {path}: there is no such file")
    authors = read_yaml(path)
    if problems := problems_of_authors(authors):
        raise UserError(f"--authors {path}: {'; '.join(problems)}")
    return authors


def problems_of_authors(authors) -> list[str]:
    """Return what is wrong with a list of authors, a line for each author and one for all."""
    if not isinstance(authors, list) or not authors or not all(isinstance(author, dict) for author in authors):
        return [f"this is no list of authors, each with {', '.join(AUTHOR)}"]
    problems = []
    for number, author in enumerate(authors, 1):
        places = author.get("affiliation")
        places = places if isinstance(places, list) and places else [places]
        missing = [name for name in OF_AUTHOR if not author.get(name)]
        missing += [
            f"affiliation.{name}"
            for name in OF_AFFILIATION
            if not all(isinstance(place, dict) and place.get(name) for place in places)
        ]
        if missing:
            problems.append(f"author {number} has no {', '.join(missing)}")
    corresponding = sum(author.get("corresponding") is True for author in authors)
    if corresponding != 1:
        problems.append(f"{corresponding} authors are corresponding: mark one of them, corresponding: true")
    return problems


def todo_fields(value, name: str = "") -> list[str]:
    """Return the dotted names of all fields that are still `TODO`."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value, 1)
        return [field for key, x in parts for field in todo_fields(x, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(value, str) and value.startswith(TODO) else []


def _description(checkpoint: dict, training: list[dict]) -> dict:
    """Return "description". ``training``: the configurations of the training runs, the latest first."""
    config, device_ids = checkpoint["config"], checkpoint["device_ids"]
    general = next((config for config in training if "ckpt_id" not in config), None)
    tuning = next((config for config in training if "ckpt_id" in config), None) if device_ids else None
    finetune = tuning.get("finetune", "full") if tuning else None
    bits = config["storage"]["weight_bits"]
    used = [name for name, flag in AUGMENTATION.items() if any(run["augment"].get(flag) for run in training)]
    management = ["network design", *OF_BITS[bits]]
    stages = ["train general model"]
    if general and (general.get("distill", {}).get("teacher") or general.get("cross_fit")):
        management.append("knowledge distillation")
        stages = ["train teachers", "train general student model with knowledge distillation"]
    if general and general.get("init_from") and config["model"]["model"] not in FIXED:
        management.append("pruning")
    if general:
        stages[-1] += f" ({_fit(general)})"
        if bits == 8 and general["storage"]["weight_bits"] == 8 and general["fit"]["qat_epochs"]:
            stages.append("quantization-aware training")
    if tuning:
        stages.append(f"{FINE_TUNING[finetune]} ({_fit(tuning)})")
        if tuning.get("own_share", 1) != 1:
            stages.append("weight interpolation with the general model")
    is_cnn = config["model"]["model"] in FIXED
    return {
        "input_sampling_rate": f"{config['logmel']['sample_rate'] / 1000:g}kHz",
        "acoustic_features": "log-mel energies",
        "data_augmentation": ", ".join(used) or None if training else TODO,
        "machine_learning_method": "CNN" if is_cnn else "Audio Mamba (bidirectional state-space model)",
        "external_data_usage": ", ".join(_external(training)) or None,
        "complexity_management": ", ".join(management),
        "pipeline": ", ".join(stages) if general else TODO,
        "framework": "pytorch",
        "device_information": FINE_TUNING.get(finetune, TODO) if device_ids else None,
        "num_models_at_inference": 1 + len(device_ids),
        "model_weight_sharing": SHARING.get(finetune, TODO) if device_ids else "fully shared",
    }


def _external(configs: list[dict]) -> dict[str, str]:
    """Return data used beside TAU22 -> its name, as far as the runs know it."""
    used = {}
    for config in configs:
        if path := config.get("augment", {}).get("dir_path"):
            used["impulse responses of devices"] = f"{TODO}: the device responses in {Path(path).name}"
        start = config.get("init_from") or ""
        if path := config.get("pretrained") or (start if "/" in start or "." in start else ""):
            used["pre-trained model"] = f"{TODO}: what {Path(path).name} was trained on"
        # Neither the id of a run, nor what a run's own teachers say.
        given = config.get("distill", {}).get("teacher", "").split(",")
        others = [Path(name) for name in given if "/" in name or "." in name]
        if others := [path.name for path in others if not _is_cross_fitted(path)]:
            used["teachers"] = f"{TODO}: what the models of {', '.join(others)} were trained on"
    return used


def _is_cross_fitted(path: Path) -> bool:
    return path.parent.name == CROSS_FIT and Run(path.parent.parent).has_config()


def _fit(config: dict) -> str:
    fit = config["fit"]
    rates = " or ".join(config["lr_choices"].split(",")) if config.get("lr_choices") else f"{fit['lr']:g}"
    clips = config["machine"]["batch_size"] * fit["accumulate_grad_batches"]
    return f"{fit['n_epochs']} epochs of AdamW; lr {rates}; batch {clips}; split{config['split']['subset']}"


def _results(checkpoint: dict, runs: list[Run]) -> dict:
    """Return the figures of the submitted models' own test, and of the general model's.

    Figures count only where they were measured at the same number of bits. Raises `UserError` for a damaged file.
    """
    found = {block: None for block in BLOCKS}
    note = ""
    for run in runs:
        if (results := run.results()) is None:
            continue  # not tested, or fine-tuned for some of the devices only
        block = "device_specific" if results.get("device_models") else "general"
        same = (results.get("complexity") or {}).get("weight_bits") == checkpoint["config"]["storage"]["weight_bits"]
        if (
            found[block] is None
            and same
            and set(results.get("device_models") or []) in (set(), set(checkpoint["device_ids"]))
        ):
            found[block] = _figures(results)
            note = note or results["note"]
    return found | ({"note": note} if note else {})


def _figures(results: dict) -> dict:
    def percent(x: float | None) -> float | None:
        return None if x is None else round(100 * x, 2)

    def table(accuracies: dict, names: tuple[str, ...]) -> dict:
        return {name: {"accuracy": percent(accuracies.get(name)), "logloss": None} for name in names}

    return {
        "overall": {
            "accuracy": percent(results["macro_avg_acc"]),
            "logloss": None if results["loss"] is None else round(results["loss"], 4),
        },
        "class_wise": table(results["scene_acc"], SCENES),
        "device_wise": table(results["device_acc"], DEVICES),
    }
