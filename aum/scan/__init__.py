"""The selective scan, and the only place that chooses how it is computed."""

from aum.scan.backends import BACKENDS, available_backends, choose, is_forced, pass_over, use_backend
from aum.scan.interface import causal_conv1d, padding_mask, selective_scan_fn

__all__ = [
    "BACKENDS",
    "available_backends",
    "causal_conv1d",
    "choose",
    "is_forced",
    "padding_mask",
    "pass_over",
    "selective_scan_fn",
    "use_backend",
]
