# Everything runs from .venv, which the first target that needs it creates and fills.
#
#   PYTHON=python3.12   the interpreter that creates .venv (3.11 or newer)
#   NAME=digits SEED=1  the folder under outputs/ and the seed of `make demo`

PYTHON ?= python3
NAME   ?= digits
SEED   ?= 1

VENV       := .venv
BIN        := $(VENV)/bin
INSTALLED  := $(VENV)/.installed
RUN        := outputs/$(NAME)
NEW_ENOUGH := sys.exit(sys.version_info < (3, 11))
PYTEST     := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help install check test test-slow demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv with the pinned versions of constraints.txt

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(INSTALLED)  ## the tests, about ten minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## the tests that take longer
	$(PYTEST) --no-loadscope-reorder -m slow

demo: $(RUN)/rl/metrics.json  ## train the three stages on real images on a CPU, show the result
	$(BIN)/kimivl report $(RUN)

clean:  ## remove .venv and the caches; keep outputs/
	rm -rf $(VENV) build dist kimivl.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo's stages. A stage that has finished is not trained again (remove $(RUN)/STAGE for that),
# and one that was interrupted goes on from its last checkpoint.

$(RUN)/sft/metrics.json: | $(INSTALLED)
	$(BIN)/python train.py stage=sft seed=$(SEED) name=$(NAME)

$(RUN)/long_cot/metrics.json: | $(RUN)/sft/metrics.json
	$(BIN)/python train.py stage=long_cot seed=$(SEED) name=$(NAME)

$(RUN)/rl/metrics.json: | $(RUN)/long_cot/metrics.json
	$(BIN)/python train.py stage=rl seed=$(SEED) name=$(NAME)

# Made again when the requirements change. The stamp is written last: an interrupted install starts over.

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; $(NEW_ENOUGH)' || { \
	  echo "kimivl needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes, about 2 GB, once."
	@$(BIN)/python -c 'import pip, sys; $(NEW_ENOUGH)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,slurm,sweep,tracking]'
	@touch $@
