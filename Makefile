# Every target installs what it needs. You need Python 3.11 or later, make and a C compiler.
#   make demo    train a small model on the Python standard library and write a report
#   make test    run the tests, except those of more than a minute
#   make test-slow   run those: kills at random moments, dozens of fresh processes, mutation tests
#   make test-clients   test an exported model in the oldest and the newest supported transformers, peft and accelerate
#   make test-slurm   test the launcher on a real Slurm: requeueing, preemption, lost nodes (as root; installs Debian packages)
#   make test-llama-cpp   build llama.cpp (six minutes on two cores) and test an exported model in it
#   make gpu     test and benchmark this machine's GPU in under ten minutes (on a CPU: at toy sizes)
# The first call installs into .venv (a minute or two); later calls start at once.

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
# cuda where nvidia-smi lists a GPU, elsewhere what is installed or cpu. For a login node: make setup TORCH_BUILD=cuda
TORCH_BUILD ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || cat $(TORCH) 2>/dev/null || echo cpu)
# A folder of wheels that `make wheels` filled: nothing is then asked of a package index.
WHEELS ?=
WHEELS_PYTHON ?= 3.12
WHEELS_MACHINE ?= x86_64
DEMO_ARGS ?=
GPU_ARGS ?=
GPU_PYTHON ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
OFFLINE := $(if $(WHEELS),--no-index --find-links $(abspath $(WHEELS)))
INSTALL := $(PIP) install $(OFFLINE) --constraint constraints.txt --constraint constraints-gpu.txt
TORCH := $(VENV)/.torch
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# Tests side by side, and at the end what the suite cost. PYTEST_ARGS="-n 0" runs one at a time, in pytest's own process.
PYTEST = TIMEFORMAT='make: $@ took %1R s, and %1U + %1S s of CPU'; time $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(TEST_WORKERS) --dist loadscope --no-loadscope-reorder
comma := ,
fail = { echo "make: $(1)" >&2; exit 1; }
check_build = [ "$$(cat $(TORCH))" = "$(TORCH_BUILD)" ] \
	  || $(call fail,$(VENV) has the $$(cat $(TORCH)) build of torch$(comma) and this needs the $(TORCH_BUILD) build; remove it and install again: rm -r $(VENV) && make setup TORCH_BUILD=$(TORCH_BUILD))

.PHONY: help setup wheels flash-attn demo test test-slow test-slurm test-clients test-llama-cpp gpu lint types docs clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make setup   install only;  make flash-attn   build flash-attn for this machine's GPU;  make wheels WHEELS=DIR   collect packages for a machine without a network"
	@echo "make lint, make types   run ruff, mypy;  make docs   write the tables of settings;  make clean   remove .venv, build results and runs with their checkpoints"

setup: $(READY)
	@$(check_build)

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

