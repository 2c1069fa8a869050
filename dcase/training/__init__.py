"""What runs the LightningModule (`dcase.lit`): stage 1, stage 2, several seeds, several processes.

fit, loading                       the Trainer and its checkpoints; which clips a batch holds
fine_tuning, adapters              one model per device; low-rank fine-tuning
distillation, teachers             learning from other models
averaging                          averaged weights
seeds, processes, stopping         --seeds N; DDP; signals
"""
