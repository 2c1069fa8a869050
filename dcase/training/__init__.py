"""Training and testing a model.

classifier, lit                   the LightningModule of both stages: what a checkpoint holds; training and testing it
fit, bars, stopping               the Trainer and its checkpoints; progress; signals
fine_tuning, teachers, seeds      one model per device; learning from other models; --seeds N
evaluation                        the test at the end of every script
"""
