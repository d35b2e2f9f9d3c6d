# make demo   install, then quantize the embedded model and print its result table
# make test   install, then lint, types and tests
# make test-all   the same, with real runs of the tools that the benchmarks compare with
# make test-arm   run the Arm bundles on emulated Arm cores (half an hour; skipped with the reason)
# make test-avx2  run the x86-avx2 bundle on AVX2 kernels, with VNNI hidden (ten minutes; likewise)
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-tools test-arm test-avx2 test-fast lint types format clean help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Installs again only when pyproject.toml changed.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/gnet-opt quantize --target cpu --output build/demo-cpu --force

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# Tests start an SSH server of their own and open reports in a browser. Where these are missing and
# Debian's packages cannot be installed, those tests skip with the reason.
test-tools:
	@missing=; \
	test -x /usr/sbin/sshd || missing="$$missing openssh-server"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if test -n "$$missing" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq --no-install-recommends $$missing >/dev/null || true; \
	fi

# One worker a core; the tests of a file stay together, because they share what was built for them.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: lint types test-tools
	$(PYTEST)

test-fast: lint types test-tools
	$(PYTEST) -m 'not slow and not full'

test-all: lint types test-tools
	$(PYTEST) -m ''

# 77: this machine cannot, and the reason is printed.
test-arm: $(INSTALLED)
	$(BIN)/python benchmarks/emulated_kernels.py arm64 raspberry-pi-5 || test $$? -eq 77

test-avx2: $(INSTALLED)
	$(BIN)/python benchmarks/emulated_kernels.py x86-avx2 --images 400 || test $$? -eq 77

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
