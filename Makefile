# These targets need nothing but Python 3.11 or newer; the first of them installs everything into .venv.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores, since many tests wait for processes of their own
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo check test thorough lint docs lock clean

demo: .venv/installed
	$(BIN)/fedunlearn demo

# The quick loop: no Ray, no process of its own
check: .venv/installed lint
	$(PYTEST) -m "not ray and not slow and not thorough"

test: .venv/installed lint
	$(PYTEST) -m "not thorough"

# Further cases of tests that take long: before a release, and after a change of what they are about
thorough: .venv/installed
	$(PYTEST) -m thorough

lint: .venv/installed
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry --no-ansi .
	$(BIN)/pyright --project pyproject.toml

# The pages as a site, in build/site/index.html; tables that the code makes are renewed first
docs: .venv/installed
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# plain pip may pick a torch beside which torchvision cannot be imported; uv installs the pair that is pinned.
# `--torch-backend=auto` takes the build of torch for this machine: without a GPU one without CUDA, which is far smaller.
# Where the index of these builds cannot be reached, everything comes from the usual one.
# Compiled once here, since where Python writes no bytecode every process would compile torch's sources for itself
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	mkdir -p build
	grep -vE '^(cuda-|nvidia-|triton=)' requirements.lock > build/requirements.txt
	UV_HTTP_RETRIES=1 $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		--torch-backend=auto --requirements build/requirements.txt 2> /dev/null \
		|| $(BIN)/python -m uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

lock:
	$(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate \
		--upgrade --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv build *.egg-info
