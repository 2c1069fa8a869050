"""The drills in their short form: a fault of every kind, and mutated files of every kind; nothing whole is lost."""

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


def test_no_value_of_a_wrong_type_ends_in_a_traceback():
    """Every kind of file and every command that reads it, once."""
    command = [sys.executable, "-m", "tests.faults.typed", "--n", "52", "--seed", "42"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    works, clear, *others = map(int, re.search(r"^all" + 6 * r" +(\d+)", done.stdout, re.M).groups())
    assert works and clear and works + clear == 52 and not any(others), done.stdout
