"""The end of every script: test once, write results.json and the report, show the tables."""

from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger

from dcase import complexity, processes, report
from dcase.config import EvalConfig
from dcase.dataset import TAU22
from dcase.lit import SceneClassifier
from dcase.loading import Source, evaluation_batches, loader
from dcase.runs import MetricsCsv, Run, Wandb, write_json
from dcase.stored import load_stored, save_stored
from dcase.training import make_trainer, no_silent_exit


def measure(module: SceneClassifier) -> complexity.Complexity:
    """Complexity of one model, the general one: a device-specific one has the same shape, and limits hold for each."""
    input_size = (1, 1, module.config.logmel.n_mels, module.frames)
    return complexity.measure(module.model, input_size, module.config.storage.weight_bits)


def warn_if_over(module: SceneClassifier) -> None:
    """Say before a model is trained that it will be too large for the challenge, where it will."""
    warning = complexity.warning(measure(module), module.config.model.model)
    if warning:
        print(warning)


def store(module: SceneClassifier, folder: Path) -> None:
    """Write each model of the module into ``folder``, in --weight_bits; the module then is what these files hold."""
    with processes.main_first():
        if processes.is_main():
            save_stored(module.as_checkpoint(), folder, module.config.storage.weight_bits)
        module.load_stored(load_stored(folder))


def evaluate(
    module: SceneClassifier,
    source: Source,
    test: TAU22,
    config: EvalConfig,
    run: Run,
    loggers: Sequence[Logger],
    more: dict | None = None,
    optimistic: bool = False,
) -> dict:
    """Run the test split through the module; write and show the results. Returns the content of results.json;
    of several processes, only the main one writes, shows and returns all of it.

    ``more`` goes into results.json beside the figures; ``optimistic``: the model was chosen on the test split, which
    results.json and the report then say.
    """
    module.refuse_other_frames(test)
    if config.storage.weight_bits < 32:
        store(module, run.folder / "stored")
        print(f"stored in {config.storage.weight_bits} bit, and tested as stored: {run.folder / 'stored'}/")
    for logger in loggers:
        if isinstance(logger, MetricsCsv):
            logger.drop_from(0, "test/")  # of an earlier end of this run
    batches = loader(test, config.machine, evaluation_batches(test, config.machine))
    with no_silent_exit():
        make_trainer(config.machine, run.folder, list(loggers)).test(module, batches, verbose=False)
    if not processes.is_main():
        return module.results
    chosen = "The model was chosen on the test split: its figures are optimistic." if optimistic else ""
    note = " ".join(text for text in (source.note, chosen) if text)
    measured = measure(module).as_dict()
    results = {
        "data": source.name,
        "note": note,
        **module.results,
        "device_models": list(module.device_models),
        "complexity": measured,
        **(more or {}),
    }
    write_json(run.folder / "results.json", results)
    name = config.run.experiment_name or config.model.model
    folder = run.folder / "report"
    print("\n" + report.write_report(results, folder, name, note, source.comparable, measured))
    print(f"Figures: {run.folder / 'results.json'}")
    for logger in loggers:
        if isinstance(logger, Wandb):
            logger.call(lambda wandb: _show_in_wandb(wandb, results, name, folder))
    return results


def _show_in_wandb(logger: WandbLogger, results: dict, name: str, folder: Path) -> None:
    """Charts, the two tables and the complexity; the accuracies are there already, as metrics."""
    for chart in (report.CONFUSION_PNG, report.DEVICES_PNG):
        logger.log_image(key=f"test/{chart.removesuffix('.png')}", images=[str(folder / chart)])
    for table in ("scene_acc", "device_acc"):
        columns, values = zip(*results[table].items(), strict=True)
        row = [name, *values, results["macro_avg_acc"]]
        logger.log_table(key=f"test/{table}_table", columns=["model", *columns, "macro_avg_acc"], data=[row])
    measured = results["complexity"]
    figures = ("params", "total_param_bytes", "macs", "torchinfo_macs", "within_limits")
    logger.experiment.summary.update({f"complexity/{figure}": measured[figure] for figure in figures})
