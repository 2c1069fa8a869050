"""Models: what is trained, how it is made smaller, and its figures.

named, cp_mobile, devices         named models; the baseline's; one model per device
metrics                           every figure of an evaluation
adapters, distillation, averaging fine-tuning of few parameters; teachers' targets; averaged weights
quantisation, pruning             rounded weights; smaller models
"""
