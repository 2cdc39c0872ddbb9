# Everything a newcomer needs: `make demo` paints, `make test` proves. Both set up on first use.
#
#   make demo REUSE_TORCH=1    use the torch this Python already has (a CUDA build, say)
#   make test ARGS="-k law"    pass options to pytest
#   make test ARGS=--every     every row of every table, and long runs, not some that stand for all: before a release

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
JOBS ?= 3

ifdef REUSE_TORCH
VENV_OPTIONS := --system-site-packages
PINS := $(VENV)/constraints-without-torch.txt
else
VENV_OPTIONS :=
PINS := constraints.txt
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test fused quantised oldest lint types check bench gpu-check clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/' | expand -t 18

setup: $(STAMP) ## make the virtual environment and install what the project needs

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints-without-torch.txt
	$(BIN)/pip install --quiet --constraint $(PINS) --editable '.[dev]'
	touch $(STAMP)

demo: setup ## paint a sheet of pictures in one process and in several, with seconds and likeness
	$(BIN)/patchpipe demo --output out/demo.png --force

test: setup ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 60 $(ARGS)

fused: setup ## run the tests of Triton's kernels in its interpreter, with Triton put beside the virtual environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton --constraint constraints.txt triton
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -n 0 tests/stage/test_trends.py $(ARGS)

quantised: setup ## run the tests of quantised weights, whose libraries are put beside the virtual environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/quantised --constraint constraints.txt \
		torchao optimum-quanto gguf ninja
	PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest -n $(JOBS) tests/loading/test_quantised.py $(ARGS)

oldest: setup ## run a few tests with the oldest diffusers and transformers allowed, put beside the virtual environment
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/oldest --requirement constraints-oldest.txt
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n $(JOBS) tests/models/test_relies.py tests/pipeline/test_encoders.py \
		tests/laws/test_laws.py -k "relies or encoders or law_1" $(ARGS)

lint: setup ## check style, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## check types
	$(BIN)/mypy

check: lint types test ## everything CI runs

bench: setup ## measure every method against one device; writes bench/results and the docs
	for shape in flux-wide sd3 pixart; do $(BIN)/python -m bench.loopback --shape $$shape $(ARGS) || exit 1; done
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.plot

gpu-check: ## on a machine with a GPU: what only a GPU shows, in 9 minutes (docs/gpu.md)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist *.egg-info
