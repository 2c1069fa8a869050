"""The model card of a published model: what it is, its figures, its size, how to use it, and its limits.

Every figure is the run's own, from results.json; where that is missing, the card says so.
"""

import re
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from dcase.data.tau22 import SCENES
from dcase.report import CHECKER_NOTE, class_table, complexity_comparison, device_table, markdown
from dcase.runs.stored import GENERAL

TAU22, TAU22_ID = "TAU22", "tau-urban-acoustic-scenes-2022-mobile"


@dataclass(frozen=True)
class Published:
    """The model that a card describes."""

    folder: str  # name of the model's folder
    name: str  # of the run, or of the model
    front_end: dict  # as in config.json
    seconds: float  # of sound that the model takes at once
    complexity: dict  # `complexity.Complexity.as_dict`
    training: dict  # the run's configuration, as far as it is known
    results: dict | None  # content of results.json
    licence: str  # an identifier of the Hugging Face Hub

    @property
    def model_of(self) -> str:
        return self.front_end["run"]["model_of"]

    @property
    def title(self) -> str:
        return self.name if self.model_of == GENERAL else f"{self.name}, device {self.model_of}"


def text(published: Published) -> str:
    """Return README.md of a published model."""
    parts = [
        f"---\n{_metadata(published).to_yaml()}\n---",
        f"# {published.title}",
        _what(published),
        "## Figures",
        *_figures(published),
        "## Training",
        _training(published),
        "## Size",
        complexity_comparison(published.complexity, published.title, False),
        CHECKER_NOTE,
        "## Use",
        _use(published),
        "## Front end",
        _front_end(published.front_end),
        "## Limits and intended use",
        _limits(published),
        "## Licence",
        "The code is under the MIT licence. The recordings that a model was trained on have licences of their own, "
        "which may bind its weights too: TAU22's allows non-commercial use only.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(published: Published) -> ModelCardData:
    results, data, figures = published.results, None, None
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
        license=published.licence,
        library_name="audio_mamba",
        pipeline_tag="audio-classification",
        tags=["audio-mamba", "acoustic-scene-classification", "dcase", "state-space-model"],
        datasets=None if data is None else [data],
        metrics=["accuracy"],
        model_name=published.title,
        eval_results=figures,
    )


def _what(published: Published) -> str:
    device = "It is the general model, for every recording device."
    if published.model_of != GENERAL:
        device = f"It was fine-tuned for recordings of device {published.model_of}; use the general model for others."
    size = f"{published.front_end['run']['model']}, {published.complexity['params']:,} parameters"
    scenes = f"{', '.join(SCENES[:-1])} or {SCENES[-1]}"
    return f"An Audio Mamba ({size}) that names the scene of {published.seconds:.2f} s of sound: {scenes}. {device}"


def _figures(published: Published) -> list[str]:
    results = published.results
    if results is None:
        return ["No figures: there was no results.json beside the checkpoint that it was published from."]
    parts = [f"Tested on the test split of {results['data']}, {results['n_clips']:,} clips, in percent."]
    if results["note"]:
        parts.append(f"**{results['note']}**")
    if results["device_models"]:
        parts.append(
            f"These are the figures of the whole run, in which the devices {', '.join(results['device_models'])} have "
            "models of their own and the general model serves the others."
        )
    return [*parts, class_table(results, published.name, False), device_table(results, published.name, False)]


def _training(published: Published) -> str:
    config, split, bits = published.training, published.training["split"], published.front_end["run"]["weight_bits"]
    data = f"the training clips of {published.results['data']}" if published.results else "clips that are not known"
    lines = [f"Trained on {data} (--subset {split['subset']}, --val_fraction {split['val_fraction']})."]
    if fit := config.get("fit"):
        lines.append(f"Epochs: {fit['n_epochs']}; highest learning rate: {fit['lr']}; seed: {fit['seed']}.")
    if config.get("distill", {}).get("teacher"):
        lines.append("It was distilled from teachers.")
    if bits < 32:
        lines.append(f"Its weights are rounded to {bits} bits, as tested, and are kept here as 32-bit numbers.")
    return "\n".join(lines)


def _use(published: Published) -> str:
    folder, front_end = published.folder, published.front_end
    log_mel = f"(b, 1, {front_end['n_mels']}, {published.complexity['input_size'][3]})"
    return f"""You need the model's folder, {folder}/, and the code of Audio Mamba (`aum/` and `dcase/`). Recordings may
have any length, rate and number of channels:

```bash
python -m dcase.predict recording.wav --ckpt_path {folder}
```

The same from Python:

```python
from dcase.deployment.prediction import Recording, load_module, predict

module = load_module("{folder}")
for prediction in predict(module, [Recording("recording.wav")]):
    print(prediction.best(3), prediction.seconds)
```

Only the backbone, on log-mels {log_mel} calculated with the settings of `model.front_end`:

```python
import aum
import torch

model = aum.AudioMamba.from_pretrained("{folder}")
logits = model(torch.zeros(1, 1, model.config.n_mels, model.config.target_length))
print(model.front_end["scenes"][logits.argmax()])
```"""


def _front_end(front_end: dict) -> str:
    units = {
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
    return markdown(["Setting", "Value", "Unit"], [[name, str(front_end[name]), unit] for name, unit in units.items()])


def _limits(published: Published) -> str:
    return (
        f"For research on acoustic scene classification. The model knows {len(SCENES)} scenes and names one for any "
        "sound; its probabilities are not calibrated. Expect lower accuracy in other places and with other microphones "
        "than those of training: its accuracy on unseen devices gives an idea. It is not made for decisions about "
        "people or for surveillance."
    )
