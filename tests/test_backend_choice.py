"""Which scan is taken, what is said about it, and that a broken or missing tool costs speed and not the run."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import Program

import aum
from aum.scan import BACKENDS, backends, build, choose, cuda_kernels

MIXER = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("aum").setLevel(logging.INFO)
import aum
for _ in range(2):
    y = aum.BiMamba(8)(torch.randn(1, 5, 8))
y.sum().backward()
"""


CHOSEN = "INFO selective scan: backend 'cpu' for float32 on cpu"


@pytest.fixture
def start(tmp_path):
    """Start a program with an empty cache for the compiled kernels: start(text, CC="gcc").

    It is forked from a process that has imported aum and has chosen no backend.
    """

    def start(program=MIXER, **environment) -> Program:
        path = tmp_path / "program.py"
        path.write_text(program)
        environment = {"AUDIO_MAMBA_CACHE": tmp_path, "AUM_SCAN_BACKEND": "", "CC": ""} | environment
        return Program(str(path), cwd=ROOT, env={name: str(value) for name, value in environment.items()})

    return start


@pytest.fixture
def run(start):
    """Run such a program, which must succeed, and return the lines on its stderr."""

    def run(*program, **environment) -> list[str]:
        return start(*program, **environment).wait().succeeded().err.splitlines()

    return run


def test_the_kernels_are_compiled_once_and_again_where_the_file_is_damaged(run, tmp_path):
    lines = run()
    assert len(lines) == 2 and lines[1] == CHOSEN
    assert "compiling the CPU kernels of the selective scan, once" in lines[0] and str(tmp_path) in lines[0]
    assert run() == [CHOSEN], "the second process finds them compiled"
    (library,) = (tmp_path / "audio_mamba").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    lines = run()
    assert any("damaged" in line and str(library) in line for line in lines) and lines[-1] == CHOSEN
    assert run() == [CHOSEN], "it is whole again"


FAILING = '#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "kernels.c:1: error: no such luck" >&2; exit 1\n'


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"PATH": "/nowhere"}, "no C compiler on PATH: install one (apt install gcc"),
        ({"CC": "nothing-of-this-name"}, "not on PATH"),
        ({"CC": "false"}, "does not work"),
        ({"CC": 'gcc "'}, "ValueError: No closing quotation"),
        ({"CC": "./cc"}, "error: no such luck"),  # it fails on the kernels
    ],
)
def test_a_compiler_that_is_missing_or_does_not_work(run, tmp_path, environment, said):
    compiler = tmp_path / "cc"
    compiler.write_text(FAILING)
    compiler.chmod(0o755)
    failing = environment.get("CC") == "./cc"
    *before, line = run(**environment | ({"CC": compiler} if failing else {}))
    assert len(before) == failing  # "compiling ..."
    assert line.startswith("WARNING selective scan: backend 'torch' for float32 on cpu; not 'cpu': ") and said in line


def test_a_compiler_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT", 0.1)
    with pytest.raises(build.NotAvailable, match="took more than 0.1 s: try again when .* or name another one in CC"):
        build._compile(["sh", "-c", "sleep 9"], (), tmp_path, "x")


