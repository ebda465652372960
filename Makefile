PYTHON ?= python

.PHONY: check lint types test bench

check: lint types

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m pyright --pythonpath $(shell command -v $(PYTHON))

test:
	$(PYTHON) -m pytest
	$(PYTHON) -m pytest -m slow

bench:
	$(PYTHON) -m bench
