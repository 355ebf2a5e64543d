# The project's commands. `make demo` and `make test` do all the set-up they need; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
NATIVE := $(wildcard memsafe_native/cdef/*.h memsafe_native/src/*.[ch]) memsafe_native/build.py
C_FILES := $(wildcard memsafe_native/cdef/*.h memsafe_native/src/*.[ch] tests/native/*.[ch])
SOURCES := memsafe memsafe_native tests benchmarks examples docs setup.py

.DEFAULT_GOAL := help
.PHONY: help build dev demo test test-kernel fetch-kernels fuzz bench docs format lint types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --retries 5 --upgrade pip
	touch $@

# One editable install a set of extras; rebuilt when the C sources or the metadata change.
$(VENV)/.build: $(VENV)/.python $(NATIVE) pyproject.toml setup.py
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.build
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.build
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[docs]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.build
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check --retries 5 -e '.[fuzz]'
	touch $@

build: $(VENV)/.build ## build the extension into .venv, with what the tests and the demo need

dev: $(VENV)/.dev ## build, with formatter, linter and type checker

demo: build ## run the main job on real input: a store under load, refusals, pressure, snapshots, a restore
	$(PY) -m examples.demo

test: build ## run the tests
	$(PY) -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.fuzz ## fuzz the readers of the kernel's files, FUZZ_SECONDS (600) for all FUZZ_TARGETS together
	nice $(PY) -m tests.fuzz

test-kernel: build ## run the kernel tests in virtual machines; KERNEL=6.1 K=memory_events for one on one kernel
	$(PY) -m pytest tests/kernel -v $(addprefix --kernel ,$(KERNEL)) $(if $(K),-s -k '$(K)') \
		$(if $(SEED),--seed '$(SEED)') $(PYTEST_ARGS)

fetch-kernels: build ## fetch the newest kernels to run them on
	$(PY) -m tests.kernel.lab.kernels

bench: dev ## measure, each figure beside a peer in the same run
	$(PY) -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/.docs ## build the site into docs/_build/html, warnings as errors
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html

format: dev ## format Python and C
	$(VENV)/bin/ruff check --fix-only --quiet $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/clang-format -i $(C_FILES)

lint: dev ## check formatting and style
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

types: dev ## check types
	$(VENV)/bin/mypy

clean: ## remove what was built
	rm -rf $(VENV) build dist docs/_build *.egg-info memsafe_native/_ext.c memsafe_native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