def test_a_cache_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    lines = run(AUDIO_MAMBA_CACHE=tmp_path / "file")
    assert sum("for this run only" in line and "AUDIO_MAMBA_CACHE" in line for line in lines) == 1
    assert lines[-1] == CHOSEN


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Return the path of the library that a process would load; nothing is compiled or loaded."""
    monkeypatch.setenv("AUDIO_MAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_load", lambda path: path)
    monkeypatch.setattr(build, "_compile", lambda _, machine, folder, name: folder / f"{name}-{'0' * 16}.so")
    return build.library.__wrapped__


@pytest.mark.parametrize("attack", ["folder", "parent", "file", "link", "another's folder", "another's file"])
def test_a_library_that_others_could_have_planted_is_not_loaded(loaded, tmp_path, caplog, attack):
    compiled = loaded()
    content = b"code of another user"
    planted = compiled.with_name(compiled.name.replace("0" * 16, build._digest(content)))
    planted.write_bytes(content)
    assert loaded() == planted and not caplog.records
    of_others = {"folder": planted.parent, "parent": tmp_path, "file": planted}
    if attack in of_others:
        of_others[attack].chmod(0o777)
    elif attack == "link":
        planted.rename(tmp_path / "elsewhere.so")
        planted.symlink_to(tmp_path / "elsewhere.so")
    elif os.geteuid():
        pytest.skip("only root can give files to others")
    else:
        os.chown(of_others[attack.removeprefix("another's ")], 12345, 12345)
    assert loaded().parent.name.startswith("audio_mamba-")  # a temporary folder
    (line,) = (record.getMessage() for record in caplog.records)
    assert "for this run only" in line and str(tmp_path) in line


def test_the_cache_is_made_for_its_user_alone(loaded, tmp_path):
    before = os.umask(0o002)
    try:
        assert loaded().parent == tmp_path / "cache" / "audio_mamba"
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == {0o700}
    tmp_path.chmod(0o1777)  # as /tmp
    assert loaded().parent == tmp_path / "cache" / "audio_mamba"
    loaded().parent.chmod(0o775)  # as an earlier version made it
    assert loaded().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not {"avx"} & set(Path("/proc/cpuinfo").read_text().split()), reason="not an x86-64 with AVX")
@pytest.mark.parametrize("flags, lanes", [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_the_code_for_older_processors(run, flags, lanes):
    program = f"""
import aum, torch
from aum.scan import build
assert build.library().aum_vector_lanes() == {lanes}
for dtype in (torch.float32, torch.bfloat16):
    assert aum.self_test("cpu", dtype) == "cpu"
