# Everything a newcomer types. Each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## the main job on the embedded testbed: a table and demo/report.html
	$(BIN)/stayaligned demo --out demo

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -n 2

check: $(STAMP)  ## format, lint, types, import contracts, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 0 tests/docs

bench: $(STAMP)  ## the measured claims of the README
	$(BIN)/python benchmarks/projection.py
	$(BIN)/python benchmarks/safe_lora.py  # writes 6.5 GB of checkpoints to the temporary directory, once
	$(BIN)/python benchmarks/lisa.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/gate_statistics.py
	$(BIN)/python benchmarks/endpoint.py
	$(BIN)/python benchmarks/report.py  # needs chromium

clean:
	rm -rf $(VENV) demo build dist
