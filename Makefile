# make demo | test | lint | clean. Each makes .venv on first use, installs what it needs and builds what has changed.
# `make test VENV= PYTHON=python3` uses that interpreter's own packages and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Their models are test subjects. Installed without their dependencies, so that they cannot replace torch.
TORCHVISION ?= torchvision==0.28.0
TIMM ?= timm==1.0.31
# CuTe's headers, for building the CUDA kernels. Its dependencies are those of its Python tools.
CUTLASS ?= nvidia-cutlass==4.2.*
COMPUTE_SANITIZER ?= compute-sanitizer
# What runs on a GPU besides the emulator.
GPU_TESTS = tests/test_gpu.py tests/test_cuda_kernels.py tests/test_cuda_kernels_sm90.py tests/test_cuda_backend.py \
  tests/test_kernel_backends.py tests/test_triton_kernels.py tests/test_tune.py tests/test_cuda_statistics.py \
  tests/test_cuda_training.py tests/test_cuda_forward.py tests/test_triton_training.py
# Which tests to run, and further arguments of pytest.
TESTS ?= tests
PYTEST_ARGS ?=
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
.PHONY: help demo test fuzz build sanitize gpu-check lint format clean check-python check-packages check-gpu
# What the commands import beside pointfuse, for an interpreter whose packages are its own affair.
PACKAGES = torch setuptools
demo: PACKAGES = torch setuptools matplotlib PIL rich
sanitize: PACKAGES = torch setuptools pytest
test: PACKAGES = torch setuptools numpy pytest pytest_cov hypothesis matplotlib PIL rich
fuzz: PACKAGES = torch setuptools numpy pytest hypothesis rich
lint format: PACKAGES = torch mypy ruff

help:
	@echo "make demo    a photograph through YOLOv3: eager, converted, frozen; accuracy and latency"
	@echo "make test    every test, with coverage"
	@echo "make fuzz    random units against PyTorch in float64: N=20000 SEED=n BACKENDS=aten,..."
	@echo "make build   the CUDA kernels and the planner, where this machine can build them"
	@echo "make sanitize  the kernels on a GPU under each tool of compute-sanitizer"
	@echo "make gpu-check  all that only a GPU can show: tests, sanitize, and the layers' and stacks' benchmark"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make format  apply the formatters"
	@echo "make clean   remove .venv and everything built"

demo: build
	$(PY) benchmarks/demo.py $(DEMO_ARGS)

# Incremental: a second when nothing has changed.
build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

test: build
	$(PY) -m pytest $(TESTS) --cov=pointfuse --cov-report=term $(if $(filter tests,$(TESTS)),--cov-fail-under=95) $(PYTEST_ARGS)

# Failures are shrunk and kept in tests/regressions, which `make test` runs.
fuzz: build
	@$(PY) tests/fuzz.py $(N) $(if $(SEED),--seed $(SEED)) $(if $(BACKENDS),--backends $(BACKENDS))

# Without the caching allocator, so that each tensor's end is the end of an allocation. initcheck has to see torch's
# kernels too, which write what ours read.
sanitize: check-gpu
	@command -v $(COMPUTE_SANITIZER) >/dev/null || { \
	  echo "make sanitize needs compute-sanitizer, which comes with the CUDA toolkit"; exit 1; }
	@for tool in memcheck racecheck synccheck initcheck; do \
	  echo "compute-sanitizer --tool $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 9 \
	    $$([ $$tool = initcheck ] || echo --kernel-name kns=pointfuse) \
	    $(PY) -m pytest --quiet tests/test_gpu.py -k reduced $(PYTEST_ARGS) || exit; \
	done

# Everything that only a GPU can show, correctness first; every part runs, and the exit code tells of any that failed.
gpu-check: check-gpu
	@failed=; \
	$(PY) -m pytest --quiet $(GPU_TESTS) $(PYTEST_ARGS) || failed="$$failed tests"; \
	$(MAKE) --no-print-directory sanitize PYTEST_ARGS= || failed="$$failed sanitize"; \
	$(PY) benchmarks/run.py --device cuda --suite layers,stack,training,overhead --dtype bf16 --batch 1,8,64 \
	  --contenders eager,folded,pointfuse || failed="$$failed benchmark"; \
	echo "gpu-check: $${failed:+failed:}$${failed:-passed}"; test -z "$$failed"

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

check-gpu: build
	@$(PY) -c 'import sys, pointfuse; \
	  found = {name: status for name, status in pointfuse.backends().items() if name != "aten"}; \
	  reasons = "; ".join(f"{name}: {status.reason}" for name, status in found.items()); \
	  sys.exit(None if any(s.usable for s in found.values()) else f"make $(MAKECMDGOALS) needs a GPU: {reasons}")'

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
