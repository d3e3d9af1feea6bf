# Every target first creates .venv if it is missing or out of date.
#   make demo    train on MovieLens-100k with all three hooks; print results and plot the run
#   make serve-demo  serve the demo's model by HTTP (train it first if need be), and ask for scores
#   make test    run the tests (those that need a GPU only if CUDA is available)
#   make test-all  run the tests that take minutes too
#   make check   run ruff, mypy and import-linter
#   make fuzz    look for faults with random calls, damaged files, interrupts and kills (MINUTES=10)
#   make docs    build the manual into outputs/docs; a warning is an error
#   make bench   run every benchmark, then print one table and draw one chart of the results
#   make clean   remove caches and outputs of runs (not .venv, not downloaded data)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Peers of the benchmarks, and what they need. --no-deps: they must not change torch's version.
PEERS := fbgemm-gpu-cpu==1.8.0 ninja torchrec==1.9.2 tensordict pyvers orjson cloudpickle iopath \
	portalocker pyre-extensions typing-inspect mypy-extensions importlib-metadata zipp
# Many tests start processes of their own: no more than four workers. The quick tests run a worker more than cores, since
# a quarter of their time is waiting; those that kill runs count seconds, and are not crowded.
# Bytecode is kept, or each process that a test starts would compile the package anew.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --maxprocesses 4 --dist worksteal
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# How long and from which seed on "make fuzz" looks for faults.
MINUTES ?= 10
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo serve-demo test test-all check fuzz docs bench clean venv

help:
	@sed -n 's/^#   //p' Makefile

venv: $(STAMP)

# torch is installed first: without an NVIDIA GPU the CPU-only wheel is enough, and much smaller.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The pinned environment needs Python 3.11 or newer; set it with: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: installing torch $(TORCH) with CUDA"; \
	  $(PIP) install --quiet "torch==$(TORCH)"; \
	elif $(PIP) install --quiet "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  echo "No NVIDIA GPU: installed torch $(TORCH)+cpu"; \
	else \
	  echo "No NVIDIA GPU, and pip's indexes offer no torch $(TORCH)+cpu: installing the default"; \
	  echo "wheel, which may include several GB of CUDA libraries. To avoid that, set"; \
	  echo "PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels."; \
	  $(PIP) install --quiet "torch==$(TORCH)"; \
	fi
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,examples]"
	@touch $(STAMP)

demo: $(STAMP)
	@TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -m examples.deepfm.demo

serve-demo: $(STAMP)
	@TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -m examples.serving.demo

test: $(STAMP)
	$(PYTEST) --numprocesses $(shell expr $(CORES) + 1) -m "not slow"

test-all: $(STAMP)
	$(PYTEST) --numprocesses auto -m "slow or not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Exits with an error if anything did not hold; what it prints says how to repeat that.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

# What only the manual needs is installed when it is first built.
$(VENV)/.docs: $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# A benchmark prints a message and continues if a peer is missing. If a benchmark fails (a wrong
# result or a missed target), the others still run.
bench: $(STAMP)
	@for peer in $(PEERS); do $(PIP) install --quiet --no-deps "$$peer" || \
	  echo "$$peer cannot be installed: its part is skipped"; done
	@failed=; for bench in benchmarks/bench_*.py; do echo "== $$bench"; \
	  $(BIN)/python $$bench || failed="$$failed $$bench"; done; \
	$(BIN)/python -m benchmarks.summary || failed="$$failed summary"; \
	if [ -n "$$failed" ]; then echo "exited with an error:$$failed"; exit 1; fi

clean:
	rm -rf build dist outputs timeline lightning_logs checkpoints
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find recis_lightning tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
