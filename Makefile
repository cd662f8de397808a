# The two commands a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine whose package index serves CUDA builds of torch, point this at a CPU index:
#   make demo PIP_OPTIONS="--index-url <your CPU wheel index>"
PIP_OPTIONS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install dev demo data test lint types floors tests bench bench-peers docs index format clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_OPTIONS) -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install -q $(PIP_OPTIONS) -c constraints.txt -e ".[web,feed]"
	touch $@

# What the tests need besides, real peers among it: Ray, Lightning, transformers, MLflow, TensorBoard.
$(VENV)/.dev: $(VENV)/.done
	$(BIN)/pip install -q $(PIP_OPTIONS) -c constraints.txt -e ".[dev]"
	touch $@

install: $(VENV)/.done  ## make the virtual environment with the pinned CPU torch

dev: $(VENV)/.dev  ## the same with all that tests and lint need

data: install  ## put Fashion-MNIST in the user's cache (the demo falls back to digits without it)
	$(BIN)/nervure data fashion-mnist || echo "Fashion-MNIST cannot be had here; the demo uses digits instead."

demo: data  ## run one paper's claim on real data and write its report
	$(BIN)/nervure run lottery-ticket --data fashion-mnist --fallback digits --report reports || test $$? -eq 1

test: lint types floors tests  ## lint, types, floors and all tests

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

floors: dev
	$(BIN)/lint-imports

tests: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not alone"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m alone tests/web

index: dev  ## rebuild the committed index of cards
	$(BIN)/python -m nervure.catalogue.build

bench-peers:  ## the environment of the benchmarks' peers, apart from ours
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q $(PIP_OPTIONS) "torch==2.13.0" numpy scipy
	.venv-bench/bin/pip install -q $(PIP_OPTIONS) --no-deps -r bench/peers.txt

bench: dev  ## side-by-side benchmarks with printed ratios
	$(BIN)/python -m bench

docs: install  ## build the documentation into site/
	$(BIN)/pip install -q $(PIP_OPTIONS) -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

format: install  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that was built
	rm -rf $(VENV) .venv-bench site build reports .mypy_cache .ruff_cache
