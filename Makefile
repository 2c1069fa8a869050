# make demo   both stages and the evaluation on synthetic data, about 3 minutes on 2 cores
# make test   the whole test suite, as CI runs it
# make drill  kills, full disks, damaged files: is anything lost? about 5 minutes
# make lint   ruff
# Each makes .venv and installs the pinned requirements first, once.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo_runs

.PHONY: demo test drill lint clean

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

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
