# make demo | test | lint | clean. Each makes .venv on first use and installs what it needs.
# `make test VENV= PYTHON=python3` uses that interpreter's own packages and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Its models are test subjects. Installed without its dependencies, so that it cannot replace torch.
TORCHVISION ?= torchvision==0.28.0
# Which tests to run, and further arguments of pytest.
TESTS ?= tests
PYTEST_ARGS ?=

CXX_FILES = git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'

ifeq ($(strip $(VENV)),)
PY := PYTHONPATH=python$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
BIN :=
READY := check-packages
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
# Written last: an interrupted set-up has no stamp, and the next run starts it over.
READY := $(VENV)/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean check-python check-packages
# What the commands import beside pointfuse, for an interpreter whose packages are its own affair.
demo: PACKAGES = torch matplotlib PIL rich
test: PACKAGES = torch numpy pytest pytest_cov hypothesis matplotlib PIL rich
lint format: PACKAGES = torch mypy ruff

help:
	@echo "make demo    a photograph through YOLOv3: eager, converted, frozen; accuracy and latency"
	@echo "make test    every test, with coverage"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make format  apply the formatters"
	@echo "make clean   remove .venv and everything built"

demo: $(READY)
	$(PY) benchmarks/demo.py $(DEMO_ARGS)

test: $(READY)
	$(PY) -m pytest $(TESTS) --cov=pointfuse --cov-report=term $(if $(filter tests,$(TESTS)),--cov-fail-under=95) $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	@$(CXX_FILES) | xargs -r $(BIN)clang-format --dry-run -Werror

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	@$(CXX_FILES) | xargs -r $(BIN)clang-format -i

clean:
	rm -rf .venv build dist out python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pointfuse needs Python 3.11 or later; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }

check-packages: check-python
	@$(PYTHON) -c 'import sys, importlib.util as u; \
	  missing = [m for m in sys.argv[1:] if u.find_spec(m) is None]; \
	  sys.exit(f"{sys.executable} lacks {missing}: install them, or run make without VENV= to have .venv made" \
	           if missing else 0)' $(PACKAGES)

$(VENV)/.ready: pyproject.toml setup.py | check-python
	rm -f $@
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade setuptools
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[bench,dev]'
	$(PY) -m pip install --quiet --no-deps $(TORCHVISION)
	touch $@
