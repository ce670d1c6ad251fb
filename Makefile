# Two commands for everybody: `make train` and `make test`. Both make the environment first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEPENDENCIES := pyproject.toml constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: train test test-all check docs clean

# Two ResNet-20, co-trained with MFEF on the embedded digits: 10 epochs.
train: $(VENV)/.core
	$(BIN)/codistill train mfef --networks resnet20 resnet20 --data digits --epochs 10 --batch-size 64

# The first tier, with style and types checked beside the tests; what they say is shown when they fail.
# A worker for each core, and one thread in each: more would wait for each other. What is imported is compiled once, and
# not in each of the processes that tests start.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory check > $(VENV)/check.log 2>&1 & \
	  $(PYTEST) -m 'not slow'; tests=$$?; \
	  wait $$!; checks=$$?; test $$checks = 0 || { echo 'make check has failed:'; cat $(VENV)/check.log; }; \
	  exit $$((tests || checks))

# Both tiers, and fuzz tests with their whole budget.
test-all: check
	CODISTILL_FUZZ_EXAMPLES=full $(PYTEST)

# Style and types.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(DEPENDENCIES) | $(BIN)/python
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/.dev: $(DEPENDENCIES) | $(BIN)/python
	$(PIP_INSTALL) '.[dev]'
	@touch $(VENV)/.core $@

# The docs as a site in site/.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf $(VENV) build site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
