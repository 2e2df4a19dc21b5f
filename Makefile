# `make quickstart` and `make test` each make the environment that they need,
# with any Python from 3.11 on (launch/find_python.sh).
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
SEED ?= 0
export JAX_PLATFORMS ?= cpu
# Large pages: every step of XLA's CPU backend allocates its buffers anew.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# pip compiles no module, so each is compiled where it is first imported, and kept: many tests start Python.
export PYTHONDONTWRITEBYTECODE :=
# A real model for the tests, made from a PyPI wheel.
export POLGRAD_SMOLLM2 ?= $(CURDIR)/.cache/smollm2

.PHONY: quickstart test smollm2 lint format pages clean

# What a step has freed is kept for the next one, in place of pages that the kernel zeroes again.
KEEP := glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184
quickstart: export GLIBC_TUNABLES := $(GLIBC_TUNABLES):$(KEEP)
quickstart: $(VENV)/.run
	$(BIN)/python -m polgrad.train --config=experiments/quickstart.py:seed=$(SEED) --workdir=$(RUN)
	$(BIN)/python -m polgrad.evaluate --config=experiments/quickstart.py:seed=$(SEED) --workdir=$(RUN)

test: lint smollm2
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

smollm2: $(VENV)/.test
	$(BIN)/python launch/fetch_smollm2.py "$(POLGRAD_SMOLLM2)"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh .ci/run

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are made from the methods; measures the estimators of new ones.
pages: $(VENV)/.test
	$(BIN)/python launch/method_table.py
	$(BIN)/python -m benchmarks.estimators --new
	$(BIN)/python -m benchmarks.turn_estimators --new
	$(BIN)/python -m benchmarks.sampling_estimators --new
	$(BIN)/python -m benchmarks.preferences --new

$(BIN)/python:
	python=$$(launch/find_python.sh) && "$$python" -m venv $(VENV)

$(VENV)/.run: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e .
	touch $@

$(VENV)/.test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[test]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) runs
