"""The end of every script: test once, write results.json and the report, show the tables."""

import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

import aum
from aum.scan import choose
from dcase import complexity, report
from dcase.data.dataset import TAU22
from dcase.data.loading import Source, evaluation_batches, loader
from dcase.errors import one_line
from dcase.files import write_json
from dcase.machine import is_main, main_first
from dcase.report import wandb_media
from dcase.report.page import write_page
from dcase.report.predictions import PREDICTIONS_CSV, of_clips, write_predictions
from dcase.report.run_files import read_finished
from dcase.report.sounds import Recordings
from dcase.runs.config import EvalConfig
from dcase.runs.folder import Run
from dcase.runs.loggers import Wandb, drop_from, show_charts
from dcase.runs.stored import load_stored, save_stored
from dcase.training.fit import DTYPES, make_trainer, no_silent_exit
from dcase.training.lit import SceneClassifier


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
    with main_first():
        if is_main():
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
        store(module, run.stored)
    drop_from(loggers, 0, "test/")  # of an earlier end of this run
    batches = loader(test, config.machine, evaluation_batches(test, config.machine))
    with no_silent_exit():
        trainer = make_trainer(config.machine, run.folder, list(loggers))
        trainer.test(module, batches, verbose=False)
    if not is_main():
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
        "tested_on": _tested_on(module, trainer.strategy.root_device, config),
        **(more or {}),
    }
    predictions = of_clips(test.clips, module.logits.numpy())
    write_predictions(predictions, run.folder / PREDICTIONS_CSV)
    write_json(run.folder / "results.json", results)  # last: it says that the test is done
    name = config.run.experiment_name or config.model.model
    folder = run.folder / "report"
    print("\n" + report.write_report(results, folder, name, note, source.comparable, measured))
    print(f"Figures: {run.folder / 'results.json'}, {run.folder / PREDICTIONS_CSV}")
    _make_page(run, source.folder, config.run.report_audio)
    if config.storage.weight_bits < 32:
        print(f"Stored in {config.storage.weight_bits} bit, and tested as stored: {run.stored}/")
    recordings = partial(Recordings, source.folder, config.data, config.logmel)
    for logger in loggers:
        if isinstance(logger, Wandb):
            logger.call(lambda wandb: wandb_media.show(wandb, results, name, folder, predictions, recordings))
        elif isinstance(logger, TensorBoardLogger):
            charts = (report.CONFUSION_PNG, report.DEVICES_PNG)
            show_charts(logger, {f"test/{chart.removesuffix('.png')}": folder / chart for chart in charts})
    return results


def _tested_on(module: SceneClassifier, device: torch.device, config: EvalConfig) -> dict:
    """What decides the figures' last digits, beside the weights."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    is_mamba = isinstance(module.model, aum.AudioMamba)
    scan = choose(device.type, DTYPES[config.machine.precision]) if is_mamba else None
    return {
        "accelerator": device.type,
        "name": name,
        "precision": config.machine.precision,
        "threads": torch.get_num_threads(),
        "scan_backend": scan,
    }


def _processor() -> str:
    """Linux has its name in a file alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _make_page(run: Run, folder: Path, with_audio: bool) -> None:
    """Whatever ails the page, the test is finished and its figures are written."""
    try:
        print(f"Page: {write_page(read_finished(run.folder), folder, with_audio)}")
    except Exception as error:
        print(f"The report's page could not be made ({one_line(error)}): python -m dcase.report {run.id} tries again")
