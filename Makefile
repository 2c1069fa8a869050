# make demo   both stages and the evaluation on synthetic data, about 3 minutes on 2 cores
# make test   the whole test suite, as CI runs it
# make drill  kills, full disks, damaged files: is anything lost? about 5 minutes
# make gpu    all that needs an NVIDIA GPU: its tests, and the benchmarks that no machine here could run
# make lint   ruff
# make pictures  those of README.md and docs/, from the demo and the notebook
# make browser  headless Chromium by apt, as root, where there is none: the tests of the report's page skip without one
# Each makes .venv and installs the pinned requirements first, once.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo_runs

.PHONY: demo test drill gpu lint pictures browser clean

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: $(VENV)/.run
	PATH="$(BIN):$$PATH" bash demo.sh $(DEMO)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

drill: $(VENV)/.run
	$(BIN)/python -m drills

pictures: $(VENV)/.test
	$(BIN)/python docs/pictures.py $(DEMO)

browser:
	for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do \
		if command -v $$name; then exit; fi; done; \
	apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium-headless-shell

gpu: $(VENV)/.test
	bash benchmarks/gpu.sh

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
