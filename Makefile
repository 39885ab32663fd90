# The commands of the README. Each does all of its set-up: a machine needs Python >= 3.10 with venv, a C++17 compiler and make.
#   make demo        train, quantize and compare a small model (examples/digits.py)
#   make test        build and run the tests, of exhaustive sweeps a fixed random part
#   make test-all    all of them, those that take minutes or much memory too
#   make bench       time the operators and whole layers against torch's and other packages', where installed
#   make lint        formatting, static checks
#   make site        the documents and the reference as a web site, in build/site
#   make cuda-build  compile and link the CUDA library (needs nvcc, no GPU)
#   make gpu-check   on a machine with a GPU: build, test, measure, write JSON
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt $(shell find cpp cuda -type f)
# named after the list of Python files, which the editable install has learned by heart
INSTALLED := build/editable/.installed-$(shell find python -name '*.py' | sort | cksum | cut -d' ' -f1)
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/*.cpp tests/*.h tests/*.cu)

.PHONY: demo test test-all bench lint format site cuda-build gpu-check clean

demo: $(VENV)/built
	$(BIN)/python examples/digits.py

# one process a core, each with a share of the threads (tests/conftest.py); more than eight would mostly start up
WORKERS ?= -n auto --maxprocesses=8 --dist=worksteal

test: $(VENV)/built
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_FLAGS)

test-all: $(VENV)/built
	QUANT_OPS_TEST_ALL=1 $(BIN)/python -m pytest $(WORKERS) -m "" $(PYTEST_FLAGS)

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/operators $(PYTEST_FLAGS)
	$(BIN)/python -m benchmarks.packages.linear
	$(BIN)/python -m benchmarks.packages.weight_only
	$(BIN)/python -m benchmarks.packages.conv2d
	$(BIN)/python -m benchmarks.packages.models
	$(BIN)/python -m benchmarks.packages.networks
	$(BIN)/python -m benchmarks.packages.generation

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Any warning is an error: a link that leads nowhere, a name without a reference, a docstring that does not fit its function.
site: $(VENV)/built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The compiler is looked for when this runs; without one cmake says what is missing.
cuda-build: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cuda -G Ninja -DQUANT_OPS_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cuda --target quant_ops_cuda

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# Three steps: pip runs when pyproject.toml has changed, and an edit of the C++ compiles what includes it and nothing else. Ranges and
# pins are in pyproject.toml; torch is pinned here because a bare "torch" may bring gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet scikit-build-core pybind11 cmake ninja
	touch $@

$(INSTALLED): $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,dev,docs]" "$(TORCH)"
	rm -f build/editable/.installed-*
	touch $@

$(VENV)/built: $(INSTALLED) $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/editable
	PATH="$(abspath $(BIN)):$$PATH" cmake --install build/editable \
	  --prefix "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
	touch $@

clean:
	rm -rf build $(VENV)
