# make demo, make test: on a fresh machine each sets itself up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Two torch threads that spin would take the core from each other; glibc giving memory back after every batch costs more
# system time than the computation does.
export OMP_WAIT_POLICY ?= PASSIVE
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: bench demo demo-quick test test-slow lint setup

demo: .venv/ready
	$(BIN)/interp-rlhf demo --out runs/demo

demo-quick: .venv/ready
	$(BIN)/interp-rlhf demo --quick --out runs/quick

test: .venv/ready
	$(BIN)/python -m pytest

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Hours: on a machine with nothing else to do.
bench: .venv/ready
	$(BIN)/python benchmarks/run_all.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/ready

# torch by its exact version: that takes the CPU build where one lies ready.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
