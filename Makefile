# Every target sets itself up. PYTHON is the interpreter that the virtual environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := packages/core packages/hf-plugin packages/diffusers-plugin packages/vision-plugin
GPU := $(shell nvidia-smi -L 2>/dev/null | grep GPU)
CONSTRAINTS := $(if $(GPU),,-c .github/constraints-cpu.txt)
PIP := $(BIN)/python -m pip install $(CONSTRAINTS)

.PHONY: install demo test bench lint types wheels bump
.DEFAULT_GOAL := install

install: $(STAMP)

# torch goes first and pinned: resolved together with the rest, it may come as its CUDA build.
$(STAMP): pyproject.toml $(PACKAGES:%=%/pyproject.toml) packages/core/src/offramp/_version.py .github/constraints-cpu.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"
	$(PIP) torch torchvision
	$(PIP) --group dev $(PACKAGES:%=-e %)
	$(if $(GPU),,$(BIN)/python tests/assets/cpu_only/torchvision_cpu_ops.py)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/offramp demo lm --out demo

test: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/offramp bench kernels --results tests/bench/results
	$(BIN)/offramp bench overhead --results tests/bench/results
	$(BIN)/offramp bench lm

lint: $(STAMP)
	$(BIN)/ruff check packages tests

types: $(STAMP)
	$(BIN)/mypy

wheels: $(STAMP)
	rm -rf dist
	set -e; for package in $(PACKAGES); do $(BIN)/python -m build --wheel --no-isolation --outdir dist $$package; done
	$(BIN)/python tests/assets/check_wheels.py dist

MAJOR = $(word 1,$(subst ., ,$(VERSION)))
MINOR = $(word 2,$(subst ., ,$(VERSION)))
RANGE = offramp-core>=$(MAJOR).$(MINOR),<$(MAJOR).$(shell expr $(MINOR) + 1)

bump:
	@test -n "$(MAJOR)" -a -n "$(MINOR)" || { echo "say which: make bump VERSION=0.2.0"; exit 2; }
	echo '__version__ = "$(VERSION)"' > packages/core/src/offramp/_version.py
	for f in packages/*-plugin/pyproject.toml; do sed -E 's/offramp-core>=[0-9.]+,<[0-9.]+/$(RANGE)/' $$f > $$f.new && mv $$f.new $$f; done
	$(MAKE) install
