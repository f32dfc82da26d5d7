# make run: train the tiny model on this machine.   make test: every test that needs no SLURM and no GPU.

VENV ?= .venv
PROFILE ?= profiles/local
RESULTS ?= $(or $(shell sed -n 's/^results: *\([^ \#]*\).*/\1/p' config.yaml $(PROFILE)/settings.yaml 2>/dev/null | tail -1),results)
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
BIN = $(abspath $(VENV))/bin

.PHONY: run test test-cluster lint format install clean

run: install
	@PATH="$(BIN):$$PATH" snakemake --profile $(PROFILE)
	@PATH="$(BIN):$$PATH" nanochat report --results $(RESULTS) --headline
	@echo "The whole report: $(RESULTS)/report.md"

test: install
	$(BIN)/pytest -m "not cluster and not gpu" --numprocesses 2 --dist loadfile tests/unit
	$(BIN)/pytest -m "not cluster and not gpu" --ignore tests/unit
	@echo "Not run here: the tests on a real SLURM (make test-cluster) and those on a GPU (pytest -m gpu)."

test-cluster: install
	$(BIN)/pytest -m cluster tests/cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(BIN):$$PATH" snakefmt --check workflow
	PATH="$(BIN):$$PATH" snakemake --lint

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	PATH="$(BIN):$$PATH" snakefmt workflow

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, none was found on PATH. Set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf results .snakemake
