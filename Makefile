# Every target does its own set-up: a Python 3.11 or later, make and a compiler are enough.
#   make demo    train a small model on the Python standard library and report
#   make test    the test suite, without tests of more than a minute
#   make test-slow   those: fresh processes by the dozen, kills at random moments
#   make test-clients   exports in the hands of the oldest and the newest transformers, peft, accelerate
#   make test-slurm   the launcher on a real Slurm: requeue, preemption, lost nodes (root; Debian's packages)
#   make test-llama-cpp   an export in llama.cpp, which is built first (six minutes on two cores)
#   make gpu     what this machine's GPU proves in under ten minutes: tests, speed, a table (on the CPU: toy sizes)
# The first call installs into .venv (a minute or two); later ones find it ready.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
CLIENTS := build/clients
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=
GPU_ARGS ?=
GPU_PYTHON ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
INSTALL := $(PIP) install --constraint constraints.txt
# Tests side by side, and at the end what the suite cost. PYTEST_ARGS="-n 0" runs one at a time, in pytest's own process.
PYTEST = TIMEFORMAT='make: $@ took %1R s, and %1U + %1S s of CPU'; time $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder
comma := ,
fail = { echo "make: $(1)" >&2; exit 1; }

.PHONY: help setup demo test test-slow test-slurm test-clients test-llama-cpp gpu lint types clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make setup   only install;  make lint, make types   ruff, mypy;  make clean   remove what is built"

setup: $(READY)

demo: $(READY)
	@$(BIN)/llada demo $(DEMO_ARGS)

test: $(READY)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not clients and not llama_cpp and not slurm" $(PYTEST_ARGS)

test-slow: $(READY)
	@$(PYTEST) $(SIDE_BY_SIDE) -m slow $(PYTEST_ARGS)

test-slurm: $(READY)
	@tests/slurm/install
	@$(PYTEST) -m slurm tests/slurm $(PYTEST_ARGS)

test-clients: $(CLIENTS)/transformers-4.46/.ready $(CLIENTS)/transformers-5/.ready
	@$(PYTEST) -m clients tests/clients $(PYTEST_ARGS)

test-llama-cpp: $(CLIENTS)/llama-cpp/.ready
	@$(PYTEST) -m llama_cpp tests/clients $(PYTEST_ARGS)

# Where the project's needs are installed in another Python, as on a machine without a network: make gpu GPU_PYTHON=python3
gpu: $(if $(GPU_PYTHON),,$(READY))
	@$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py $(GPU_ARGS)

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

# Programs of others, each in a folder of its own in front of what $(VENV) has.
$(CLIENTS)/transformers-%/.ready: tests/clients/transformers-%.txt | $(READY)
	@echo "make: installing into $(@D) (once)"
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) --requirement $< || $(call fail,could not install $<; pip's message stands above)
	@touch $@

$(CLIENTS)/llama-cpp/.ready: tests/clients/llama-cpp.txt | $(READY)
	@echo "make: building llama.cpp into $(@D) (once; six minutes on two cores)"
	@rm -rf $(@D)
	@$(PIP) download --no-deps --no-binary llama_cpp_python --dest $(@D)/source --requirement $< \
	  || $(call fail,could not download $<; pip's message stands above)
	@CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) install --no-deps --target $(@D) $(@D)/source/* \
	  || $(call fail,could not build llama.cpp; pip's message stands above)
	@tar --extract --gzip --file $(@D)/source/llama_cpp_python-*.tar.gz --directory $(@D)/source
	@mkdir $(@D)/llama.cpp
	@mv $(@D)/source/*/vendor/llama.cpp/{convert_hf_to_gguf.py,conversion,gguf-py} $(@D)/llama.cpp
	@rm -rf $(@D)/source
	@touch $@
