# The commands of this repository:
#
#   make demo            attention on this machine: checked against float64, timed against PyTorch
#   make test            the tests; those that need a Hopper GPU skip, with the reason, where there is none
#   make lint            what the style checks say; `make format` repairs what can be repaired
#   make venv            only the environment that the others run in
#   make build-in-place  the runtime library inside the source tree, for PYTHONPATH=hopper
#   make clean           remove what was built (the environment stays)
#
# They run in $(VENV), which is made at first use, with the package installed as `pip install .` does.
# With USE_SYSTEM_PYTHON=1 nothing is installed: they run the source tree with $(PYTHON) and what it has
# (torch, apache-tvm-ffi, nvidia-cutlass, setuptools, pytest, ...).

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
USE_SYSTEM_PYTHON ?=
PYTEST_ARGS ?=
# Processes that share the tests (pytest-xdist; without it there is one). Some tests fill a GPU's memory.
TEST_JOBS ?= $(if $(wildcard /dev/nvidia0),1,2)

# Here kernels are compiled when they are first used. `make venv FLASH_ATTN_3_KERNELS=core` compiles the common
# set at installation instead, as a plain `pip install .` does.
FLASH_ATTN_3_KERNELS ?= none
export FLASH_ATTN_3_KERNELS

# Where the package finds no CUDA compiler, it is installed from PyPI. (Expanded when .package is made.)
FIND_COMPILER := from flash_attn_3.toolchain import find_compiler; find_compiler()
EXTRAS = $(shell PYTHONPATH=hopper $(VENV)/bin/python -c '$(FIND_COMPILER)' 2>/dev/null || echo '[compiler]')

# Headers alone: tests read more of them than the package carries.
CUTLASS := $(shell sed -n 's/.*"\(nvidia-cutlass==[^"]*\)".*/\1/p' pyproject.toml)

PACKAGE_SOURCES := pyproject.toml setup.py $(shell find hopper -name '*.py' -o -name '*.json') \
                   $(shell find csrc/kernels csrc/runtime -type f)
FORMATTED_CXX := $(shell find csrc/kernels csrc/runtime tests -name '*.h' -o -name '*.hpp' -o -name '*.cuh' -o -name '*.cc')

ifeq ($(USE_SYSTEM_PYTHON),1)
BIN :=
export PYTHONPATH := hopper
RUN := $(PYTHON)
DEPENDENCIES :=
PACKAGE := build-in-place
LINTERS :=
else
BIN := $(VENV)/bin/
RUN := $(VENV)/bin/python
DEPENDENCIES := $(VENV)/.package
PACKAGE := $(VENV)/.package
LINTERS := $(VENV)/.linters
endif
PIP := $(VENV)/bin/python -m pip install --quiet

.PHONY: demo test lint format venv build-in-place clean

demo: $(PACKAGE)
	$(RUN) -m flash_attn_3.demo

test: $(PACKAGE)
	$(RUN) -m pytest $$($(RUN) -c 'import xdist' 2>/dev/null && echo --numprocesses=$(TEST_JOBS) --dist=worksteal) $(PYTEST_ARGS)

lint: $(LINTERS)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(FORMATTED_CXX)

format: $(LINTERS)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(FORMATTED_CXX)

venv: $(VENV)/.package $(VENV)/.linters

# The empty files .linters, .torch and .package say when each was last installed.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

$(VENV)/.linters: pyproject.toml | $(VENV)/bin/pip
	$(PIP) --group lint
	@touch $@

$(VENV)/.torch: | $(VENV)/bin/pip
	$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) torch==$(TORCH_VERSION)
	@touch $@

$(VENV)/.package: $(PACKAGE_SOURCES) | $(VENV)/.torch
	$(PIP) --group test '.$(EXTRAS)'
	$(PIP) --no-deps $(CUTLASS)
	@touch $@

build-in-place: $(DEPENDENCIES)
	PYTHONPATH=hopper $(RUN) -m flash_attn_3.runtime_build

clean:
	rm -rf build dist hopper/*.egg-info hopper/flash_attn_3/device hopper/flash_attn_3/prebuilt
	rm -rf .pytest_cache .hypothesis .ruff_cache hopper/.ruff_cache
	rm -f hopper/flash_attn_3/_runtime.so
	find hopper tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
