# Needs Python 3.11 or later, pip and make; everything else is installed into .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow check bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[frames,test,check]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/lynx_hare.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(STAMP)
	set -e; for file in $(filter-out %_peers.py %_gait.py %_data.py %_baselines.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file --quick; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
