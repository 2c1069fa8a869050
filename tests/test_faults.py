"""The fault drills in their short form: a fault of every kind, and nothing that was whole is lost."""

import re
import subprocess
import sys

from conftest import ROOT


def test_no_fault_of_any_kind_loses_anything():
    command = [sys.executable, "-m", "tests.faults", "--n", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, equal = map(int, re.search(r"all faults +(\d+) +(\d+)", done.stdout).groups())
    assert tried == equal >= 11 + 50, done.stdout
