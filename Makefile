# make demo and make test work on a fresh machine with Python 3.11+ and nothing else prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := build/e2e-sql-14m

.DEFAULT_GOAL := help
.PHONY: help install demo test mac-report lint fix dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/installed ## make .venv with the package and its tests

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(DEMO_MODEL)/config.json: $(VENV)/installed
	rm -rf $(DEMO_MODEL)
	$(BIN)/mlx-specstream convert --hf-path examples/models/e2e-sql-14m-4bit --mlx-path $(DEMO_MODEL) --dequantize --dtype float32

demo: $(DEMO_MODEL)/config.json ## the same text in fewer passes, on the bundled model
	$(BIN)/python examples/demo.py --model $(DEMO_MODEL) --streams examples/streams/e2e-sql-14m

test: $(VENV)/installed ## run the tests
	$(BIN)/python -m pytest

mac-report: $(DEMO_MODEL)/config.json ## tests, tune and bench in one report to share (MODEL=..., STREAMS=... for your own model)
	$(BIN)/python benchmarks/mac_report.py --bundled $(DEMO_MODEL) $(if $(MODEL),--model '$(MODEL)') $(if $(STREAMS),--streams '$(STREAMS)')

lint: $(VENV)/installed ## check style
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[lint]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

fix: $(VENV)/installed ## mend style
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[lint]'
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

dist: $(VENV)/installed ## build the wheel, install it in a clean environment and try it
	rm -rf dist build/dist-check
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/dist-check
	build/dist-check/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && dist-check/bin/mlx-specstream --version
	cd build && dist-check/bin/python -c "from mlx_specstream.converters import convert; print(convert)"

clean: ## remove what these targets made
	rm -rf $(VENV) build dist *.egg-info
