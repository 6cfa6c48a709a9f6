# `make demo` and `make test` work on a fresh Linux machine with Python 3.11 or newer, no other step.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow clean

demo: $(VENV)/run.stamp
	rm -rf runs/demo
	$(BIN)/ssl_jax demo --workdir runs/demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2

slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q -m slow

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssl_jax needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(VENV)/bin/python requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/bin/python requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) runs build *.egg-info
