"""Stage 2: fine-tune the general model for each known recording device, then test all of them once.

    python train_device_specific.py --ckpt_id RUN_ID --dataset_dir /data/TAU22
    python train_device_specific.py --resume RUN_ID            # continue after an interruption
    python train_device_specific.py --ckpt_id RUN_ID --only_devices a,b --own_share 0.5 --keep all    # a part

RUN_ID of --ckpt_id is the run id that train_base.py printed. Model, front end and split are the general model's; a
flag that contradicts them stops the script. Augmentation and batch size are the general model's, too, and the learning
rate is a tenth of its rate, unless flags say otherwise; --help with --ckpt_id shows that run's. The validation clips of
all devices together decide whether the devices' models are used (--keep); unknown devices always use the general model.
"""

import dataclasses

from dcase import errors
from dcase.data.loading import clips_id, find_source, open_sound, training_clips, with_sound
from dcase.errors import UserError
from dcase.machine import is_main
from dcase.runs.checkpoints import save_checkpoint
from dcase.runs.config import inherited, parse_device_specific, same_place, start_run, with_data_of
from dcase.runs.loggers import open_loggers
from dcase.training import evaluation, fit
from dcase.training.fine_tuning import FineTuning
from dcase.training.lit import SceneClassifier
from dcase.training.teachers import load_teachers


def main() -> None:
    config, run, checkpoint = parse_device_specific(__doc__)
    if checkpoint["device_ids"]:
        raise UserError(f"--ckpt_id {config.ckpt_id} is a device-specific run: give the id of a run of train_base.py")
    fit.check_machine(config.machine)
    if run is None:
        print(inherited(config, checkpoint))
    config = with_data_of(checkpoint, config)
    source = find_source(config.data, config.split.subset)
    clips = training_clips(source, config.split)
    config, sound = open_sound(config, source.folder)
    train = with_sound(clips[0], sound)
    if clips[1] is not None:
        with_sound(clips[1], sound, like=train)  # mistakes are found now, not at the first device
    test = with_sound(source.test, sound, like=train)

    module = SceneClassifier.from_checkpoint(checkpoint, config, source.labels)
    module.refuse_other_frames(train)
    module.clips_id = clips_id(*clips)
    module.refuse_other_clips(checkpoint, f"the general model --ckpt_id {config.ckpt_id}")
    module.augment.load_responses()
    teachers = load_teachers(config, module, train, run)
    evaluation.warn_if_over(module)

    with start_run(config, run, source.labels, teachers.record()) as run, open_loggers(config, run) as loggers:
        teachers.hear(train, config.machine)
        outcomes, weights = FineTuning(module, clips, train, config, run, loggers, teachers).tune()
        module.set_device_models(weights)
        if is_main():
            save_checkpoint(module.as_checkpoint(), run.best)
        if not config.only_devices:
            optimistic = config.split.val_split == "test"
            more = {"fine_tuning": {device_id: dataclasses.asdict(outcome) for device_id, outcome in outcomes.items()}}
            evaluation.evaluate(module, source, test, config, run, loggers, more, optimistic)
    others = ",..." if config.only_devices else ""
    print(f"next: python test_only.py --ckpt_path {errors.command(run.best)}{others} {same_place(config)}")


if __name__ == "__main__":
    errors.run(main)
