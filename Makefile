# Everything runs in the project's own virtual environment, .venv; each target makes it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full test-gpu check venv clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cogtune needs Python 3.11 or newer; name one with make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "torch>=2.8" setuptools
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Draw clips, encode them, train a LoRA on the built-in model, export it, generate with it.
demo: venv
	$(BIN)/python -m cogprep.demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	@mkdir -p build/names && for side in common prep train; do ln -sfn ../../$$side build/names/cog$$side; done
	$(BIN)/mypy

test: check
	$(BIN)/pytest -m "not gpu and not full"

test-full: check
	$(BIN)/pytest -m "not gpu"

test-gpu: venv
	$(BIN)/pytest -m gpu

clean:
	rm -rf .venv build demo *.egg-info
