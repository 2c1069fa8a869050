"""The model card of a published model: card.md, filled in with the run's own figures."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dcase.data.labels import Labels
from dcase.errors import command
from dcase.report import CHECKER_NOTE, class_table, complexity_comparison, device_table, markdown
from dcase.runs.stored import GENERAL

TEMPLATE = Path(__file__).with_name("card.md")
TAU22, TAU22_ID = "TAU22", "tau-urban-acoustic-scenes-2022-mobile"
UNITS = {  # of the front end's settings
    "orig_sample_rate": "Hz, of recordings",
    "sample_rate": "Hz, of the resampled sound",
    "window_length": "samples",
    "hop_length": "samples",
    "n_fft": "samples",
    "n_mels": "mel bins",
    "f_min": "Hz",
    "f_max": "Hz; None: half of sample_rate",
    "target_length": "frames; None: those of the clip",
    "mean": "subtracted from log(power + 1e-5)",
    "std": "divisor after that",
}


def text(
    folder: str,
    name: str,
    front_end: dict,
    seconds: float,
    complexity: dict,
    training: dict,
    results: dict | None,
    licence: str,
) -> str:
    """Return README.md of a published model.

    Args:
        folder: name of the model's folder.
        name: of the run, or of the model.
        front_end: as in config.json.
        seconds: of sound that the model takes at once.
        complexity: `complexity.Complexity.as_dict`.
        training: the run's configuration, as far as it is known.
        results: content of results.json; None: the card says that there are no figures.
        licence: an identifier of the Hugging Face Hub.
    """
    run, labels = front_end["run"], Labels.from_plain(front_end, "the front end")
    title = name if run["model_of"] == GENERAL else f"{name}, device {run['model_of']}"
    card = ModelCard.from_template(
        _metadata(title, results, licence),
        template_path=str(TEMPLATE),
        title=title,
        run=run,
        folder=folder,
        quoted=command(folder),
        params=complexity["params"],
        seconds=seconds,
        scenes=labels.scenes,
        training=training,
        results=results,
        class_table=results and class_table(results, name, False, labels),
        device_table=results and device_table(results, name, False, labels),
        size_table=complexity_comparison(complexity, title, False),
        checker_note=CHECKER_NOTE,
        log_mel=f"(b, 1, {front_end['n_mels']}, {complexity['input_size'][3]})",
        front_end_table=markdown(
            ["Setting", "Value", "Unit"], [[name, str(front_end[name]), unit] for name, unit in UNITS.items()]
        ),
    )
    return f"{card}\n"


def _metadata(title: str, results: dict | None, licence: str) -> ModelCardData:
    data, figures = None, None
    if results is not None:
        data = TAU22_ID if results["data"] == TAU22 else re.sub(r"[^\w.-]+", "-", results["data"])
    if results is not None and results["macro_avg_acc"] is not None:
        figures = [
            EvalResult(
                task_type="audio-classification",
                dataset_type=data,
                dataset_name=results["data"],
                metric_type="accuracy",
                metric_name="macro-average accuracy",
                metric_value=results["macro_avg_acc"],
            )
        ]
    return ModelCardData(
        license=licence,
        library_name="audio_mamba",
        pipeline_tag="audio-classification",
        tags=["audio-mamba", "acoustic-scene-classification", "dcase", "state-space-model"],
        datasets=None if data is None else [data],
        metrics=["accuracy"],
        model_name=title,
        eval_results=figures,
    )
