"""Which scan is taken, what is said about it, and that a broken or missing tool costs speed and not the run."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import aum
from aum.scan import BACKENDS, backends, choose, cuda_kernels

MIXER = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("aum").setLevel(logging.INFO)
import aum
for _ in range(2):
    y = aum.BiMamba(8)(torch.randn(1, 5, 8))
y.sum().backward()
"""


def start(program, **environment):
    environment = {k: str(v) for k, v in environment.items()}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("AUM_SCAN_BACKEND", "CC")} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program=MIXER, **environment):
    """The lines that a program which must succeed leaves on stderr."""
    process = start(program, **environment)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    return stderr.splitlines()


def test_the_choice_is_said_once(tmp_path):
    lines = run(AUDIO_MAMBA_CACHE=tmp_path)
    assert len(lines) == 2
    assert "compiling the CPU kernels of the selective scan, once" in lines[0] and str(tmp_path) in lines[0]
    assert lines[1] == "INFO selective scan: backend 'cpu' for float32 on cpu"
    assert run(AUDIO_MAMBA_CACHE=tmp_path) == lines[1:], "the second process finds them compiled"


def test_no_compiler(tmp_path):
    (line,) = run(AUDIO_MAMBA_CACHE=tmp_path, PATH=tmp_path)
    assert line.startswith(
        "WARNING selective scan: backend 'torch' for float32 on cpu; not 'cpu': no C compiler on PATH"
    )
    assert "apt install gcc" in line


@pytest.mark.parametrize(
    "cc, said",
    [
        ("nothing-of-this-name", "not on PATH"),
        ("false", "does not work"),
        ('gcc "', "ValueError: No closing quotation"),
    ],
)
def test_a_compiler_that_does_not_work(tmp_path, cc, said):
    (line,) = run(AUDIO_MAMBA_CACHE=tmp_path, CC=cc)
    assert line.startswith("WARNING selective scan: backend 'torch'") and said in line


def test_a_compiler_that_fails_on_the_kernels(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "kernels.c:1: error: no such luck" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    line = run(AUDIO_MAMBA_CACHE=tmp_path / "cache", CC=compiler)[-1]
    assert line.startswith("WARNING selective scan: backend 'torch'") and "error: no such luck" in line


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    lines = run(AUDIO_MAMBA_CACHE=tmp_path / "file")
    assert sum("for this run only" in line and "AUDIO_MAMBA_CACHE" in line for line in lines) == 1
    assert lines[-1] == "INFO selective scan: backend 'cpu' for float32 on cpu"


def test_a_damaged_file_in_the_cache_is_compiled_again(tmp_path):
    run(AUDIO_MAMBA_CACHE=tmp_path)
    (library,) = (tmp_path / "audio_mamba").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    lines = run(AUDIO_MAMBA_CACHE=tmp_path)
    assert any("damaged" in line and str(library) in line for line in lines)
    assert lines[-1] == "INFO selective scan: backend 'cpu' for float32 on cpu"
    assert len(run(AUDIO_MAMBA_CACHE=tmp_path)) == 1, "it is whole again"


@pytest.mark.skipif(not {"avx"} & set(Path("/proc/cpuinfo").read_text().split()), reason="not an x86-64 with AVX")
@pytest.mark.parametrize("flags, lanes", [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_the_code_for_older_processors(tmp_path, flags, lanes):
    program = f"""
    import aum, torch
    from aum.scan import build
    assert build.library().aum_vector_lanes() == {lanes}
    for dtype in (torch.float32, torch.bfloat16):
        assert aum.self_test("cpu", dtype) == "cpu"
    """
    run(program, AUDIO_MAMBA_CACHE=tmp_path, CC=f"cc {flags}")


def test_import_is_light():
    """The backbone needs torch, and not the second and more that torch._dynamo takes to import."""
    run("import sys, aum\nassert 'torch._dynamo' not in sys.modules")


def test_two_processes_that_compile_at_once(tmp_path):
    processes = [start(MIXER, AUDIO_MAMBA_CACHE=tmp_path) for _ in range(2)]
    for process in processes:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0 and "backend 'cpu'" in stderr, stderr
    assert [path.suffix for path in (tmp_path / "audio_mamba").iterdir()] == [".so"]


@pytest.mark.parametrize(
    "module, said",
    [
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", "cannot be loaded: ImportError: undefined symbol"),
        ("raise RuntimeError('no CUDA')", "cannot be loaded: RuntimeError: no CUDA"),
        (
            "import a_module_that_is_gone",
            "cannot be loaded: ModuleNotFoundError: No module named 'a_module_that_is_gone'",
        ),
        ("def fwd(): pass", "has no bwd"),
    ],
)
def test_a_broken_mamba_ssm(tmp_path, module, said):
    (tmp_path / "selective_scan_cuda.py").write_text(module)
    (tmp_path / "causal_conv1d.py").write_text("raise OSError('libcudart.so.11 is missing')")
    program = f"{MIXER}\nimport sys\nprint(aum.scan.BACKENDS['mamba_ssm'].missing(), file=sys.stderr)"
    lines = run(program, PYTHONPATH=tmp_path)
    assert lines[-2] == "INFO selective scan: backend 'cpu' for float32 on cpu" and said in lines[-1]


def test_mamba_ssm_that_is_not_installed():
    assert "requirements-cuda.txt" in BACKENDS["mamba_ssm"].missing() and "mamba_ssm" not in aum.available_backends()


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
    import dataclasses

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
