"""A trained model outside training.

prediction                        scenes of any recordings
card                              the model card of a published model
exported, onnx_format             what of a model other runtimes get, and in which file
"""
