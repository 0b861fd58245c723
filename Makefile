# `make run` and `make test` each set up what they need; neither needs the other.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?= digits-40

FAULTS ?= 300
PYTEST := $(BIN)/python -m pytest -n 2
EMULATED := $(BIN)/python -m bench.emulator

.PHONY: run test test-long test-gpu test-emulated test-faults lint docs emulator results clean

# rebuilt when a requirement or a tested version changes
$(VENV)/installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: $(VENV)/installed
	$(BIN)/remixmatch train $(RUN_ARGS)

# faults are injected by the clock, so nothing else is tested beside them
test: $(VENV)/installed
	$(MAKE) -j 2 lint emulator
	$(PYTEST) --dist worksteal --ignore tests/faults $(LONG)
	$(MAKE) test-emulated
	$(PYTEST) tests/faults $(LONG)

# what takes too long for every change: runs of full length, kills under torchrun, 300 faults
test-long:
	$(MAKE) test LONG="--long --faults $(FAULTS)"

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

# what a host does with a device, without one: streams, events, graphs, collectives; no kernels
test-emulated: $(VENV)/installed
	$(EMULATED) -m pytest -n 2 --dist worksteal -m "gpu and not hardware" $(LONG)

# hundreds of kills, full disks and so on, of which `make test` has some dozen
test-faults: $(VENV)/installed
	$(PYTEST) tests/faults --faults $(FAULTS)

# builds the emulated device while something else runs
emulator: $(VENV)/installed
	$(EMULATED) -c pass

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages of docs/ as a site in build/site; a warning is an error. The variable silences a notice of the theme's
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# every figure of the tables of digits: three presets and LabelSpreading, five seeds each
results: $(VENV)/installed
	$(BIN)/remixmatch bench digits --out bench/results/digits.jsonl
	$(BIN)/remixmatch bench report --results bench/results --readme docs/results.md

clean:
	rm -rf $(VENV) build *.egg-info
