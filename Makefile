# `make quickstart` and `make test` need Python 3.11+, a C++ compiler and a PyPI mirror; they install everything else into .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.rayft-installed
EXTRAS := dev,deepspeed,tune,serve,federate,eval

# One thread per process: tests and workers share few cores, and results do not depend on the machine.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
# One process runs all tests with Ray, the other one the rest (tests/conftest.py).
IN_TWO := --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help venv quickstart lint test test-fast test-slow test-gpu demo-kill demo-live bench clean

help:
	@echo "make quickstart  train and score a tool-calling adapter on the demo model (under 10 minutes on 2 cores)"
	@echo "make test        lint, types, import contracts and every test that is not slow (about 34 minutes on 2 cores)"
	@echo "make test-fast   without Ray and without the demo model (under 3 minutes)"
	@echo "make test-slow   the full sizes; records the outcome in tests/slow.json"
	@echo "make demo-kill   kill -9 a worker and the driver of a run, and compare its curve with an undisturbed one"
	@echo "make demo-live   a finished run goes live on a server under load: canary, promotion, rollback"
	@echo "make bench       speed and memory claims as JSON lines (ARGS=--quick for under 5 minutes)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rayft needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/rayft train examples/recipes/quickstart.yaml --overwrite
	$(BIN)/rayft evaluate run:quickstart

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) $(IN_TWO) -m "not slow and not gpu" --slow-ledger=check $(ARGS)

test-fast: $(STAMP)
	$(PYTEST) $(IN_TWO) -m "not slow and not gpu and not ray and not smollm2 and not long" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu" --timeout=3600 --slow-ledger=record $(ARGS)

test-gpu: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu --timeout=1800 $(ARGS)

demo-kill: $(STAMP)
	$(BIN)/python examples/demo_kill.py $(ARGS)

demo-live: $(STAMP)
	$(BIN)/python examples/demo_live.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/train.py $(ARGS)
	$(BIN)/python benchmarks/tune.py $(ARGS)
	$(BIN)/python benchmarks/serve.py $(ARGS)
	$(BIN)/python benchmarks/federate.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
