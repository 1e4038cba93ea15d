# All targets use their own virtual environment. requirements.lock sets the exact versions of the packages.
#   make demo   make test   make test-gpu   make lint   make build   make benchmark

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock
# USER_STAMP: the packages that a user needs are installed. DEV_STAMP: the packages for tests and checks are installed too.
# pip does not compile the modules (--no-compile), because this would take longer than the rest of the installation. Python
# compiles each module when the module is first imported.
USER_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# The CPU wheel and the GPU wheel of ONNX Runtime write the same files, so only the wheel for this machine is installed.
RUNTIME := $(if $(wildcard /proc/driver/nvidia/version),gpu,cpu)
BENCHMARK ?= kshot
# Some environments forbid Python to write compiled modules. Every process would then compile PyTorch again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install-runtime demo test test-gpu lint build benchmark lock clean

$(USER_STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --editable '.[$(RUNTIME)]'
	touch $@

$(DEV_STAMP): $(USER_STAMP)
	$(PIP) --no-compile --editable '.[$(RUNTIME),dev]'
	touch $@

# Installs the packages for a site. The environment contains a copy of fseft-edge and no link to this folder. The Dockerfile
# uses this target.
install-runtime:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '.[$(RUNTIME),cluster]'

demo: $(USER_STAMP)
	$(BIN)/fseft-edge demo --output demo

# The tests run in one process for each core, in at most four processes. Each process needs up to 2 GB of memory.
test: $(DEV_STAMP)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# Runs the tests that need an NVIDIA GPU. `make test` skips these tests on a machine without a GPU.
test-gpu: $(DEV_STAMP)
	$(BIN)/pytest -m gpu

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/wheel build/tree
	$(BIN)/python -m build --wheel --outdir build/wheel . > build.log 2>&1 || { cat build.log; exit 1; }
	rm -f build.log
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/tree
	cp pyproject.toml build/tree/
	cd build/tree && MYPYPATH=. $(abspath $(BIN))/mypy --config-file pyproject.toml -p fseft_edge

build: $(DEV_STAMP)
	$(BIN)/python -m build --outdir dist .

# Runs one script of benchmarks/, e.g. `make benchmark BENCHMARK=speed`. Scripts that use real CTs need FSEFT_EDGE_DATA.
benchmark: $(DEV_STAMP)
	$(BIN)/python benchmarks/$(BENCHMARK).py

# Writes new exact versions into requirements.lock. Use this target after a change of pyproject.toml. pip resolves all
# versions again in a temporary environment.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --editable '.[cpu,dev]' 'torch==2.13.0'
	{ echo '# Exact versions that the Makefile installs; made by `make lock`.'; \
	  build/lock/bin/pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e 's/^onnxruntime==\(.*\)/&\nonnxruntime-gpu==\1/'; } > requirements.lock

clean:
	rm -rf $(VENV) build dist demo
