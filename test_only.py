"""Evaluate a checkpoint of either stage on the test split.

    python test_only.py --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --dataset_dir /data/TAU22

Model and front end come from the checkpoint; an architecture flag that contradicts it stops the script.
"""

from dcase import errors, evaluation, training
from dcase.config import parse_test, start_run
from dcase.lit import SceneClassifier
from dcase.loading import find_source
from dcase.logmel import samples_for
from dcase.tau22 import TAU22


def main() -> None:
    config, checkpoint = parse_test(__doc__)
    training.check_machine(config.machine)
    source = find_source(config.data)
    rate = config.data.orig_sample_rate
    test = TAU22(source.test, rate, samples_for(config.logmel, rate))
    module = SceneClassifier.from_checkpoint(checkpoint, config)
    module.refuse_other_frames(test)
    run = start_run(config, None)
    with training.loggers(config, run) as loggers:
        optimistic = checkpoint["config"]["split"]["val_split"] == "test"
        evaluation.evaluate(module, source, test, config, run, loggers, optimistic=optimistic)


if __name__ == "__main__":
    errors.run(main)
