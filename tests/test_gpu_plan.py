"""`make gpu` itself, without a GPU: what it runs, leaves out and keeps."""

import subprocess
import sys
import time
from argparse import Namespace

from forked import ROOT

from benchmarks import gpu


def part(name: str, stage: str, program: str, **more) -> gpu.Part:
    return gpu.Part(name, stage, 0.1, [[sys.executable, "-c", program]], **more)


def run(parts, tmp_path, minutes=1.0) -> int:
    return gpu.run(
        parts, Namespace(out=tmp_path, minutes=minutes, jobs=2, dry_run=True), gpu.install(tmp_path, tmp_path)
    )


def test_benchmarks_run_whatever_the_tests_said(tmp_path, capsys):
    parts = [
        part("sanitised", "memcheck", "", tool="no-such-tool"),
        part("broken", "tests", "raise SystemExit('three kernels differ')"),
        part("scripts", "tests", "", modules=("torch", "no_such_module")),
        part("speed", "benchmarks", "print('| 7 ms |')", tables="speed.md"),
    ]
    assert run(parts, tmp_path) == 1
    assert [x.outcome for x in parts] == ["left out", "FAILED", "left out", "passed"]
    shown = capsys.readouterr().out
    for line in ("there is no no-such-tool here", "not installed: no_such_module", "three kernels differ", "| 7 ms |"):
        assert line in shown and line in (tmp_path / "results.md").read_text()


def test_what_is_left_when_the_time_is_up_is_killed(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{'import time; time.sleep(77)'}'])"
    parts = [part("slow", "tests", child), part("speed", "benchmarks", "print(1)")]
    began = time.monotonic()
    assert run(parts, tmp_path, minutes=0.5) == 1
    assert time.monotonic() - began < 60
    assert "share of --minutes was up" in parts[0].why and parts[1].outcome == "passed"  # it had kept its share


def test_tests_run_side_by_side_and_benchmarks_alone(tmp_path):
    meet = (
        "import os, sys, time\nopen({0!r} + '/' + sys.argv[1], 'w')\nwhile len(os.listdir({0!r})) < 2: time.sleep(0.05)"
    )
    (tmp_path / "met").mkdir()
    parts = [part(name, "tests", meet.format(str(tmp_path / "met"))) for name in "ab"]
    for x in parts:
        x.commands[0].append(x.name)
    assert run(parts, tmp_path) == 0


def test_the_plan_fits_into_six_minutes(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--plan", "--out", str(tmp_path)]
    *_, last = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert float(last.split()[0]) < 6


def test_a_part_of_the_dry_run(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--dry_run", "--only", "memcheck", "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "| memcheck | memcheck | 0.6 |" in (tmp_path / "out" / "results.md").read_text()
    assert 'tests="1"' in (tmp_path / "out" / "memcheck.xml").read_text()
