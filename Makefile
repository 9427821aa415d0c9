# Every target does its own set-up: a Python 3.11 or later, make and a compiler are enough.
#   make demo    train a small model on the Python standard library and report
#   make test    the test suite, without tests of more than a minute
#   make test-slow   those: fresh processes by the dozen, kills at random moments
# The first call installs into .venv (a minute or two); later ones find it ready.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=
PYTEST_ARGS ?=

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
INSTALL := $(PIP) install --constraint constraints.txt
comma := ,
fail = { echo "make: $(1)" >&2; exit 1; }

.PHONY: help setup demo test test-slow lint types clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make setup   only install;  make lint, make types   ruff, mypy;  make clean   remove what is built"

setup: $(READY)

demo: $(READY)
	@$(BIN)/llada demo $(DEMO_ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(READY)
	@$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: on a machine without a GPU it is the CPU build (a tenth of the size), taken from the
# package index pip is configured for or else from PyTorch's own. Its dependencies follow with the rest, pinned.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || $(call fail,$(PYTHON) is missing or older than 3.11$(comma) which constraints.txt is made for; name another one: make setup PYTHON=python3.12)
	@echo "make: installing into $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV) || $(call fail,could not create $(VENV) with '$(PYTHON) -m venv'; on some systems that needs the package python3-venv)
	@version=$$(sed -n 's/^torch==//p' constraints.txt); \
	if nvidia-smi -L 2>/dev/null | grep -q GPU || [ "$$(uname)" != Linux ]; then \
	  $(INSTALL) --no-deps "torch==$$version" || $(call fail,could not install torch==$$version); \
	else \
	  $(INSTALL) --no-deps "torch==$$version+cpu" 2>$(VENV)/torch.log \
	    || $(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$$version+cpu" \
	    || { cat $(VENV)/torch.log >&2; $(call fail,could not install torch==$$version+cpu$(comma) neither from the configured package index nor from $(TORCH_CPU_INDEX)); }; \
	fi
	@$(INSTALL) --editable ".[dev]" || $(call fail,could not install the dependencies; pip's message stands above)
	@touch $@
