# make setup | demo | test | lint | bench: each creates .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
OUT ?= outputs/demo
DATA ?=

.PHONY: help setup demo test lint types pytest slow wheel clean
help:
	@echo "make demo               logs -> shards -> tokenizer -> world model -> rollouts -> report, on a CPU"
	@echo "make demo DATA=FOLDER   the same on your own dataset"
	@echo "make test               lint, types, tests, wheel check (what CI runs)"
	@echo "make slow               the tests that take longer (DeepSpeed, kill loops)"
	@echo "make setup              only create .venv and install"

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vidworld needs Python 3.11 or newer; run: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)

# Headless OpenGL for the lab: installed as root on Debian, asked for elsewhere, and never a failure.
HEADLESS_GL = ldconfig -p 2>/dev/null | grep -q libOSMesa || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && \
	timeout 60 apt-get -qq update && timeout 120 apt-get -qq install -y libosmesa6; } || echo "no OSMesa: the lab needs it or EGL (apt-get install libosmesa6)"

setup: $(INSTALLED)
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@$(HEADLESS_GL)
	@touch $@ $(READY)

# What the demo needs, without the tools of development.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[train,lab]"
	@$(HEADLESS_GL)
	@touch $@

demo: $(READY)
	$(BIN)/vidworld demo --out $(OUT) $(if $(DATA),--data $(DATA)) --overwrite

test: lint types pytest wheel

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

pytest: setup
	@# One thread a worker: threads that wait for each other on busy cores cost minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

slow: setup
	$(BIN)/python -m pytest -m slow

wheel: setup
	$(BIN)/python tools/check_wheel.py

clean:
	rm -rf $(VENV) build dist outputs runs .pytest_cache .ruff_cache
