"""Training and testing a model.

classifier, lit                   the LightningModule of both stages: what a checkpoint holds; training and testing it
fit, bars, stopping               the Trainer and its checkpoints; progress; signals
fine_tuning, seeds                one model per device; --seeds N
teachers, logits_files, packages  what a model learns from beside the labels: runs, files of logits, others' packages
cross_fit                         a run's own teachers
evaluation                        the test at the end of every script
"""
