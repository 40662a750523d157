# Needs make and Python 3.11 or newer; everything else goes into $(VENV).
# Variables, each with an example:
#   PYTHON=python3.13   the interpreter that makes the environment
#   VENV=.venv-3.13     where the environment is
#   JOBS=4              test processes (0: all in one)
#   EXAMPLE=data_parallel   which one `make example` runs
#   ARGS="-k damping"   passed on to the example or to pytest

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
EXAMPLE ?= mnist_autoencoder
ARGS ?=

IN_VENV := $(VENV)/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help example layers docs notebooks test coverage lint clean

help:
	@echo 'make example   run examples/$(EXAMPLE).py; its options: make example ARGS="..."'
	@echo 'make layers    a table of what is covered, for every kind of layer (minutes)'
	@echo 'make docs      the documentation, into build/site; a warning is an error'
	@echo 'make notebooks run them and keep their outputs (minutes); one: ARGS=01'
	@echo 'make test      unit tests and doctests; pytest options: make test ARGS="..."'
	@echo 'make coverage  the same, and which lines and branches of the package they miss'
	@echo 'make lint      ruff, pyright, the import order and the size of the modules'
	@echo 'make clean     remove $(VENV), caches and build results'
	@echo 'Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  JOBS=$(JOBS)  EXAMPLE=$(EXAMPLE)  ARGS=$(ARGS)'

example: $(VENV)/.installed-examples
	$(IN_VENV) examples/$(EXAMPLE).py $(ARGS)

layers: $(VENV)/.installed-test
	PYTHONPATH=tests $(IN_VENV) tests/layer_table.py $(ARGS)

docs: $(VENV)/.installed-docs
	$(IN_VENV) -m sphinx -b html -n -W --keep-going $(ARGS) docs build/site
	$(IN_VENV) docs/check_site.py build/site

notebooks: $(VENV)/.installed-notebooks
	$(IN_VENV) notebooks/run.py $(ARGS)

test: $(VENV)/.installed-test
	MPLBACKEND=Agg $(IN_VENV) -m pytest -n $(JOBS) $(ARGS)

coverage: $(VENV)/.installed-test
	MPLBACKEND=Agg $(IN_VENV) -m pytest -n $(JOBS) --cov --cov-report=term-missing $(ARGS)

lint: $(VENV)/.installed-dev
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(IN_VENV) -m pyright --pythonpath $(IN_VENV)
	$(VENV)/bin/lint-imports
	$(IN_VENV) .ci/house.py

# The environment plus one extra; done again only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(IN_VENV)
	@echo 'Installing optax_cgfac[$*] into $(VENV) (the first time takes a minute or two) ...'
	@$(IN_VENV) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(IN_VENV):
	@'$(PYTHON)' -c '' 2>/dev/null || { \
	  echo "'$(PYTHON)' does not run here. Name a Python 3.11 or newer: make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "optax_cgfac needs Python 3.11 or newer, and '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1)." >&2; \
	  echo 'Name another one: make PYTHON=/path/to/python' >&2; \
	  exit 1; }
	@'$(PYTHON)' -m venv '$(VENV)' || { \
	  rm -f '$(IN_VENV)'; \
	  echo "'$(PYTHON) -m venv' failed; is this Python's venv module installed?" >&2; \
	  exit 1; }

clean:
	@if [ -f '$(VENV)/pyvenv.cfg' ]; then rm -rf '$(VENV)'; fi
	rm -rf build dist docs/notebooks .pytest_cache .ruff_cache .import_linter_cache
	find .ci optax_cgfac tests examples benchmarks docs notebooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
