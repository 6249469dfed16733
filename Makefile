# Both targets work on a fresh machine with Python 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
# Without trainers, drawing and the command line.
COMPAT_TESTS := tests/compiling tests/decision tests/model tests/plan tests/ranks \
    tests/recipes tests/store tests/timing tests/trial tests/tuner tests/test_config.py \
    tests/whole/test_auto.py tests/whole/test_nothing_left.py tests/test_private_places.py

.PHONY: demo test lint types unit bench gpu compat docs dist clean

demo: .venv/installed
	$(BIN)/python examples/train_llama.py

test: lint types unit

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed
	$(BIN)/pyright

# One worker a core, each with one thread, which is all that the tests' small tensors need.
unit: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

bench: .venv/installed
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --override-ini addopts="-ra --import-mode=importlib"

# At most ten minutes on one GPU, without a network; then docs/measurements/gpu.md is
# what the folder says.
gpu: .venv/installed
	$(BIN)/python tests/benchmarks/gpu.py docs/measurements/gpu
	$(BIN)/python tests/benchmarks/gpu_page.py docs/measurements/gpu > gpu.md.tmp
	mv gpu.md.tmp docs/measurements/gpu.md

# The core tests on the oldest and the newest versions, each in an environment of its own.
# An empty constraint file lifts a cap on torch that the system may have.
compat:
	$(MAKE) compat-oldest TORCH="torch==2.11.*" TORCHAO="torchao==0.17.*"
	$(MAKE) compat-newest TORCH="torch==2.15.*" TORCHAO="torchao==0.18.*"

compat-%:
	test -x .compat/$*/bin/python || $(PYTHON) -m venv .compat/$*
	touch .compat/no-constraints
	PIP_CONSTRAINT=$(CURDIR)/.compat/no-constraints .compat/$*/bin/pip install --quiet \
	    "$(TORCH)" "$(TORCHAO)" "filelock>=3.12" "rich>=13" numpy pyyaml psutil \
	    "hypothesis>=6.100" "jsonschema>=4.20" "pytest>=8" "pytest-timeout>=2.3"
	PYTHONPATH=$(CURDIR) .compat/$*/bin/python -m pytest $(COMPAT_TESTS) \
	    -m "not slow and not dist and not gpu" -p no:cacheprovider -q

docs: .venv/installed
	PYTHONPATH=. $(BIN)/sphinx-build --fail-on-warning --keep-going -E docs build/docs

dist: .venv/installed
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_release.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	# Its file axe.min.js is wanted, and not Playwright.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps axe-playwright-python
	touch $@

clean:
	rm -rf .venv .compat .pytest_cache .ruff_cache build dist *.egg-info
