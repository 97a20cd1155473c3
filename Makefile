# Development commands; `make` lists them. `make demo` and `make test` need only Python 3.11+ and g++:
# the first run creates .venv and installs everything that requirements/dev.txt pins.

PYTHON ?= python3
DEMO ?= flights
TESTS ?= tests
# Two processes side by side, each with one thread; tests that need several threads ask for them.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n $(or $(JOBS),2) --dist worksteal
# The tests that drive the C++ kernels.
SANITIZE_TESTS ?= tests/test_row.py tests/test_row_memory.py tests/test_gated.py \
  tests/test_gated_memory.py tests/test_channel.py tests/test_channel_memory.py \
  tests/test_channel_values.py tests/test_dropout.py tests/test_memory.py \
  tests/test_add_norm.py tests/test_gate.py tests/test_shortcut.py
BIN := .venv/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(CSRC) $(wildcard tests/cuda/emulation/*.h)
EXTENSION := fused/_C.abi3.so

.PHONY: help setup demo test test-all lint format bench audit sanitize clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(EXTENSION) ## create .venv, install the dependencies, build the C++ kernels

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv .venv

.venv/.requirements: requirements/dev.txt | $(BIN)/python
	$(BIN)/pip install --no-compile -r requirements/dev.txt
	@touch $@

# Without the C++ kernels, which the next rule builds with visible progress.
.venv/.installed: pyproject.toml setup.py .venv/.requirements
	FUSED_NO_EXT=1 $(BIN)/pip install --no-build-isolation --no-deps -e .
	@touch $@

$(EXTENSION): $(CSRC) setup.py fused/backends/schemas.py .venv/.installed
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup ## train on real data, fused against plain torch (DEMO=flights or transformer)
	$(BIN)/python examples/$(DEMO).py

test: setup ## run the tests (TESTS=tests/test_x.py for a part, JOBS=n processes)
	$(PYTEST) $(TESTS)

test-all: setup ## run every test: whole products, cold audit, all examples and wheels
	$(PYTEST) -m "" $(TESTS)

lint: setup ## ruff, mypy on the package as installed, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy does not see the folder mapping of an editable install, so it gets the files as installed.
	rm -rf .cache/mypy-site && mkdir -p .cache/mypy-site
	cp -pR fused .cache/mypy-site && cp -pR kernels .cache/mypy-site/fused
	cd .cache/mypy-site && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p fused
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: setup ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: setup ## measure against eager and torch.compile
	$(BIN)/python -m bench --max-autotune

audit: setup ## compile every GPU kernel for five targets, read the binaries, hold them to the gates
	$(BIN)/python -m bench.audit

# libstdc++ is preloaded because libasan must find it before torch does; torch itself leaks by
# design. The root must not be on sys.path (so pytest, not python -m pytest), or ./fused would win.
# --capture=sys lets the sanitizers' own messages through.
sanitize: SANITIZERS := $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell g++ -print-file-name=$(lib)))
sanitize: setup ## run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf .cache/sanitize build/lib*
	FUSED_SANITIZE=address,undefined $(BIN)/pip install -v --no-build-isolation --no-deps --target .cache/sanitize . 2>&1 | grep fused-lnad:
	@test -e .cache/sanitize/$(EXTENSION)
	PYTHONPATH=.cache/sanitize LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/pytest --capture=sys -m "not gpu" $(SANITIZE_TESTS)

clean: ## remove what the other targets have made, except .venv
	rm -rf build dist .cache *.egg-info $(EXTENSION) fused/*.missing .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
