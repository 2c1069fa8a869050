"""The end of every script: test once, write results.json and the report, show the tables."""

from collections.abc import Sequence

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger

from dcase import complexity, report
from dcase.config import EvalConfig
from dcase.errors import UserError
from dcase.lit import SceneClassifier
from dcase.loading import Source, loader
from dcase.logmel import frames_of
from dcase.runs import Run, write_json
from dcase.tau22 import TAU22, load_clips
from dcase.training import make_trainer


def measure(module: SceneClassifier) -> complexity.Complexity:
    """Complexity of one model, the general one: a device-specific one has the same shape, and limits hold for each."""
    return complexity.measure(module.model, (1, 1, module.config.logmel.n_mels, module.frames))


def evaluate(
    module: SceneClassifier,
    source: Source,
    n_samples: int | None,
    config: EvalConfig,
    run: Run,
    loggers: Sequence[Logger],
    more: dict | None = None,
) -> dict:
    """Run the test split through the module; write and show the results. Returns the content of results.json.

    ``n_samples`` is what each clip is padded or cropped to, None for the clips' own length; ``more`` goes into
    results.json beside the figures.
    """
    clips = load_clips(source.folder, "test")
    test = TAU22(clips, config.data.orig_sample_rate, n_samples)
    frames = frames_of(config.logmel, test.n_samples, config.data.orig_sample_rate)
    if frames != module.frames:
        raise UserError(
            f"the test clips ({clips.name(0)}) make {frames} frames, but the model was trained on {module.frames}: "
            "give data of the same clip length, or train with --target_length"
        )
    trainer = make_trainer(config.machine, run.folder, list(loggers))
    trainer.test(module, loader(test, config.machine), verbose=False)
    measured = measure(module).as_dict()
    results = {
        "data": source.name,
        **module.results,
        "device_models": list(module.device_models),
        "complexity": measured,
        **(more or {}),
    }
    write_json(run.folder / "results.json", results)
    name = config.run.experiment_name or config.model.model
    folder = run.folder / "report"
    print("\n" + report.write_report(results, folder, name, source.note, source.is_tau22, measured))
    print(f"Figures: {run.folder / 'results.json'}")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for chart in (report.CONFUSION_PNG, report.DEVICES_PNG):
                logger.log_image(key=f"test/{chart.removesuffix('.png')}", images=[str(folder / chart)])
    return results
