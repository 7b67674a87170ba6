PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test gpu demo bench clean

help:  ## these lines
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

venv: .venv/installed  ## .venv with everything, at the versions of constraints.txt; a second run does nothing

# torch alone first: it is by far the largest download, and the one that fails.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

test: venv  ## lint, types, layers, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# No .venv: the torch and triton that fit this machine's driver are there already, and nothing else is needed.
gpu:  ## on a CUDA machine with torch >= 2.11, triton >= 3.6 (PYTHON=...): kernels tested and timed, 10 minutes
	@status=0; export PYTHONPATH=.; \
	$(PYTHON) -m tests.gpu || status=1; \
	$(PYTHON) benchmarks/gpu.py || status=1; exit $$status

demo: venv  ## compress a sentence encoder, save it, load it and use it
	$(BIN)/python benchmarks/demo.py

bench:  ## the commands behind the README's figures
	@for file in benchmarks/[!_]*.py; do echo "$(BIN)/python $$file"; done

clean:  ## remove caches and build outputs; .venv stays
	rm -rf build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
