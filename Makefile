# `make demo`, `make test` and `make docs` need Python 3.11 or newer with pip, and set up the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-cuda test-torch fuzz lint docs package clean

demo: $(VENV)/demo
	$(BIN)/python -m examples.digits

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

# The core tests on other releases, as in `make test-torch TORCH=2.6.0`.
test-torch:
	@test -n "$(TORCH)" || { echo "TORCH must name releases, as in TORCH=2.6.0"; exit 2; }
	PYTHON=$(PYTHON) tools/test_releases.sh $(TORCH)

# On a machine with a CUDA GPU, where pip brings a torch for it.
test-cuda: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/extra/test_cuda.py

fuzz: $(INSTALLED)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests -m properties

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The site, in build/site. Warnings are errors: broken links, unknown names, missing pages.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# Builds wheel and sdist, checks what is in them and what they say, installs the wheel alone into an
# empty environment, and uses it there.
package: $(INSTALLED)
	rm -rf dist build/wheel
	$(BIN)/python -m build
	$(BIN)/python tools/check_dist.py
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd build && wheel/bin/python ../tools/use_wheel.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,docs]"
	touch $@ $(VENV)/demo

# The demonstration needs less, and less time.
$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
