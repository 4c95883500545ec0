# The main jobs, each from a fresh clone: make train, make test. Python 3.11 (PYTHON=... for another one).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

ENV ?= HalfCheetahBulletEnv-v0
STEPS ?= 1000000
SEED ?= 0
ARGS ?=

export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test lint setup clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

train: $(READY) ## PPO on HalfCheetahBulletEnv-v0 (STEPS=20000 for a short look, ENV=..., SEED=..., ARGS="--algo.lr 1e-3")
	$(BIN)/fnrl train --env $(ENV) --steps $(STEPS) --seed $(SEED) $(ARGS)

test: $(READY) ## all tests
	$(BIN)/python -m pytest -n 2

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

setup: $(READY) ## the virtual environment alone

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"Python 3.11 is needed, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	touch $(READY)

clean: ## removes the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
