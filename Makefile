# `make demo` and `make test` need nothing but Linux and Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# XLA on CPU allocates the memory of every step anew; with pages of 2 MiB a step takes about a tenth
# less time. glibc reads this when a process starts.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: demo test slow clean

demo: $(VENV)/run.stamp
	rm -rf runs/demo
	$(HUGE_PAGES) $(BIN)/ssl_jax demo --workdir runs/demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

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
