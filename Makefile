PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format bench check-gpu check-gpu-offline check-clients check-openapi soak setup clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# One process more than processors: some tests wait for a clock.
WORKERS := $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4)))

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/throughput.py

check-gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[serve,dev,cuda12]"
	$(BIN)/python benchmarks/check_gpu.py

check-gpu-offline:
	$(PYTHON) benchmarks/check_gpu_offline.py

CLIENTS := .cache/clients
CLIENT_PACKAGES := openai anthropic openai-agents langchain-openai "pydantic-ai-slim[openai]" litellm mcp "lm-eval[api]" torch==2.13.0

check-clients: $(STAMP)
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check $(CLIENT_PACKAGES)
	$(BIN)/python examples/clients/run.py --python $(CURDIR)/$(CLIENTS)/bin/python

FUZZ := .cache/fuzz

check-openapi: $(STAMP)
	test -x $(FUZZ)/bin/python || $(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check "schemathesis>=4"
	$(BIN)/python benchmarks/check_openapi.py --schemathesis $(FUZZ)/bin/schemathesis

soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[serve,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
