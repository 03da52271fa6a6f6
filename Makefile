.PHONY: install test test-all lint typecheck format ci

install:
	pip install -e '.[dev]'

test:
	python -m pytest -m "not slow"

test-all:
	python -m pytest

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

typecheck:
	pyright --pythonpath "$$(command -v python)"

ci:
	bash .ci/run
