# A newcomer's two commands: `make demo` and `make test`. Both make their own environment.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/trained      ## plan for this machine, train on real English, generate, receipt (3 minutes)
	$(BIN)/snugpt demo

test: check                ## ruff, mypy, pytest in two processes, a file of tests to each in turn
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/developed
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

# The CPU build of torch is enough for both; with torch already there pip leaves it alone.
$(VENV)/trained: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/developed: $(VENV)/trained
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:                     ## remove the environment and what the tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
