# Two commands set everything up:  make demo  runs the quickstart,  make test  runs the tests.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers share two cores: one thread each, so that no library spins against another.
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench claims mutations schema protos lint-protos images-check clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# torch first and alone, at the version constraints.txt names: the CPU build where one is on offer.
$(BIN)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; say which: make PYTHON=python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,deploy,export,edge,timm,dev]'
	@touch $@

install: $(BIN)/.installed  ## make the environment in .venv and install everything

demo: install  ## run the quickstart scenario and say where its report is
	$(BIN)/trellis run scenarios/quickstart.yaml

test: install  ## lint and run the tests
	$(MAKE) lint
	$(BIN)/python -m pytest -q

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow --timeout 1800


lint: install  ## format, rules, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## mend what can be mended by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install  ## overhead against a bare loop, Flower's simulation and growing federations
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/flower_simulation.py
	$(BIN)/python benchmarks/edge_runtime.py

mutations: install  ## switch each protection off in a copy: a test must fail (ten minutes)
	$(BIN)/python tools/mutations.py

claims: install  ## what the papers claim, measured at small scale: all (hours), or PAPER=cutmix
	$(BIN)/python benchmarks/claims $(PAPER)

schema: install  ## write the JSON Schema of scenario files
	$(BIN)/trellis schema > docs/scenario.schema.json

lint-protos:  ## the rules of buf on the protocols; needs npx
	cd protos && npx --yes @bufbuild/buf lint

protos: install  ## write the code of the protocols in protos/
	$(BIN)/python protos/generate.py

images-check: install  ## build the container images and run fleets from them: needs an engine, see docs/deploy.md
	$(BIN)/python docker/check.py $(CHECK)

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
