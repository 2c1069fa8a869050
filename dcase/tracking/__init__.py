"""Where figures go while a model is trained: `loggers`, W&B's pictures and tables (`wandb_media`), checkpoints in W&B
(`artifacts`).
"""
