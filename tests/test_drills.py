"""The failure drills in their short form: a fault of every kind, and nothing that was finished is lost."""

import re
import subprocess
import sys

from conftest import ROOT


def test_no_fault_of_any_kind_loses_anything(tmp_path):
    command = [sys.executable, "-m", "drills", "--faults", "11", "--keep", str(tmp_path / "drills")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)  # with the seed
    assert done.returncode == 0, done.stdout + done.stderr
    tried, equal, lost, unclear = map(int, re.search(r"^all faults +(.+)$", done.stdout, re.MULTILINE)[1].split())
    assert tried == equal >= 11 and lost == unclear == 0
