#!/usr/bin/env bash
# Run what needs an NVIDIA GPU: the tests that are skipped or interpreted without one, then the benchmarks. Append their
# tables to RESULTS.md. mamba-ssm's rows need: pip install --no-build-isolation --no-deps -r requirements-cuda.txt
#     make gpu      or, in an environment of its own: PYTHON=python3 bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c "import torch, sys; sys.exit(None if torch.cuda.is_available() else 'torch sees no GPU: python -m dcase.doctor')"
"$python" -m dcase.doctor || true
"$python" -m pytest -q tests/test_triton_kernels.py tests/test_scan.py tests/test_scan_backends.py tests/test_augment.py \
    tests/test_gpu.py
"$python" benchmarks/scan.py --device cuda --compile --append
