# make demo, make test: on a fresh machine each sets itself up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
SLOW := $(BIN)/python -m pytest -m slow
# Two torch threads that spin would take the core from each other; glibc giving memory back after every batch costs more
# system time than the computation does.
export OMP_WAIT_POLICY ?= PASSIVE
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: bench bench-locate demo demo-quick test test-slow test-engines test-recipes test-compiled test-real-model test-interop test-benchmarks test-evidence lint setup

demo: .venv/ready
	$(BIN)/interp-rlhf demo --out runs/demo

demo-quick: .venv/ready
	$(BIN)/interp-rlhf demo --quick --out runs/quick

test: .venv/ready
	$(BIN)/python -m pytest

# The slow tests in groups. CI runs each group once; test-evidence takes longer and is run by hand before a release.
test-slow: test-engines test-recipes test-compiled test-real-model test-interop test-benchmarks

# Every engine and every term on two processes, against one.
test-engines: export OMP_NUM_THREADS = 1
test-engines: .venv/engines
	timeout 900 $(SLOW) tests/test_engines.py
	timeout 600 $(SLOW) tests/test_ppo.py tests/test_terms.py

# Recipes on two processes.
test-recipes: export OMP_NUM_THREADS = 1
test-recipes: .venv/engines
	timeout 600 $(SLOW) tests/test_recipes.py

# A model that inductor compiles; needs g++.
test-compiled: .venv/ready
	timeout 600 $(SLOW) tests/test_rewards.py

# The embedded model on public data, and the shipped card.
test-real-model: .venv/ready
	timeout 900 $(SLOW) tests/test_real_model.py

# Files of the real sae-lens and sparsify, in a separate environment.
test-interop: .venv/interop/ready
	timeout 600 .venv/interop/bin/python -m pytest -m slow tests/test_sae_interop.py

# Every benchmark with no argument but --quick.
test-benchmarks: .venv/ready
	timeout 900 $(SLOW) tests/test_benchmarks.py

# How often evidence is right, over 40 seeds. It takes longer than the others.
test-evidence: .venv/ready
	$(SLOW) tests/test_evidence.py tests/test_causal.py

# Hours: on a machine with nothing else to do.
bench: .venv/ready
	$(BIN)/python benchmarks/run_all.py

# Attribution patching against TransformerLens', in a separate environment.
bench-locate: export OMP_NUM_THREADS = 1
bench-locate: .venv/peers/ready
	.venv/peers/bin/python benchmarks/run_all.py --only locate-peer

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/ready

# torch by its exact version: pip then takes the CPU build if one is installed or cached.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/engines: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	touch $@

.venv/peers/ready: .venv/ready
	test -x .venv/peers/bin/python || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet torch==2.13.0
	.venv/peers/bin/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv/interop/ready: .venv/ready
	test -x .venv/interop/bin/python || $(PYTHON) -m venv .venv/interop
	.venv/interop/bin/python -m pip install --quiet torch==2.13.0
	.venv/interop/bin/python -m pip install --quiet --constraint constraints.txt '.[interop]'
	touch $@
