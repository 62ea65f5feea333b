# make demo      from a clone to a federated adapter; needs Python 3.11 or 3.12 and nothing else
# make federation-demo  a real federation on loopback (needs nginx, and QUORATE_DATA)
# make test      lint and fast tests; what to run before a commit
# make test-all  lint and all tests; what CI runs
# make test-timm VGG through timm, in an environment of its own (.venv-timm)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo

# No target talks to a model hub or reports usage: models come from the package index or from QUORATE_WEIGHTS.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
# Tests start many processes, and each would compile all modules again where their bytecode may not be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv install demo federation-demo lint test-fast test-slow test test-all test-timm clean

help:
	@grep -E '^# make' $(firstword $(MAKEFILE_LIST)) | cut -c3-

# A pyenv shim answers to its name even where it cannot run, so ask each candidate for its version. A venv that
# failed half-way (Debian without python3-venv) is removed, or the next make would take it for a good one.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
	        echo "creating $(VENV) with $$python"; \
	        $$python -m venv $(VENV) && exit 0; rm -rf $(VENV); exit 1; \
	    fi; \
	done; \
	echo "Quorate needs Python 3.11 or 3.12; install one, or name one: make PYTHON=python3.11 ..." >&2; exit 1

venv: $(BIN)/python

# Stamps: installing is skipped until pyproject.toml or constraints.txt change. torch goes in first, alone: it
# is by far the largest download, and a later failure then does not cost it again.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install -q -c constraints.txt -e '.[demo,dev]'
	@touch $(VENV)/.demo $@

install: $(VENV)/.dev

# An earlier run is never overwritten: the second demo goes to a folder with the time in its name.
demo: $(VENV)/.demo
	@out='$(OUT)'; if [ -e "$$out" ]; then out="$$out-$$(date +%Y%m%d-%H%M%S)"; fi; \
	$(BIN)/quorate simulate demo -o "$$out"

federation-demo: $(VENV)/.demo
	bash deploy/demo/federation.sh $(or $(FEDERATION_OUT),runs/federation-demo-$(shell date +%Y%m%d-%H%M%S))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Recipes, not prerequisites, so that the order holds under make -j: what fails soonest runs first.
test:
	$(MAKE) lint
	$(MAKE) test-fast

test-all:
	$(MAKE) test
	$(MAKE) test-slow

# timm brings torchvision, which may not go into .venv: see "timm" in pyproject.toml. 0.28 is torch 2.13's.
.venv-timm/.done: pyproject.toml constraints.txt
	$(MAKE) venv VENV=.venv-timm
	.venv-timm/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	.venv-timm/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[dev,timm]' 'torchvision==0.28.*'
	@touch $@

test-timm: .venv-timm/.done
	.venv-timm/bin/python -m pytest tests/timm

# Leaves the environment and runs/ alone.
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find deploy server client shared simulations tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
