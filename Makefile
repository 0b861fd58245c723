# `make run` and `make test` each install what they need and can be run in any order.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?= digits-40

FAULTS ?= 300
PYTEST := $(BIN)/python -m pytest -n 2
EMULATED := $(BIN)/python -m bench.emulator

.PHONY: run test test-long test-gpu test-emulated test-faults lint docs emulator results findings clean

# Reinstalled when a requirement or a tested version changes.
$(VENV)/installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: $(VENV)/installed
	$(BIN)/remixmatch train $(RUN_ARGS)

# Fault injection depends on timing, so no other tests run at the same time.
test: $(VENV)/installed
	$(MAKE) -j 2 lint emulator
	$(PYTEST) --dist worksteal --ignore tests/faults $(LONG)
	$(MAKE) test-emulated
	$(PYTEST) tests/faults $(LONG)

# Tests that take too long for every change: full-length runs, kills under torchrun, 300 faults.
test-long:
	$(MAKE) test LONG="--long --faults $(FAULTS)"

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

# GPU tests on the emulated device: streams, events, graphs and collectives, but no kernels.
test-emulated: $(VENV)/installed
	$(EMULATED) -m pytest -n 2 --dist worksteal -m "gpu and not hardware" $(LONG)

# Hundreds of kills, full disks and other faults; `make test` injects 44.
test-faults: $(VENV)/installed
	$(PYTEST) tests/faults --faults $(FAULTS)

# Build the emulated device; `make test` does so while it lints.
emulator: $(VENV)/installed
	$(EMULATED) -c pass

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m tests.prose

# Build the pages of docs/ as a site in build/site; warnings are errors. The variable silences a notice of the theme.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# All numbers in the tables on digits: three presets and LabelSpreading, five seeds each.
results: $(VENV)/installed
	$(BIN)/remixmatch bench digits --out bench/results/digits.jsonl
	$(BIN)/remixmatch bench report --results bench/results --readme docs/results.md

# Run all findings one after another and report the failures at the end. Long: many install all of torch.
findings:
	@failed=; for script in findings/*.sh; do echo "== $$script"; bash $$script || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "changed:$$failed" >&2; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info
