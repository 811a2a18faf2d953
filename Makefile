# make sample: install, and sample 16 pictures from the embedded model
# make test:   install for development, then lint, types and every test
# make aot:    compile every Triton kernel for sm_80 and sm_90; fails on a spill. WRITE=1: kernels/RESOURCES.md
# make sanitize: the C++ ops under AddressSanitizer and UBSan, with their tests
# Needs Python 3.11 or later, make, a C++ compiler and a package index; nothing outside this folder changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODULES := $(sort $(shell find dar_fast kernels train -name '*.py'))
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*) $(VENV)/.modules
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sample test lint types aot sanitize clean always
.DELETE_ON_ERROR:

sample: $(VENV)/.installed
	$(BIN)/dar sample -n 16 --seed 0 --out samples.png --animate samples.webp

test: lint types
	$(BIN)/pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/csrc/*

types: $(VENV)/.installed-test
	$(BIN)/mypy

aot: $(VENV)/.installed-test
	env -u TRITON_INTERPRET $(BIN)/python bench/aot.py $(if $(WRITE),--write)

sanitize: $(VENV)/.installed-test
	PYTHON=$(BIN)/python .ci/sanitize

clean:
	rm -rf $(VENV) build dist samples.png samples.webp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python >= 3.11, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# an editable install knows the modules there were: a new or moved one installs again, an edit does not
$(VENV)/.modules: always | $(BIN)/python
	@echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' > $@

$(VENV)/.installed: $(BUILT_FROM) | $(BIN)/python
	@echo "installing into $(VENV): minutes the first time, most of it PyTorch"
	$(INSTALL) -e .
	@$(BIN)/python -c 'from dar_kernels.native import missing as m; m() and print("C++ ops:", m())'
	@touch $@

# the tests hold the C++ ops to the PyTorch ones, so here a missing compiler is an error
$(VENV)/.installed-test: $(BUILT_FROM) | $(BIN)/python
	@echo "installing into $(VENV): minutes the first time, most of it PyTorch"
	$(INSTALL) -C cmake.define.DAR_NATIVE=ON -e '.[train,dev]'
	@touch $@ $(VENV)/.installed
