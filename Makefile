# Everything runs in a virtual environment of its own; versions come from requirements.lock.
#   make demo   make test   make test-gpu   make lint   make build   make benchmark

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock
# What a user needs, and what tests and checks need beside it. Python compiles a module when it is first imported; compiling
# all of them would take longer than the rest of the installation.
USER_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# The CPU and GPU wheels of ONNX Runtime overwrite one another: take the one that fits this machine.
RUNTIME := $(if $(wildcard /proc/driver/nvidia/version),gpu,cpu)
BENCHMARK ?= kshot

.PHONY: install-runtime demo test test-gpu lint build benchmark lock clean

$(USER_STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --editable '.[$(RUNTIME)]'
	touch $@

$(DEV_STAMP): $(USER_STAMP)
	$(PIP) --no-compile --editable '.[$(RUNTIME),dev]'
	touch $@

# The same for a site, with the package itself installed and not linked to this folder; a step of the Dockerfile.
install-runtime:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '.[$(RUNTIME),cluster]'

demo: $(USER_STAMP)
	$(BIN)/fseft-edge demo --output demo

# One process for each core, at most four: each takes up to 2 GB.
test: $(DEV_STAMP)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# Tests that need an NVIDIA GPU; `make test` skips them on a machine without one.
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

# One of the scripts in benchmarks/, e.g. `make benchmark BENCHMARK=speed`; those on real CT need FSEFT_EDGE_DATA.
benchmark: $(DEV_STAMP)
	$(BIN)/python benchmarks/$(BENCHMARK).py

# New exact versions, after pyproject.toml has changed: resolves afresh in a throw-away environment.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --editable '.[cpu,dev]' 'torch==2.13.0'
	{ echo '# Exact versions that the Makefile installs; made by `make lock`.'; \
	  build/lock/bin/pip freeze --exclude-editable | sed -e 's/+cpu$$//' -e 's/^onnxruntime==\(.*\)/&\nonnxruntime-gpu==\1/'; } > requirements.lock

clean:
	rm -rf $(VENV) build dist demo
