# The commands of a newcomer and of a contributor. Each sets up .venv first, which costs nothing the second time.
SHELL := /bin/bash
BIN := .venv/bin
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 8 ? 8 : n )))
# The order of files is tests/conftest.py's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q
export PYTHON
# Every process would compile all that it imports anew: half of each start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev stack demo test test-fast soak lint audit format lock clean clean-runs

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on to demo, test, test-fast and soak, for example: make test ARGS="-k gate"'

setup: ## make .venv from requirements.lock
	@infra/setup.sh

setup-dev:
	@infra/setup.sh --dev

stack: setup ## PostgreSQL, Prefect, MLflow and workers of docker-compose.yml as processes of this machine
	@$(BIN)/python infra/stack.py $(ARGS)

demo: setup ## train, evaluate and tabulate the demo grid; goes on where it stopped
	@$(BIN)/sparseforge demo $(ARGS)

test: setup-dev ## every test
	@$(PYTEST) --durations=15 --durations-min=5 $(ARGS)

test-fast: setup-dev ## the tests that take less than five seconds each
	@$(PYTEST) -m "not slow" $(ARGS)

soak: setup-dev ## the long fault test: a thousand kills, damaged files, dead servers; a quarter of an hour
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(ARGS)

lint: setup-dev ## ruff and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: setup-dev ## are the locks exact and complete; then known advisories (needs a network)
	@infra/audit.sh

format: setup-dev ## let ruff put the sources in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## resolve pyproject.toml again; UPGRADE=1 for newer versions
	@infra/lock.sh

clean: ## remove caches and build products; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . \( -name .venv -o -name .git -o -name runs \) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-runs: ## remove runs/: results, checkpoints, tables (needs CONFIRM=1)
	@if [ "$(CONFIRM)" = 1 ]; then rm -rf runs; \
	else echo 'This removes every result and checkpoint under runs/. If that is meant: make clean-runs CONFIRM=1'; exit 1; fi
