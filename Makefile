PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= runs/clm
SERVICE ?= pypi

TOOLS := build/tools
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install lock audit test coverage demo lint types docs clean

install: .venv/installed

# torch comes last: what it needs is then there, from the lock
.venv/installed: pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --require-hashes --no-deps -r requirements.lock
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	$(PIP) check
	touch $@

# For Python 3.11.5 and later; keeps the versions that fit, `make lock UPGRADE=--upgrade` takes the newest.
lock: $(TOOLS)/installed
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra dev --constraint constraints.txt $(UPGRADE) --quiet \
		--universal --python-version 3.11.5 --fork-strategy fewest --generate-hashes --no-emit-package torch \
		--no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock

# Needs the network; --strict: a package that could not be looked up is a failure. SERVICE=osv asks another service.
audit: $(TOOLS)/installed
	$(TOOLS)/bin/pip-audit --strict --progress-spinner off --vulnerability-service $(SERVICE) \
		--require-hashes --disable-pip -r requirements.lock

$(TOOLS)/installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	touch $@

test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Branches of hf_pc/ that the tests go through, in every process that they start; fails under 95%.
coverage: install
	$(BIN)/coverage erase
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

demo: install
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/run_clm_pc.py --output_dir $(OUTPUT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv runs build dist
