.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LISTEN := $(or $(FRONTDESK_LISTEN),127.0.0.1:50051)
DATA := $(or $(FRONTDESK_DATA_DIR),.data)
PROTOS = $(shell find protos/clinic protos/buf -name '*.proto' | sort)

.PHONY: help install run test check format lint types buf generated generate bench scale soak image lock clean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: requirements-dev.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

install: $(VENV)/installed ## Make the virtual environment with the locked dependencies

run: install ## Serve on FRONTDESK_LISTEN (127.0.0.1:50051) with a demo clinic, on an embedded PostgreSQL in .data
	$(BIN)/frontdesk serve --listen $(LISTEN) --data-dir $(DATA) --demo

test: install ## Run the tests against real servers and a real PostgreSQL
	$(BIN)/python -m pytest

check: install format lint types buf generated $(if $(SKIP_TESTS),,test) ## Everything that CI demands

format: install ## Is every file formatted?
	$(BIN)/ruff format --check .

lint: install ## Is the code free of known mistakes?
	$(BIN)/ruff check .

types: install ## Do the types agree?
	$(BIN)/mypy

buf: install ## Are the protos formatted, clean and compatible with the last release?
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf lint
	@if git rev-parse -q --verify refs/tags/v0.1.0 >/dev/null; then $(BIN)/buf breaking --against '.git#tag=v0.1.0'; fi

generate: install ## Make generated/ from protos/
	rm -rf generated && mkdir generated
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=generated --mypy_out=quiet:generated \
		--grpc_python_out=generated --mypy_grpc_out=quiet:generated $(PROTOS:protos/%=%)

generated: generate ## Does generated/ follow from protos/?
	git diff --exit-code --stat -- generated
	@test -z "$$(git status --porcelain -- generated)" || { git status --short -- generated; exit 1; }

bench: install ## Measure against the floor; prints a table and writes bench.json
	$(BIN)/python -m benchmarks.bench

scale: install ## Measure with up to ten million appointments and ten thousand watchers (DIR=… keeps the data); writes scale.json
	$(BIN)/python -m benchmarks.scale $(if $(DIR),--data $(DIR))

soak: install ## Play long: the model of the clinic, hostile requests, and histories under faults (SEED=1 MINUTES=10)
	$(BIN)/python -m pytest tests/test_model.py tests/fuzz --hypothesis-profile=soak
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then $(BIN)/python -m tests.fuzz.decode_atheris -max_total_time=120; fi
	$(BIN)/python -m tests.history --seed $(or $(SEED),1) --minutes $(or $(MINUTES),10)

image: ## Build the container image frontdesk:latest
	docker build --tag frontdesk:latest .

lock: install ## Renew requirements.txt (the service) and requirements-dev.txt (with its tools) from pyproject.toml
	$(COMPILE) --output-file requirements.txt pyproject.toml
	$(COMPILE) --extra dev --output-file requirements-dev.txt pyproject.toml

COMPILE = $(BIN)/python -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --no-header

clean: ## Remove what make has made, the data in .data included
	rm -rf $(VENV) .data .pytest_cache .mypy_cache .ruff_cache .hypothesis
