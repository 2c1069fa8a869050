"""What a run leaves on the disk, and how it is read again.

config, defaults                  the scripts' configuration; the defaults of each model
folder, checkpoints               a run's folder; its checkpoint files
stored, published, trained        models in files of their own; any of them as a checkpoint
loggers, artifacts                metrics.csv, W&B, TensorBoard; checkpoints in W&B
"""
