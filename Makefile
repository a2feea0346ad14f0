# make demo | bench | test | lint | clean. Each makes .venv on first use, installs what it needs and builds what has changed.
# `make test VENV= PYTHON=python3` uses that interpreter's own packages and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Their models are test subjects. Installed without their dependencies, so that they cannot replace torch.
TORCHVISION ?= torchvision==0.28.0
TIMM ?= timm==1.0.31
# CuTe's headers, for building the CUDA kernels. Its dependencies are those of its Python tools.
CUTLASS ?= nvidia-cutlass==4.2.*
# Which tests to run, and further arguments of pytest.
TESTS ?= tests
PYTEST_ARGS ?=
# More arguments of tests/gpu_check.py, as in GPU_CHECK_ARGS='--only leaks --json outcome.json'.
GPU_CHECK_ARGS ?=
# How many cases `make fuzz` runs.
N ?= 20000

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
.PHONY: help demo bench test fuzz build readme sanitize gpu-check lint format clean check-python check-packages
# What the commands import beside pointfuse, for an interpreter whose packages are its own affair.
PACKAGES = torch setuptools
demo: PACKAGES = torch setuptools matplotlib PIL rich
bench: PACKAGES = torch setuptools jinja2 matplotlib rich
gpu-check sanitize: PACKAGES = torch setuptools numpy pytest hypothesis rich
fuzz: PACKAGES = torch setuptools numpy pytest hypothesis rich
readme: PACKAGES = torch matplotlib PIL rich
test: PACKAGES = torch setuptools numpy pytest pytest_cov hypothesis jinja2 matplotlib PIL rich
lint format: PACKAGES = torch mypy ruff

help:
	@echo "make demo    a photograph through YOLOv3: eager, converted, frozen; accuracy and latency"
	@echo "make bench   layers, stacks and networks against everything else, in nine minutes; BENCH_ARGS=--resume goes on"
	@echo "make test    every test, with coverage"
	@echo "make fuzz    random units against PyTorch in float64: N=20000 SEED=n BACKENDS=aten,..."
	@echo "make readme  the README's figures, from the files of results that it names"
	@echo "make build   the CUDA kernels and the planner, where this machine can build them"
	@echo "make gpu-check  whether pointfuse is right on this machine's GPU: one table, within 9 minutes"
	@echo "make sanitize  of those the runs under compute-sanitizer alone, without hurry"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make format  apply the formatters"
	@echo "make clean   remove .venv and everything built"

demo: build
	$(PY) benchmarks/demo.py $(DEMO_ARGS)

bench: build
	$(PY) benchmarks/run.py $(BENCH_ARGS)

# Incremental: a second when nothing has changed.
build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

readme: $(READY)
	$(PY) benchmarks/readme.py

test: build
	$(PY) -m pytest $(TESTS) --cov=pointfuse --cov-report=term $(if $(filter tests,$(TESTS)),--cov-fail-under=95) $(PYTEST_ARGS)

# Exit codes of the script: 0 all passed, 1 something failed, 2 nothing could be checked, 130 interrupted.
gpu-check: build
	-@$(PY) tests/host_cuda/build.py
	$(PY) tests/gpu_check.py $(GPU_CHECK_ARGS)

# Failures are shrunk and kept in tests/regressions, which `make test` runs.
fuzz: build
	@$(PY) tests/fuzz.py $(N) $(if $(SEED),--seed $(SEED)) $(if $(BACKENDS),--backends $(BACKENDS))

sanitize: build
	$(PY) tests/gpu_check.py --only memcheck,racecheck,synccheck,initcheck --seconds 900 $(GPU_CHECK_ARGS)

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
	rm -rf .venv build dist out python/*.egg-info python/pointfuse/*.so python/pointfuse/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
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

$(VENV)/.ready: pyproject.toml | check-python
	rm -f $@
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade setuptools ninja pybind11
	$(PY) -m pip install --quiet $(TORCH)
	# The kernels are built by `make build`, which shows its progress.
	POINTFUSE_BUILD_CUDA=0 $(PY) -m pip install --quiet --no-build-isolation --editable '.[bench,dev]'
	$(PY) -m pip install --quiet --no-deps $(TORCHVISION) $(TIMM) '$(CUTLASS)'
	touch $@
