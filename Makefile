# `make` lists the targets. The first two need nothing prepared but Python 3.11
# or newer: each makes the virtual environment when there is none.

VENV ?= .venv
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))
# The first Python that runs and is new enough; constraints.txt is for 3.11.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
  "$$python" -c '$(IS_NEW)' 2>/dev/null && command -v "$$python" && break; \
  done)
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

NO_PYTHON = error: no Python 3.11 or newer on PATH; name one: make \
  PYTHON=/path/to/python3.11
OLD_PYTHON = error: $(PYTHON) is older than Python 3.11 or does not run; name \
  another: make PYTHON=/path/to/python3.11
NO_VENV = error: $(PYTHON) cannot make virtual environments; on Debian or \
  Ubuntu: apt-get install python3-venv

.DEFAULT_GOAL := help
.PHONY: help quickstart test venv lint format constraints clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))

quickstart: venv  ## Train the four stages on emoji and draw (15 minutes)
	$(BIN)/python launch/quickstart.py --out runs/quickstart

test: venv  ## Run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

venv: $(INSTALLED)  ## Make or update .venv (about 1.3 GB)

# Runs again only when what is to be installed has changed.
$(INSTALLED): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IS_NEW)' 2>/dev/null || \
	  { echo "$(OLD_PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(NO_VENV)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check \
	  -c constraints.txt -e '.[dev]'
	@touch $@

lint: venv  ## Check form and style, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: venv  ## Put all files into the one form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Takes the newest versions that setup.py allows, in an empty environment.
constraints:  ## Resolve all versions anew into constraints.txt
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	  "$(PYTHON)" -m venv "$$fresh"; \
	  "$$fresh/bin/python" -m pip install -e '.[dev]'; \
	  "$$fresh/bin/python" -m pip check; \
	  { sed -n '/^#/p' constraints.txt; \
	    "$$fresh/bin/python" -m pip freeze --exclude-editable; } \
	  > "$$fresh/constraints.txt"; \
	  cp "$$fresh/constraints.txt" constraints.txt

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
