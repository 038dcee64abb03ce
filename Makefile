# What a newcomer and CI both call. Everything lives in .venv beside this file.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
STUBS := --python_out=proto --grpc_python_out=proto --pyi_out=proto

.PHONY: help demo install dev test lint format proto proto-check bench clean

help:
	@echo "make demo    an answer from a real model, out of two pools"
	@echo "make test    lint, types, stubs and the whole test suite"
	@echo "make lint    ruff, import-linter, pyright, buf"
	@echo "make format  ruff's formatting, in place"
	@echo "make proto   the stubs in proto/, anew from the .proto files"
	@echo "make bench   a small load on an embedded system"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "kvrelay needs Python 3.11, 3.12 or 3.13; none is on the PATH (PYTHON=... names one)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing kvrelay; the first time this takes a minute or two"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt nvidia-cuda-nvrtc \
		|| echo "no NVRTC for this system: the tests that compile CUDA kernels are skipped"
	@touch $@

install: $(VENV)/installed

dev: $(VENV)/installed-dev

demo: install
	@$(BIN)/kvrelay models pull smollm2 >/dev/null
	@$(BIN)/kvrelay generate --model smollm2 --chat --max-tokens 64 --temperature 0 \
		--prompt "What is the capital of France, and what is it known for?"

test: lint
	$(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/buf lint

format: dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stubs' generator is pinned: later ones want a protobuf newer than the oldest that we support.
proto: dev
	$(BIN)/python -m grpc_tools.protoc -Iproto $(STUBS) proto/kvrelay/v1/*.proto

proto-check: dev
	$(BIN)/python -m pytest tests/proto

bench: install
	$(BIN)/kvrelay bench --requests 16 --concurrency 4 --prompt-tokens 512 --output-tokens 64

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