"""
    run(program, CC=f"cc {flags}")


def test_import_is_light_and_a_broken_causal_conv1d_does_not_stop_it(tmp_path):
    """The backbone needs torch, but not torch._dynamo, which takes more than a second to import."""
    (tmp_path / "causal_conv1d.py").write_text("raise OSError('libcudart.so.11 is missing')")
    program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport aum\n"
    program += "assert aum.scan.cuda_kernels.causal_conv1d_fn is None and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_two_processes_that_compile_at_once(start, tmp_path):
    for process in [start() for _ in range(2)]:
        assert "backend 'cpu'" in process.wait().succeeded().err
    assert [path.suffix for path in (tmp_path / "audio_mamba").iterdir()] == [".so"]


@pytest.mark.parametrize(
    "module, said",
    [
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", "cannot be loaded: ImportError: undefined symbol"),
        ("raise RuntimeError('no CUDA')", "cannot be loaded: RuntimeError: no CUDA"),
        ("import gone_module", "cannot be loaded: ModuleNotFoundError: No module named 'gone_module'"),
        ("def fwd(): pass", "has no bwd"),
    ],
)
def test_a_broken_mamba_ssm(run, tmp_path, module, said):
    (tmp_path / "selective_scan_cuda.py").write_text(module)
    program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{MIXER}"
    program += "\nprint(aum.scan.BACKENDS['mamba_ssm'].missing(), file=sys.stderr)"
    lines = run(program)
    assert lines[-2] == CHOSEN and said in lines[-1]


def test_mamba_ssm_that_is_not_installed():
    assert "requirements-cuda.txt" in BACKENDS["mamba_ssm"].missing() and "mamba_ssm" not in aum.available_backends()
    assert "torch" in aum.available_backends()


def test_what_cuda_would_take(monkeypatch):
    """Without a GPU: the choice goes by the type of device alone."""
    backends._choose.cache_clear()
    assert choose("cuda", torch.bfloat16) == "triton"
    assert choose("cuda", torch.float64) == "torch"
    monkeypatch.setitem(BACKENDS, "triton", _missing("triton"))
    backends._choose.cache_clear()
    assert choose("cuda", torch.bfloat16) == "torch"
    monkeypatch.setitem(BACKENDS, "mamba_ssm", _missing("mamba_ssm", None))
    backends._choose.cache_clear()
    assert choose("cuda", torch.bfloat16) == "mamba_ssm"
    try:
        torch.use_deterministic_algorithms(True)
        assert choose("cuda", torch.bfloat16) == "torch"
        with pytest.raises(ValueError, match="'mamba_ssm' .backend=. cannot be used.*the same bits every time"):
            choose("cuda", torch.bfloat16, "mamba_ssm")
    finally:
        torch.use_deterministic_algorithms(False)
        backends._choose.cache_clear()


def _missing(name, reason="it is broken"):
    return dataclasses.replace(BACKENDS[name], missing=lambda: reason)


@pytest.mark.parametrize(
    "name, dtype, said",
    [
        ("fastest", torch.float32, "no scan backend 'fastest' .backend=.; there is cpu, triton, mamba_ssm, torch"),
        ("triton", torch.float32, "'triton' .backend=. cannot be used for float32 on cpu: runs on cuda only"),
        ("cpu", torch.float64, "cannot be used for float64 on cpu: takes float32, bfloat16 only"),
    ],
)
def test_a_backend_that_does_not_exist_or_does_not_fit(name, dtype, said):
    u, A, B = torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(2, 1, dtype=dtype), torch.zeros(1, 1, 3, dtype=dtype)
    with pytest.raises(ValueError, match=said):
        aum.selective_scan_fn(u, u, A, B, B, backend=name)


def test_argument_before_context_before_environment(monkeypatch):
    assert choose("cpu", torch.float32) == "cpu"
    monkeypatch.setenv("AUM_SCAN_BACKEND", "torch")
    assert choose("cpu", torch.float32) == "torch"
    with aum.use_backend("cpu"):
        assert choose("cpu", torch.float32) == "cpu"
        assert choose("cpu", torch.float32, "torch") == "torch"
    assert choose("cpu", torch.float32) == "torch"
    monkeypatch.setenv("AUM_SCAN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense' .AUM_SCAN_BACKEND."):
        choose("cpu", torch.float32)


def test_the_published_kernels_are_called_as_they_want_to_be(monkeypatch):
    """A stand-in with their interface, computed by the reference: order of arguments, layouts, flips, gradients."""

    class StandIn:
        @staticmethod
        def _y(u, delta, A, B, C, D, z, bias, softplus):
            return aum.selective_scan_fn(
                u, delta, A, B, C, D, z, bias, softplus, return_last_state=True, backend="torch"
            )

        @classmethod
        def fwd(cls, u, delta, A, B, C, D, z, bias, softplus):
            assert all(x is None or x.is_contiguous() for x in (u, delta, A, B, C, D, z, bias)) and B.dim() == 4
            y, last = cls._y(u, delta, A, B, C, D, None, bias, softplus)
            states = torch.zeros(*last.shape[:2], 1, 2 * last.shape[2])
            states[:, :, 0, 1::2] = last
            return (y, states) if z is None else (y, states, y * torch.nn.functional.silu(z))

        @classmethod
        def bwd(cls, u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
            assert dout.is_contiguous() and dz is None and not recompute and (out is None) == (z is None)
            inputs = [v if v is None else v.detach().requires_grad_() for v in (u, delta, A, B, C, D, z, bias)]
            with torch.enable_grad():
                y, _ = cls._y(*inputs, softplus)
            given = [v for v in inputs if v is not None]
            grads = dict(zip(map(id, given), torch.autograd.grad(y, given, dout), strict=True))
            du, ddelta, dA, dB, dC, dD, dz, dbias = (grads.get(id(v)) for v in inputs)
            return (du, ddelta, dA, dB, dC, dD, dbias) + (() if z is None else (dz,))

    monkeypatch.setitem(sys.modules, "selective_scan_cuda", StandIn)
    torch.manual_seed(0)
    b, d, l, n = 2, 4, 6, 3
    full = [torch.randn(b, d, l), torch.randn(b, d, l), -torch.rand(d, n), torch.randn(b, 1, n, l)]
    full += [torch.randn(b, 1, n, l), torch.randn(d), torch.randn(b, d, l), torch.randn(d)]
    for optional in (full, [*full[:5], None, None, None]):
        for reverse in (False, True):
            tensors = [x if x is None else x.clone().requires_grad_() for x in optional]
            given = [x for x in tensors if x is not None]
            y, last = cuda_kernels.scan(*tensors, True, reverse)
            expected, expected_last = aum.selective_scan_fn(
                *tensors, delta_softplus=True, return_last_state=True, reverse=reverse, backend="torch"
            )
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(last, expected_last)
            got, wanted = (torch.autograd.grad(v.sin().sum(), given, retain_graph=True) for v in (y, expected))
            for a, e in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, e)
