# make demo   install, then quantize the embedded model and print its result table
# make test   install, then lint, types and every test
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast lint types format clean help

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

test: lint types
	$(BIN)/python -m pytest

test-fast: lint types
	$(BIN)/python -m pytest -m 'not slow'

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
