"""The selective scan, and the only place that chooses how it is computed."""

from aum.scan.interface import available_backends, selective_scan_fn

__all__ = ["available_backends", "selective_scan_fn"]
