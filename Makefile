# make demo      train and test both stages on synthetic data (recipes/demo.sh), about 3 minutes on 2 cores
# make test      run the whole test suite, as CI does
# make drill     inject at least 200 faults (kills, full disks, damaged files) and 2,000 values of a wrong type into files,
#                and check that nothing is lost and every refusal is clear
# make gpu       run the tests and benchmarks that need an NVIDIA GPU, into gpu_out/; QUICK=1: in 6 minutes
# make lint      run ruff
# make pictures  draw the pictures of README.md and docs/ from the demo and the notebook
# make browser   install headless Chromium, and clang and lld for --format page, by apt, as root, where they are missing; without
#                them the tests of pages are skipped
# make mcu       run exported C on an emulated Cortex-M7: flash, RAM, instructions (benchmarks/mcu.py); make mcu-tools installs
#                the compilers and QEMU by apt, as root, where they are missing; without them its tests are skipped
# Each target makes .venv and installs the pinned requirements first, once.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo_runs

.PHONY: demo test drill gpu lint pictures browser mcu mcu-tools clean

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: $(VENV)/.run
	PATH="$(BIN):$$PATH" bash recipes/demo.sh $(DEMO)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

drill: $(VENV)/.run
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults.typed

pictures: $(VENV)/.test
	$(BIN)/python docs/pictures.py $(DEMO)

INSTALL = apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends

browser:
	command -v clang && command -v wasm-ld || { $(INSTALL) clang lld libclang-rt-dev; }
	for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do \
		if command -v $$name; then exit; fi; done; $(INSTALL) chromium-headless-shell

mcu-tools:
	test -f "$$(arm-none-eabi-gcc -print-file-name=libm.a)" && command -v riscv64-unknown-elf-gcc && command -v qemu-system-arm \
		|| { $(INSTALL) gcc-arm-none-eabi libnewlib-arm-none-eabi gcc-riscv64-unknown-elf qemu-system-arm; }

mcu: $(VENV)/.run mcu-tools
	$(BIN)/python benchmarks/mcu.py

gpu: $(VENV)/.test
	$(BIN)/python benchmarks/gpu.py $(if $(QUICK),--quick)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
