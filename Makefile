# One environment, built once and in stages: a stage's stamp is written only after it succeeded, so an interrupted
# build goes on where it stopped and a finished one is reused.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
FIG ?=
QUICK ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
SAY := @printf 'env %s\n'

.DEFAULT_GOAL := help
.PHONY: help env demo test lint docs reproduce bench bench-check faults fuzz soak clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  VENV=$(VENV)  PYTHON=$(PYTHON)  ARGS=... is passed on by every target that runs something"

env: $(STAMPS)/project  ## build the environment, or finish a half-built one (about 8 minutes)

demo: env  ## two peers codistil on real text and images; ends with two tables and a picture
	$(BIN)/python -m recipes.embedded.demo $(ARGS)

test: env  ## run the tests (ARGS="-k staleness" picks some)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: env  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env  ## build the pages of docs/ as a site, into site/; a link that leads nowhere fails
	$(BIN)/python -m mkdocs build --strict $(ARGS)

reproduce: env  ## train every figure of the paper at embedded scale, hours; FIG=6 one of them, QUICK=1 a few updates of all
	$(BIN)/python -m recipes.embedded.reproduce $(FIG:%=--figure %) $(if $(QUICK),--quick) $(ARGS)

bench: $(STAMPS)/bench  ## measure what codistillation costs, and what else one would use (ARGS="update links" asks some questions)
	$(BIN)/python -m benchmarks $(ARGS)

bench-check: $(STAMPS)/bench  ## measure again, and fail where a ratio is worse than docs/performance keeps
	$(BIN)/python -m benchmarks --check $(ARGS)

faults: env  ## inject every fault at every step of an exchange, on a folder and on S3; ends with a table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.matrix $(ARGS)

fuzz: $(STAMPS)/fuzz  ## feed the readers of what comes from the store with bytes made to break them (ARGS="--seconds 600")
	$(BIN)/python -m tests.faults.fuzz $(ARGS)

soak: env  ## three peers, thousands of exchanges, random kills and faults (ARGS="--minutes 30")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

clean:  ## remove build artefacts and caches; the environment and data/ stay
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -path ./data -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The pins need Python 3.11; fairseq's extensions are compiled here, so a compiler and Python's headers are looked for
# before anything is downloaded.
define REQUIRE
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "env: '$(PYTHON)' is not Python 3.11 or newer; name one: make env PYTHON=python3.11" >&2; exit 1; }
@command -v $${CXX:-c++} >/dev/null || \
	{ echo "env: no C++ compiler ('$${CXX:-c++}') found, fairseq needs one: apt install g++, or set CXX" >&2; exit 1; }
@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	{ echo "env: the C headers of '$(PYTHON)' are missing, fairseq needs them: apt install python3-dev" >&2; exit 1; }
endef

$(STAMPS)/venv:
	$(REQUIRE)
	$(SAY) "1/4  $(VENV): a new virtual environment (seconds)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: constraints.txt $(STAMPS)/venv
	$(SAY) "2/4  torch, torchvision and build tools (about 2 minutes)"
	@$(PIP) torch torchvision setuptools wheel cython numpy ninja
	@touch $@

# Without isolation: fairseq's build must see the torch and numpy it will run with, and find the ninja installed above.
$(STAMPS)/fairseq: constraints.txt $(STAMPS)/torch
	$(SAY) "3/4  fairseq, compiled here (about 5 minutes)"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation fairseq-fixed
	@touch $@

# Apart from the rest: the fuzzer has no builds for macOS, torchft none but for Linux on x86-64.
$(STAMPS)/fuzz: $(STAMPS)/project
	@$(PIP) atheris
	@touch $@

$(STAMPS)/bench: $(STAMPS)/project
	@$(PIP) torchft || echo "bench: torchft cannot be had here; DiLoCo will be left out" >&2
	@touch $@

$(STAMPS)/project: setup.py constraints.txt $(STAMPS)/fairseq
	$(SAY) "4/4  this project, editable, with everything its extras name (about 1 minute)"
	@$(PIP) --no-build-isolation --editable '.[all]'
	@touch $@
