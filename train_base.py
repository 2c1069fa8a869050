"""Stage 1: train one Audio Mamba for all recording devices (the general model), then test it once.

    python train_base.py --dataset_dir /data/TAU22 --model aum_small
    python train_base.py --model aum_nano --n_epochs 20        # on a laptop, with synthetic data
    python train_base.py --model aum_nano --teacher logits.npz     # also learn from others' outputs, or a run's
    python train_base.py --pretrained vim_s.pth --layer_decay 0.75    # start from a published model's weights
    python train_base.py --seeds 3                             # three runs, their mean and deviation
    python train_base.py --resume RUN_ID                       # continue after an interruption

The run goes to <project_name>/<run_id>/; its id is what train_device_specific.py takes as --ckpt_id.
"""

import dataclasses
from pathlib import Path

from dcase import errors
from dcase.data.labels import refuse_other_scenes
from dcase.data.loading import clips_id, find_source, open_sound, training_clips, with_sound
from dcase.data.logmel import empty_bins, fitting, frames_of
from dcase.model import named as models
from dcase.runs import defaults
from dcase.runs.challenge import load_file
from dcase.runs.checkpoints import load_checkpoint
from dcase.runs.config import next_after, parse_base, start_run
from dcase.runs.folder import find_checkpoint
from dcase.runs.loggers import open_loggers
from dcase.training import evaluation, fit, seeds
from dcase.training.cross_fit import cross_fit, plans
from dcase.training.lit import SceneClassifier
from dcase.training.teachers import load_teachers


def main() -> None:
    if seeds.train_each(__doc__):
        return
    config, run = parse_base(__doc__)
    fit.check_machine(config.machine)
    if run is None:
        print(defaults.taken(config))
    source = find_source(config.data, config.split.subset)
    if run:
        refuse_other_scenes(run.labels(), source.labels, f"the run --resume {run.id}")
    train_clips, val_clips = training_clips(source, config.split)
    config, sound = open_sound(config, source.folder)
    if unheard := empty_bins(config.logmel, config.data.orig_sample_rate):
        fits = fitting(config.logmel, config.data.orig_sample_rate)
        flags = [f"--{name} {value}" for name, value in vars(fits).items() if value != getattr(config.logmel, name)]
        print(f"WARNING: {unheard}: train with {' '.join(flags)}")
    train = with_sound(train_clips, sound)
    val = with_sound(val_clips, sound, like=train) if val_clips else None
    test = with_sound(source.test, sound, like=train)

    frames = frames_of(config.logmel, train.n_samples, sound.sample_rate)
    n_scenes = len(source.labels.scenes)
    config = dataclasses.replace(config, model=models.fill(config.model, config.logmel.n_mels, frames, n_scenes))
    fit.seed_everything(config.fit.seed)
    module = SceneClassifier(config, frames, labels=source.labels)
    module.clips_id = clips_id(train_clips, val_clips)
    module.augment.load_responses()
    teachers = load_teachers(config, module, train, run)
    earlier = plans(train_clips, config)
    begins = run is None or not fit.checkpoint_to_resume(run.checkpoints)
    if config.pretrained and begins:
        module.start_from_file(config.pretrained, config.pretrained_grid)
    if config.init_from and begins:
        path = Path(config.init_from)
        if not path.is_file():
            path = find_checkpoint(config.run.project_name, config.init_from, "--init_from")
        source_run = load_file(path)
        module.refuse_other_clips(source_run, f"the model --init_from {config.init_from}")
        module.start_from(source_run)
    evaluation.warn_if_over(module)
    for warning in fit.too_few(len(train), len(val) if val else 0, config):
        print(f"WARNING: {warning}")

    with start_run(config, run, source.labels, teachers.record()) as run, open_loggers(config, run) as loggers:
        if config.cross_fit:
            teachers.add(cross_fit(module, train, val, config, run))
        teachers.hear(train, config.machine)
        if begins and config.normalise:
            fit.fit_normalisation(module, train, config.machine)
        fit.train(module, train, val, config, run.checkpoints, loggers, teachers, earlier=earlier)
        best = load_checkpoint(find_checkpoint(config.run.project_name, run.id))
        module = SceneClassifier.from_checkpoint(best, config, source.labels)
        optimistic = config.split.val_split == "test"
        evaluation.evaluate(module, source, test, config, run, loggers, optimistic=optimistic)
    print(next_after(config, run, len(set(source.training.device.tolist()))))


if __name__ == "__main__":
    errors.run(main)
