# Everything runs from .venv; `make venv` is a prerequisite of the rest and does nothing when it is up to date.
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check fix gpu clean

PYTHON ?= python3.12
BIN := .venv/bin
STAMP := .venv/.installed

help:
	@echo "make quickstart   set up .venv, then train a small model end to end (about 7 minutes on 2 cores)"
	@echo "make test         set up .venv, then run the tests"
	@echo "make check        ruff, pyright, import-linter"
	@echo "make fix          format, sort imports, regenerate docs/recipes.md"
	@echo "make gpu          tests and benchmark that need a GPU; says what stays unproven without one"
	@echo "make venv clean   the environment alone; remove it and every cache"

venv: $(STAMP)

# A .venv without a working pip is the rest of an interrupted `make venv`: it is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	    { echo "make: no usable $(PYTHON) (see .python-version): install Python 3.12 with venv, or say make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "Installing the environment into .venv: about 6 GB, a minute or two."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

quickstart: $(STAMP)
	$(BIN)/moetrain quickstart

# One thread a process: the tests start up to four ranks on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/recipe_docs.py

gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)
	$(BIN)/python tools/bench/gpu_step.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
