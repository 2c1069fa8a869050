"""The end of every script: test once, write results.json and the report, show the tables."""

from collections.abc import Sequence

import torch
from pytorch_lightning.loggers.logger import Logger

from dcase import complexity
from dcase.data.dataset import TAU22
from dcase.data.loading import Source, evaluation_batches, loader
from dcase.machine import is_main, main_first, name_of
from dcase.report.tested import write_test
from dcase.runs.config import EvalConfig
from dcase.runs.folder import Run
from dcase.runs.loggers import drop_from, show_test
from dcase.runs.stored import load_stored, save_stored
from dcase.training.fit import make_trainer, no_silent_exit, scan_of
from dcase.training.lit import SceneClassifier


def measure(module: SceneClassifier) -> complexity.Complexity:
    """Return the general model's complexity: a device-specific one has the same shape, and limits hold for each."""
    input_size = (1, 1, module.config.logmel.n_mels, module.frames)
    return complexity.measure(module.model, input_size, module.config.storage.weight_bits)


def warn_if_over(module: SceneClassifier) -> None:
    """Print, before training, that the model exceeds the challenge's limits, where it does."""
    warning = complexity.warning(measure(module), module.config.model.model)
    if warning:
        print(warning)


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
    """Test the module on ``test``, the data set of ``source.test``; write and show the results.

    With --weight_bits below 32 the module is stored first and tested as stored. Returns the content of results.json;
    with several processes, only the main one writes, shows and returns all of it.

    ``more`` goes into results.json beside the figures; ``optimistic``: the model was chosen on the test split, which
    results.json and the report then say.
    """
    module.refuse_other_frames(test)
    bits = config.storage.weight_bits
    if bits < 32:
        with main_first():
            if is_main():
                save_stored(module.as_checkpoint(), run.stored, bits)
            module.load_stored(load_stored(run.stored))
    drop_from(loggers, 0, "test/")  # of an earlier end of this run
    with no_silent_exit():
        trainer = make_trainer(config.machine, run.folder, list(loggers))
        trainer.test(module, loader(test, config.machine, evaluation_batches(test, config.machine)), verbose=False)
    if not is_main():
        return module.results
    chosen = "The model was chosen on the test split: its figures are optimistic." if optimistic else ""
    device = trainer.strategy.root_device
    results = {
        "data": source.name,
        "note": " ".join(filter(None, (source.note, chosen))),
        **module.results,
        "device_models": list(module.device_models),
        "complexity": measure(module).as_dict(),
        "tested_on": {  # beside the weights it decides the figures' last digits
            "accelerator": device.type,
            "name": name_of(device),
            "precision": config.machine.precision,
            "threads": torch.get_num_threads(),
            "scan_backend": scan_of(module.model, device, config.machine.precision),
        },
        **(more or {}),
    }
    shown = write_test(run, config, source, results, module.logits.numpy())
    if bits < 32:
        print(f"Stored in {bits} bit, and tested as stored: {run.stored}/")
    show_test(loggers, *shown)
    return results
