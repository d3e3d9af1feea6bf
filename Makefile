# Every target sets up .venv first; a second call finds the stamp and starts at once.
#   make demo    train MovieLens-100k with all three hooks and show what came of it
#   make test    the tests that need no GPU (and the GPU ones where CUDA is present)
#   make check   ruff, mypy, import-linter
#   make bench   every benchmark, then one table and one picture; see benchmarks/results/
#   make clean   remove caches and what runs leave behind (not .venv, not downloaded data)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# What benchmarks compare with and need to build it; --no-deps: they must not move torch.
PEERS := fbgemm-gpu-cpu==1.8.0 ninja torchrec==1.9.2 tensordict pyvers orjson cloudpickle iopath \
	portalocker pyre-extensions typing-inspect mypy-extensions importlib-metadata zipp
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean venv

help:
	@sed -n 's/^#   //p' Makefile

venv: $(STAMP)

# torch comes first: without an NVIDIA GPU the CPU-only wheel is enough, and much smaller.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The pinned environment needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: installing torch $(TORCH) with CUDA"; \
	  $(PIP) install --quiet "torch==$(TORCH)"; \
	elif $(PIP) install --quiet "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  echo "No NVIDIA GPU: installed torch $(TORCH)+cpu"; \
	else \
	  echo "No NVIDIA GPU, and pip's indexes offer no torch $(TORCH)+cpu: installing the default"; \
	  echo "wheel, which may bring several GB of CUDA libraries. To avoid that, name PyTorch's CPU"; \
	  echo "wheel index in PIP_EXTRA_INDEX_URL."; \
	  $(PIP) install --quiet "torch==$(TORCH)"; \
	fi
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,examples]"
	@touch $(STAMP)

demo: $(STAMP)
	@TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -m examples.deepfm.demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A benchmark says so when a peer is missing, and goes on; one that exits 1 (a wrong result or a
# missed target) does not keep the others from running.
bench: $(STAMP)
	@for peer in $(PEERS); do $(PIP) install --quiet --no-deps "$$peer" || \
	  echo "$$peer cannot be installed: its part is left out"; done
	@failed=; for bench in benchmarks/bench_*.py; do echo "== $$bench"; \
	  $(BIN)/python $$bench || failed="$$failed $$bench"; done; \
	$(BIN)/python -m benchmarks.summary || failed="$$failed summary"; \
	if [ -n "$$failed" ]; then echo "exited with an error:$$failed"; exit 1; fi

clean:
	rm -rf build dist outputs timeline lightning_logs checkpoints
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find recis_lightning tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
