# `make quickstart` and `make test` each make the environment that they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
SEED ?= 0
export JAX_PLATFORMS ?= cpu
# Large pages: every step of XLA's CPU backend allocates its buffers anew.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.run
	$(BIN)/python -m polgrad.train --config=experiments/quickstart.py:seed=$(SEED) --workdir=$(RUN)
	$(BIN)/python -m polgrad.evaluate --config=experiments/quickstart.py:seed=$(SEED) --workdir=$(RUN)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh .ci/run

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.run: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) runs
