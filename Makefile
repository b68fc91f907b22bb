# The two that do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint verify format lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: ## the virtual environment, from the locks
	@$(PYTHON) tools/install.py $(VENV)

test: install ## all tests
	$(BIN)/pytest

lint: install ## ruff, mypy strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: install ## write the locks anew from pyproject.toml
	tools/lock.sh $(BIN)/uv

clean: ## the virtual environment and the demo's state
	rm -rf $(VENV) .demo
