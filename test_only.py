"""Evaluate a checkpoint of either stage on the test split.

    python test_only.py --ckpt_path DCASE25_Task1/RUN_ID/checkpoints/best.ckpt --dataset_dir /data/TAU22
    python test_only.py --ckpt_path P/RUN_1/checkpoints/best.ckpt,P/RUN_2/checkpoints/best.ckpt     # of --only_devices

Model and front end come from the checkpoint; an architecture flag that contradicts it stops the script.
"""

from dcase import errors
from dcase.data.labels import Labels, refuse_other_scenes
from dcase.data.loading import find_source, open_sound, with_sound
from dcase.machine import is_main
from dcase.runs.checkpoints import save_checkpoint
from dcase.runs.config import parse_test, start_run, with_data_of
from dcase.runs.loggers import open_loggers
from dcase.training import evaluation, fit
from dcase.training.lit import SceneClassifier


def main() -> None:
    config, checkpoint = parse_test(__doc__)
    fit.check_machine(config.machine)
    config = with_data_of(checkpoint, config)
    source = find_source(config.data)
    refuse_other_scenes(Labels.from_plain(checkpoint, "the checkpoint"), source.labels, "the model")
    config, sound = open_sound(config, source.folder)
    test = with_sound(source.test, sound)
    module = SceneClassifier.from_checkpoint(checkpoint, config, source.labels)
    module.refuse_other_frames(test)
    with start_run(config, None, source.labels) as run, open_loggers(config, run) as loggers:
        if "," in config.ckpt_path and is_main():
            save_checkpoint(module.as_checkpoint(), run.best)
        optimistic = checkpoint["config"]["split"]["val_split"] == "test"
        evaluation.evaluate(module, source, test, config, run, loggers, optimistic=optimistic)


if __name__ == "__main__":
    errors.run(main)
