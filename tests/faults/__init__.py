"""Fault drills, ``python -m tests.faults``: disturb the real commands; nothing that was whole may be lost."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one thread gives the same roundings every time
