# Everything runs in .venv, which the first target that needs it builds from requirements/lock.txt. Bytecode is compiled
# once, here: where Python is told not to write it, every process would compile PyTorch, Ray and Composer again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
DEMO := examples/quickstart

.PHONY: help env demo test lint bench lock schemas

help:
	@echo "make demo     run the whole loop on a real model and real texts (10 minutes on 2 cores)"
	@echo "make test     linters, types and every test"
	@echo "make bench    the benchmarks, quickly"
	@echo "make env      build .venv from the lock file"
	@echo "make lock     resolve requirements/lock.txt anew"

env: $(VENV)/.installed

$(VENV)/.installed: requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("vtmix needs Python 3.11 or 3.12, found %d.%d: name one with make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r requirements/lock.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: env
	$(BIN)/python $(DEMO)/fetch.py
	$(BIN)/vtmix run --config $(DEMO)/mixture.yaml

test: env lint
	$(BIN)/python $(DEMO)/fetch.py
	$(BIN)/pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python $(DEMO)/fetch.py
	$(BIN)/python benchmarks/compile.py --quick

lock: env
	$(BIN)/uv pip compile pyproject.toml --extra train --extra quickstart --extra dev --universal \
		--python-version 3.11 --no-header --no-annotate -o requirements/lock.txt

schemas: env
	$(BIN)/python -m vtmix.schemas schemas
