# Everything the project does, by name. `make` alone lists it.
#
# The recipes end with `exec`, so that the server (or the tests) is the very process that make waits for: SIGTERM to
# either ends both.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help serve setup doctor test soak lint format bench boots lock image-check clean

MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python
AS_ROOT := scripts/as-root.sh
BOOTSTRAP := scripts/bootstrap.sh
# Two at once are what two cores can do; tests/conftest.py says which never run beside each other.
AT_ONCE := -n 2 --no-loadscope-reorder

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

serve: ## install what is missing, then serve on http://localhost:3000
	@$(BOOTSTRAP) && exec $(AS_ROOT) .venv/bin/rds serve --setup --earlier 2

setup: ## install what the server needs
	@$(BOOTSTRAP) && exec $(AS_ROOT) .venv/bin/rds setup --earlier 2

doctor: ## say what this host has and lacks
	@$(BOOTSTRAP) && exec $(AS_ROOT) .venv/bin/rds doctor

test: ## install what is missing, then run all tests
	@$(BOOTSTRAP) dev && $(AS_ROOT) .venv/bin/rds setup --earlier 2 && \
	$(AS_ROOT) scripts/test-packages.sh && exec $(AS_ROOT) $(PYTHON) -m pytest $(AT_ONCE)

lint: ## check style and types
	@$(BOOTSTRAP) dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: ## put the code into its one format
	@$(BOOTSTRAP) dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: ## measure what is promised, beside the bare runtime: docs/benchmark.svg (BENCH=--full for all)
	@$(BOOTSTRAP) dev && $(AS_ROOT) .venv/bin/rds setup --earlier 2 && exec $(AS_ROOT) $(PYTHON) tests/bench $(BENCH)

boots: ## boot virtual machines in a row, each from its kernel (BOOTS=100)
	@$(BOOTSTRAP) dev && $(AS_ROOT) .venv/bin/rds setup --earlier 2 && exec $(AS_ROOT) $(PYTHON) tests/bench/boots.py $(BOOTS)

soak: ## work and kill at random for SOAK_SECONDS (900), then look for what is lost or left
	@$(BOOTSTRAP) dev && $(AS_ROOT) .venv/bin/rds setup --earlier 2 && exec $(AS_ROOT) $(PYTHON) tests/soak/soak.py

# Resolves the direct dependencies of pyproject.toml, and the guest's runtimes, for every supported Python and
# architecture, and writes exact versions with the hashes of all their files. No download address is recorded: pip takes
# the files from wherever it is configured to. Run it to take newer versions; what is pinned stays unless LOCK_FLAGS
# has --upgrade.
GUEST := src/rundatsheesh/manager/build/guest-requirements
LOCK := .venv/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command 'make lock' $(LOCK_FLAGS)

lock: ## pin all dependencies anew, with hashes
	@$(BOOTSTRAP)
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(LOCK) pyproject.toml --extra dev --output-file requirements-dev.txt
	$(LOCK) pyproject.toml --constraints requirements-dev.txt --output-file requirements.txt
	$(LOCK) $(GUEST).in --no-deps --output-file $(GUEST).txt

image-check: ## build the guest image a second time and compare the two
	@$(BOOTSTRAP) && $(AS_ROOT) .venv/bin/rds setup --earlier 2 && exec $(AS_ROOT) .venv/bin/rds image reproduce

clean: ## delete the virtual environment and the caches in this directory
	@$(AS_ROOT) rm -rf .venv .bootstrap.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	@$(AS_ROOT) find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
