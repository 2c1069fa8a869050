"""A trained model outside training.

prediction                        scenes of any recordings
card                              the model card of a published model
exported, onnx_format             the exported modules, and the ONNX file of one
"""
