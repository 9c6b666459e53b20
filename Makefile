# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test tables topology export-check lint types clean

demo: $(READY)
	$(BIN)/janus-jax demo --config=configs/demo.py --workdir=runs/demo

test: $(READY)
	$(BIN)/python -m pytest

# The smoke table from beginning to end, then parts of it again, which must give the same figures.
tables: $(READY)
	$(BIN)/python -m pytest -n 0 tests/tables/smoke.py

# Compiles for TPUs and GPUs, which needs their compilers but neither of them.  A venv of its own: where libtpu is
# installed, jax looks for a TPU at every start.
topology: .venv-compilers/.ready
	.venv-compilers/bin/python -m pytest -n 0 tests/absent/tpus.py
	.venv-compilers/bin/python -m pytest -n 0 tests/absent/gpus.py

# An export needs jax, flatbuffers and sentencepiece, and nothing else of ours: run in a venv that has only these.
export-check: .venv-bare/.ready
	JANUS_JAX_BARE_PYTHON=$(abspath .venv-bare/bin/python) $(BIN)/python -m pytest -n 0 tests/test_export.py -k nothing_of_ours

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@if command -v shellcheck >/dev/null; then echo "shellcheck launch benchmarks"; shellcheck -x launch/*.sh launch/tables/*.sh benchmarks/*.sh .ci/run; \
	else echo "shellcheck is not installed: the shell scripts were not checked" >&2; fi

types: $(READY)
	$(BIN)/mypy

.venv-compilers/.ready: $(READY)
	$(PYTHON) -m venv .venv-compilers
	.venv-compilers/bin/python -m pip install --quiet -e '.[dev,compilers]'
	@touch $@

.venv-bare/.ready: $(READY)
	$(PYTHON) -m venv .venv-bare
	.venv-bare/bin/python -m pip install --quiet "jax==$$($(BIN)/python -c 'import jax; print(jax.__version__)')" flatbuffers sentencepiece
	@touch $@

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"janus-jax needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: run make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-compilers .venv-bare build *.egg-info
