"""A trained model outside training.

prediction                  scenes of any recordings
published, card             the folder in which a model is shared, and its model card
exported, onnx_format       what of a model other runtimes get, and in which file
"""
