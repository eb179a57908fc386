# Everything starts from a fresh clone with Python 3.11, git and make.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PIP_ARGS ?=
PYTEST_ARGS ?=

export HF_HUB_OFFLINE = 1
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION = false

.PHONY: help install install-dev demo test check container bench-setup bench bench-full format clean

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/run.stamp

install: $(VENV)/run.stamp          ## .venv with what runs need
install-dev: $(VENV)/dev.stamp      ## .venv with what tests need

demo: install    ## the main job on the example data, from shards to a picture
	$(BIN)/ldm demo

test: install-dev    ## the whole suite: what this machine can run; prints what it left out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not container" $(PYTEST_ARGS)

check: install-dev   ## lint, format, types, unit tests: under five minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not (e2e or distributed or faults or services or slurm or slow or container)" $(PYTEST_ARGS)

container: install-dev   ## build the image for real and train in it; needs root, buildah and debootstrap
	$(BIN)/python -m pytest -m container $(PYTEST_ARGS)

bench-setup: install-dev   ## what benchmarks need beside the tests
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev,judge]'

bench: bench-setup   ## gated ratios against other programs, in ten minutes of a quiet machine
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench

bench-full: bench-setup   ## every benchmark, in an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench --full

format: install-dev  ## mend lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
