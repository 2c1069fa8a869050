"""What works on this machine: the checks of ``python -m dcase.doctor``."""
