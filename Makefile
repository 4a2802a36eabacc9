# Both commands set themselves up: a virtual environment in this clone, pinned installs, nothing global.
#   make demo            sample digits with every method and write runs/report.html
#   make test            the test suite
# PYTHON chooses the interpreter (3.11 or later); DEMO_FLAGS goes to `fixpoint bench`, TEST_FLAGS to pytest,
# MUTATION_FLAGS to `python -m benchmarks.mutation`, MATRIX_FLAGS to `python tests/matrix.py`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_FLAGS ?=
TEST_FLAGS ?=
MUTATION_FLAGS ?=
MATRIX_FLAGS ?=

.PHONY: demo test lint types docs doctest mutation matrix clean
.DEFAULT_GOAL := demo

# Torch goes first and by its exact version: resolved together with the rest, pip may take a newer build for GPUs.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fixpoint needs Python 3.11 or later, found %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/fixpoint bench ddim-chain sddim-chain fpdm-layer --out runs $(DEMO_FLAGS)

# One thread for each of the two processes: more of them than cores wait for one another at every small operation.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html

doctest: $(INSTALLED)
	$(BIN)/python -m pytest --doctest-modules fixpoint fixpoint_cli fixpoint_diffusion benchmarks/peers
	$(BIN)/sphinx-build -W -q -b doctest docs docs/_build/doctest

mutation: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutation $(MUTATION_FLAGS)

matrix: $(INSTALLED)
	$(BIN)/python tests/matrix.py $(MATRIX_FLAGS)

clean:
	rm -rf $(VENV) runs mutants docs/_build docs/auto_gallery
