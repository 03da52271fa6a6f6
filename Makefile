.PHONY: audit docs install test test-all gpu lint typecheck format ci

install:
	pip install -e '.[dev]'

test:
	python -m pytest

test-all:
	python -m pytest -m ""

gpu: # WHEELS=FOLDER for what the machine lacks, OUT=FOLDER for the results, PART="tests full_size" for these alone
	python -m benchmarks.gpu_suite $(if $(WHEELS),--wheels "$(WHEELS)") $(if $(OUT),--out "$(OUT)") \
		$(if $(PART),--parts $(PART)) $(if $(ARGS),--args="$(ARGS)")

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

audit: # known vulnerabilities, where there is a network, and a bill of materials; pip install -e '.[audit]' first
	bash .ci/audit

docs: # the pages of every config field, from the dataclasses
	python -m rlcm_fast.config.reference docs
