# What a newcomer types: `make demo`, `make test`. Everything is installed into $(VENV), nothing outside it.
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment, JOBS=4 the tests' processes.

SHELL := /bin/bash
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
JOBS ?= 2
ARGS ?=

DEMO_EXTRAS := cpu,export,rtx,report
TEST_EXTRAS := $(DEMO_EXTRAS),dev
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   install into $(VENV) and run the whole path on the sample model"
	@echo "make test   install what the tests need and run them all"
	@echo "make lint   ruff, and mypy --strict on the package"
	@echo "make clean  remove $(VENV), what was compiled, and the demo's folder"

demo: $(VENV)/.demo
	$(VENV)/bin/moedge demo $(ARGS)

# One thread for each test process: the processes share the cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

# mypy wants the package under its own name, and this folder may have any: it checks the link .build/types/moedge.
lint: $(VENV)/.test
	$(VENV)/bin/python -m ruff check .
	@mkdir -p .build/types && ln -sfn ../.. .build/types/moedge
	@python="$$(cd $(VENV)/bin && pwd)/python" && cd .build/types && \
	"$$python" -m mypy --config-file ../../pyproject.toml -p moedge

clean:
	rm -rf $(VENV) .build moedge.egg-info moedge-demo runtime/kernels/libmoedge_cpu-*

# The install is editable, so only a change of what is required installs again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing moedge[$(DEMO_EXTRAS)] into $(VENV): a minute or two, about 700 MB on disk"
	$(PIP_INSTALL) -e '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing moedge[$(TEST_EXTRAS)] into $(VENV): torch and transformers are large, so some minutes"
	$(PIP_INSTALL) -e '.[$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.demo

$(VENV)/bin/python:
	@$(PYTHON) -c '' 2>/dev/null || { echo "error: $(PYTHON) does not run; install Python 3.10 or later, or: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "error: $$($(PYTHON) --version) is too old, moedge needs 3.10 or later; use: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) lacks the venv module (Debian, Ubuntu: sudo apt install python3-venv)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
