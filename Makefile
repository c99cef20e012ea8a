# Needs only make and Python 3.11 or newer, and uses uv where it is installed.
#
#   make train                 the environment, the install, and a small model on 8 simulated devices
#   make train ARGS="--train.steps=50 --run=runs/short"
#   make test                  the default test suite; TESTS=tests/data runs a part of it
#   make PYTHON=python3.12 VENV=.venv-3.12 test
#   make VENV=.venv-tpu test-tpu   compiles for TPU without one; on its own, as with libtpu jax looks for TPUs at each start

VENV ?= .venv
PYTHON ?=
ARGS ?=
TESTS ?= tests
JOBS ?= 2

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-every test-tpu lint types coverage parity kills hostile flips chaos benchmarks clean

help:
	@sed -n 's/^#  *make /  make /p' Makefile
	@echo "  make test-slow | test-every | test-tpu | lint | types | coverage | parity | kills | hostile | flips | chaos | benchmarks | clean"

train: $(VENV)/.has-core
	$(BIN)/python -m jaxlm.train --mesh=dp4,tp2 $(ARGS)

test: $(VENV)/.has-test
	$(PYTEST) -m "not slow and not every" $(TESTS) $(ARGS)

test-slow: $(VENV)/.has-test
	$(PYTEST) -m slow $(TESTS) $(ARGS)

test-every: $(VENV)/.has-test  # an hour
	$(PYTEST) -m every $(TESTS) $(ARGS)

test-tpu: $(VENV)/.has-tpu
	$(PYTEST) -m slow -k tpu $(TESTS) $(ARGS)

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.has-dev
	$(BIN)/mypy

coverage: $(VENV)/.has-test
	$(PYTEST) -m "not slow and not every" --cov --cov-report=term --cov-report=html $(TESTS) $(ARGS)

parity: $(VENV)/.has-test  # an hour or two; goes on where it was stopped
	$(BIN)/python -m tests.train.matrix --out=benchmarks/results/parity.json --page=docs/parity.md --jobs=$(JOBS) $(ARGS)

kills: $(VENV)/.has-test  # about half an hour
	$(BIN)/python -m tests.train.kills --out=benchmarks/results/kills.json --jobs=$(JOBS) $(ARGS)

hostile: $(VENV)/.has-test
	$(BIN)/python -m tests.hostile --out=benchmarks/results/hostile.json $(ARGS)

flips: $(VENV)/.has-test  # about ten minutes
	$(BIN)/python -m tests.train.flips --out=benchmarks/results/flips.json --page $(ARGS)

chaos: $(VENV)/.has-test  # about an hour
	$(BIN)/python benchmarks/chaos.py --out=benchmarks/results/chaos.json $(ARGS)

benchmarks: $(VENV)/.has-test  # all but the half-hour soak, which is `make chaos`
	@for file in $(filter-out benchmarks/chaos.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || [ $$? = 2 ] || exit 1; done  # 2: this machine lacks what it needs

clean:  # leaves runs/ alone
	rm -rf .venv .venv-* build *.egg-info htmlcov .coverage* .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find jaxlm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An environment is made with the first Python that is new enough, or with PYTHON where that is given.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python -V)"; \
	    if command -v uv >/dev/null; then exec uv venv --quiet --clear --python "$$(command -v $$python)" $(VENV); fi; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: jaxlm needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not; use make PYTHON=python3.12" >&2; \
	exit 1

# What is installed is recorded in a file, so that a second make does nothing until pyproject.toml changes.
EXTRA_core :=
EXTRA_test := [test]
EXTRA_dev := [dev]
EXTRA_tpu := [test,tpu-compile]
$(VENV)/.has-%: pyproject.toml | $(BIN)/python
	@echo "Installing jaxlm$(EXTRA_$*) into $(VENV) (a minute or two the first time)"
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -e '.$(EXTRA_$*)'; \
	else \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check -e '.$(EXTRA_$*)'; \
	fi
	@touch $@
