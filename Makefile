# Both targets work on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types unit bench gpu clean

demo: .venv/installed
	$(BIN)/python examples/train_llama.py

test: lint types unit

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

unit: .venv/installed
	$(BIN)/python -m pytest

bench: .venv/installed
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --override-ini addopts="-ra --import-mode=importlib"

gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
