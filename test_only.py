"""Evaluate a checkpoint of either stage on the test split.

    python test_only.py --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --dataset_dir /data/TAU22

Model and front end come from the checkpoint; an architecture flag that contradicts it stops the script.
"""

from dcase import errors, evaluation, training
from dcase.config import parse_test, start_run
from dcase.lit import SceneClassifier
from dcase.loading import find_source
from dcase.logmel import samples_for


def main() -> None:
    config, checkpoint = parse_test(__doc__)
    source = find_source(config.data)
    module = SceneClassifier.from_checkpoint(checkpoint, config)
    run = start_run(config, None)
    n_samples = samples_for(config.logmel, config.data.orig_sample_rate)
    with training.loggers(config, run) as loggers:
        evaluation.evaluate(module, source, n_samples, config, run, loggers)


if __name__ == "__main__":
    errors.run(main)
