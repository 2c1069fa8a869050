"""Weights of Vim, AuM, the earlier code or a run for an Audio Mamba: ``python -m aum.pretrained FILE`` shows a file's.

layouts     the tensors of a file under our names
source      what a file holds: its layout and the shape of its model
transfer    its weights in a model of another input size or other classes
"""

from aum.pretrained.layouts import PretrainedError
from aum.pretrained.source import UnknownGrid
from aum.pretrained.transfer import Report, load_pretrained

__all__ = ["PretrainedError", "Report", "UnknownGrid", "load_pretrained"]