docs: $(READY)
	@$(BIN)/python -m docs.settings

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: its CPU build (a tenth of the size) is taken from the package index pip is configured for
# or else from PyTorch's own; === keeps a CPU build out of a CUDA install. Its dependencies follow with the rest, pinned.
$(TORCH): constraints.txt constraints-gpu.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || $(call fail,$(PYTHON) is missing or older than 3.11$(comma) which constraints.txt is made for; name another one: make setup PYTHON=python3.12)
	@[ -z "$(WHEELS)" ] || [ -d "$(WHEELS)" ] || $(call fail,WHEELS=$(WHEELS) is not a folder; on a machine with a network 'make wheels WHEELS=DIR' fills one)
	@echo "make: installing into $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV) || $(call fail,could not create $(VENV) with '$(PYTHON) -m venv'; on some systems that needs the package python3-venv)
	@case "$$(uname) $(TORCH_BUILD)" in \
	  "Linux cpu") \
	    $(INSTALL) --no-deps "torch==$(TORCH_VERSION)+cpu" 2>$(VENV)/torch.log \
	      || { [ -z "$(WHEELS)" ] && $(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)+cpu"; } \
	      || { cat $(VENV)/torch.log >&2; $(call fail,could not install torch==$(TORCH_VERSION)+cpu$(comma) neither from $(or $(WHEELS),the configured package index) nor from $(TORCH_CPU_INDEX); for the CUDA build: make setup TORCH_BUILD=cuda); };; \
	  *" cuda"|*" cpu") $(INSTALL) --no-deps "torch===$(TORCH_VERSION)" || $(call fail,could not install torch $(TORCH_VERSION); see pip's message above);; \
	  *) $(call fail,TORCH_BUILD=$(TORCH_BUILD) is neither cuda nor cpu);; \
	esac
	@echo "$(TORCH_BUILD)" >$@

$(READY): pyproject.toml $(TORCH)
	@$(INSTALL) --editable ".[dev]" || $(call fail,could not install the dependencies; see pip's message above)
	@if [ "$(TORCH_BUILD)" = cuda ] && nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	    || $(call fail,torch sees no GPU though nvidia-smi lists one: torch $(TORCH_VERSION) is built for CUDA 13.0$(comma) which needs driver 580 or later$(comma) and this is driver $$(nvidia-smi --query-gpu=driver_version --format=csv$(comma)noheader | head -n 1); use the container (docs/first-gpu-run.md)$(comma) or CPU only: make setup TORCH_BUILD=cpu); \
	fi
	@touch $@

# Every pinned wheel but flash-attn's, which exists as source only. No dependency is resolved: the two files name them all.
wheels:
	@[ -n "$(WHEELS)" ] || $(call fail,name a folder: make wheels WHEELS=DIR [WHEELS_PYTHON=3.11] [WHEELS_MACHINE=aarch64])
	@echo "make: collecting wheels for Linux on $(WHEELS_MACHINE)$(comma) Python $(WHEELS_PYTHON)$(comma) in $(WHEELS) (about 3 GB)"
	@mkdir -p $(WHEELS)
	@sed 's/^torch==/torch===/; /^flash-attn==/d' constraints.txt constraints-gpu.txt >$(WHEELS)/requirements.txt
	@$(PYTHON) -m pip --quiet --disable-pip-version-check --no-input download --no-deps --only-binary=:all: --implementation cp \
	  --python-version $(WHEELS_PYTHON) $(foreach glibc,$(shell seq 5 28),--platform manylinux_2_$(glibc)_$(WHEELS_MACHINE)) \
	  $(foreach old,1 2010 2014,--platform manylinux$(old)_$(WHEELS_MACHINE)) --platform linux_$(WHEELS_MACHINE) \
	  --dest $(WHEELS) --requirement $(WHEELS)/requirements.txt || $(call fail,could not collect the wheels; see pip's message above)

# FLASH_ATTN_CUDA_ARCHS: 80 for A100, 90 for H100 and H200, 100 for B200; those of this machine's GPU if left out.
flash-attn: $(TORCH)
	@[ "$(TORCH_BUILD)" = cuda ] || $(call fail,flash-attn wants the CUDA build of torch; on a machine without a GPU say so: make flash-attn TORCH_BUILD=cuda)
	@$(check_build)
	@PATH="$${CUDA_HOME:-/usr/local/cuda}/bin:$$PATH" nvcc --version 2>/dev/null | grep -q 'release 13\.' \
	  || $(call fail,nvcc of CUDA 13 is needed to build flash-attn; load a module or set CUDA_HOME. Without flash-attn the attention kernels of torch are used)
	@major=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed 's/\..*//;q' || true); \
	archs=$${FLASH_ATTN_CUDA_ARCHS:-$${major:+$${major}0}}; \
	[ -n "$$archs" ] || $(call fail,no GPU here: say which one flash-attn is built for$(comma) as FLASH_ATTN_CUDA_ARCHS=90 make flash-attn for an H100); \
	echo "make: building flash-attn for sm_$$archs (once; half an hour on eight cores)"; \
	$(INSTALL) "torch===$(TORCH_VERSION)" einops ninja packaging psutil setuptools wheel && \
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=$$archs PATH="$(abspath $(BIN)):$${CUDA_HOME:-/usr/local/cuda}/bin:$$PATH" \
	  $(INSTALL) --no-build-isolation flash-attn || $(call fail,could not build flash-attn; see pip's message above)

# Programs of others, each in a folder of its own in front of what $(VENV) has.
$(CLIENTS)/transformers-%/.ready: tests/clients/transformers-%.txt | $(READY)
	@echo "make: installing into $(@D) (once)"
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) --requirement $< || $(call fail,could not install $<; see pip's message above)
	@touch $@

$(CLIENTS)/llama-cpp/.ready: tests/clients/llama-cpp.txt | $(READY)
	@echo "make: building llama.cpp into $(@D) (once; six minutes on two cores)"
	@rm -rf $(@D)
	@$(PIP) download --no-deps --no-binary llama_cpp_python --dest $(@D)/source --requirement $< \
	  || $(call fail,could not download $<; see pip's message above)
	@CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) install --no-deps --target $(@D) $(@D)/source/* \
	  || $(call fail,could not build llama.cpp; see pip's message above)
	@tar --extract --gzip --file $(@D)/source/llama_cpp_python-*.tar.gz --directory $(@D)/source
	@mkdir $(@D)/llama.cpp
	@mv $(@D)/source/*/vendor/llama.cpp/{convert_hf_to_gguf.py,conversion,gguf-py} $(@D)/llama.cpp
	@rm -rf $(@D)/source
	@touch $@
