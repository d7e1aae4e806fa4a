# Two commands: `make repro` regenerates every table, `make test` checks everything. Both set themselves up.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV ?= .venv
BIN := $(VENV)/bin
# nproc would answer OMP_NUM_THREADS, which the tier sets to 1
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
PARALLEL := -n $(JOBS) --dist loadgroup --no-loadscope-reorder
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

# The portable tier's variables must stand before torch and numpy are loaded.
include portable.env
export $(shell sed 's/=.*//' portable.env)

.PHONY: help setup repro status test test-slow kill sanitize lint bench lock
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

setup: $(VENV)/extension.stamp  ## create .venv, install the pinned packages, build the extension (once)

repro: setup  ## regenerate every stale table and the report of the desk profile
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mirepro repro --jobs $(JOBS)

status: setup  ## say which stages are stale, and why
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mirepro status

test: setup lint  ## ruff, mypy, the fast tests, then the slow ones (not what only test-slow runs)
	@$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup  ## the slow tests, with the reproduction of all tables and two builds of the image (hours)
	@$(BIN)/python -m pytest -m slow $(PARALLEL)

kill: setup  ## kill and rerun the desk profile's stages 100 times (long)
	@$(BIN)/python tests/kill.py --kills 100 --desk

sanitize: setup  ## the operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/python -m tests.sanitize

lint: $(VENV)/packages.stamp  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup  ## speed of the compiled operators against torch and faiss
	@$(BIN)/python -m benchmarks.bank

LOCK := uv pip compile --generate-hashes --no-annotate --python-version 3.11 --custom-compile-command "make lock"
lock:  ## resolve requirements.lock and containers/describe.lock anew (needs uv)
	$(LOCK) pyproject.toml --extra dev --output-file requirements.lock
	echo cyclonedx-bom | $(LOCK) - --output-file containers/describe.lock

$(BIN)/python:
	@$(call need,test -n "$(PYTHON)",Python 3.11 or 3.12 not found; apt-get install python3 python3-venv has one on Debian 12 and Ubuntu 24.04$(comma) elsewhere make PYTHON=...)
	@$(call need,$(PYTHON) -c 'import ensurepip$(comma) venv',the venv module is missing; apt-get install $(notdir $(PYTHON))-venv)
	@$(call need,test $$(df --output=avail -k . | tail -1) -ge 12000000,less than 12 GB of free disk here; free some space)
	@$(call need,command -v g++,no C++ compiler; apt-get install g++)
	@$(call need,$(PYTHON) -c '$(HEADERS)',Python.h is missing; apt-get install $(notdir $(PYTHON))-dev)
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/packages.stamp: requirements.lock | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) # its making was cut short
	@echo "installing requirements.lock (some minutes, 6 GB)"
	@$(PIP) install --require-hashes -r requirements.lock
	@touch $@

$(VENV)/extension.stamp: $(VENV)/packages.stamp $(SOURCES)
	@$(call need,command -v g++,no C++ compiler; apt-get install g++)
	@$(call need,$(BIN)/python -c '$(HEADERS)',Python.h is missing; apt-get install $(notdir $(PYTHON))-dev)
	@echo "building the extension"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

comma := ,
HEADERS := import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
# $(call need,command,complaint): one line and a non-zero exit where the command fails
need = $(1) >/dev/null 2>&1 || { echo "mirepro: $(2)" >&2; exit 1; }
