"""The checks of ``python -m dcase.doctor``: what works on this machine."""
