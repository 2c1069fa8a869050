"""What trains and tests a model.

lit                               the LightningModule of both stages
fit, bars, stopping               the Trainer and its checkpoints; progress; signals
fine_tuning, teachers, seeds      one model per device; learning from other models; --seeds N
evaluation                        the test at the end of every script
"""
