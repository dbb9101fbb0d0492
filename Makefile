# From a bare clone: `make demo` or `make test`. Everything goes into .venv, and re-running is quick.
#
#   make demo       lesions of a trained ResNet: a table, a figure and a Parquet file
#   make test       ruff, mypy, pytest without the slow tests; make test-all with them
#   make bench      pytest-benchmark suites
#   make lint       ruff and mypy only
#   make build      the compiled extension only (RESENS_FAST_CUDA=1/0 as in setup.py)
#   make clean      everything that was built; rm -rf .venv for the rest
#
# PYTHON=...        the Python to start from (3.10 or newer)
# VENV=0            use that Python and its torch as they are: only packages that are missing are installed into it
# Installations follow pip's own settings, so PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives a small torch.

PYTHON ?= python3
VENV ?= 1
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test test-all bench lint build clean FORCE

ifeq ($(VENV),0)
PY := $(shell command -v $(PYTHON))
else
PY := .venv/bin/python
endif
# One folder of stamps per Python, so that changing it is noticed.
STAMPS := .stamps/$(subst /,_,$(abspath $(PY)))
# With VENV=0 the package runs from this folder and is not installed, in order not to replace another checkout.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Small tensors: with 2 threads on 2 cores the tests took 1.2 to 2.5 times as long, waiting for each other.
TEST_THREADS ?= 1
RESENS := $(PY) -c "import sys; sys.argv[0] = 'resens'; from resens_fast.cli import main; main()"
PIP := $(PY) -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

demo: build
	@$(RESENS) demo

lint: $(STAMPS)/installed
	@$(PY) -m ruff check .
	@$(PY) -m mypy

# pytest comes last, so that its closing line is the last one.
test: build lint
	@OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest

test-all: build lint
	@OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -m "slow or not slow"

bench: build
	@$(PY) -m pytest benchmarks/ --benchmark-only

build: $(STAMPS)/built

# _build.json is there too because another Python builds into the same folder.
$(STAMPS)/built: $(CSRC) setup.py $(STAMPS)/torch .stamps/last $(if $(wildcard resens_fast/_build.json),,FORCE)
	@set -o pipefail; mkdir -p build; echo "building the extension (the compilers' output is in build/log.txt)"; \
	if ! $(PY) setup.py -q build_ext --inplace > build/log.txt 2>&1; then \
	  tail -n 40 build/log.txt; echo "the extension cannot be built; see above and build/log.txt" >&2; exit 2; fi; \
	grep -E '^(\*\*\* )?resens_fast: ' build/log.txt
	@touch $@

# Changes when another Python, the same one with another torch, or another kind of build is used.
$(STAMPS)/torch: $(STAMPS)/installed FORCE
	@$(PY) -c "import importlib.metadata as m, sys; print(sys.version, m.version('torch'))" > $@.new
	@echo "$$RESENS_FAST_CUDA $$RESENS_FAST_EXTENSION $$TORCH_CUDA_ARCH_LIST $$CXX" >> $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

.stamps/last: FORCE
	@mkdir -p .stamps; echo '$(STAMPS)' > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# Resumes where it stopped: what is installed is not asked for again, and torch, the largest, comes first.
# Whatever is present is pinned, so that pip changes nothing.
$(STAMPS)/installed: pyproject.toml .ci/missing.py | $(STAMPS)/python
	@$(PIP) list --format=freeze --exclude resens-fast > $(STAMPS)/present.txt
	@set -e; for names in "setuptools wheel ninja" "torch torchvision" ""; do \
	  $(PY) .ci/missing.py $$names > $(STAMPS)/missing.txt; \
	  if [ -s $(STAMPS)/missing.txt ]; then \
	    echo "installing:" $$(cat $(STAMPS)/missing.txt); \
	    $(PIP) install -q -c $(STAMPS)/present.txt -r $(STAMPS)/missing.txt; fi; done
ifneq ($(VENV),0)
	@RESENS_FAST_EXTENSION=0 $(PIP) install -q --no-build-isolation --no-deps -e . > $(STAMPS)/log.txt 2>&1 \
	  || { cat $(STAMPS)/log.txt >&2; exit 2; }
endif
	@touch $@

$(STAMPS)/python:
ifeq ($(PY),)
	@echo "there is no Python called $(PYTHON); name one with make PYTHON=..." >&2; exit 2
endif
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "resens_fast needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another with make PYTHON=..." >&2; exit 2; }
ifneq ($(VENV),0)
	@$(PY) -m pip --version > /dev/null 2>&1 || { echo "creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@$(PIP) install -q --upgrade "pip>=23" "setuptools>=77" wheel
endif
	@mkdir -p $(STAMPS); touch $@

clean:
	rm -rf build dist .stamps *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f resens_fast/_C*.so resens_fast/_build.json
