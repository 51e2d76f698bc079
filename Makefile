.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := $(VENV)/supply
LISTEN := $(or $(FRONTDESK_LISTEN),127.0.0.1:50051)
DATA := $(or $(FRONTDESK_DATA_DIR),.data)
PROTOS = $(shell find protos/clinic protos/buf -name '*.proto' | sort)

.PHONY: help install run test check format lint types buf generated generate audit sbom bench scale soak image lock clean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: requirements-dev.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

install: $(VENV)/installed ## Create the virtual environment with the locked dependencies

run: install ## Serve a demo clinic on FRONTDESK_LISTEN (127.0.0.1:50051), with an embedded PostgreSQL in .data
	$(BIN)/frontdesk serve --listen $(LISTEN) --data-dir $(DATA) --demo

test: install ## Run the tests against real servers and a real PostgreSQL
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install format lint types buf generated audit $(if $(SKIP_TESTS),,test) ## Run everything that CI requires (SKIP_TESTS=1: without the tests)

format: install ## Check the formatting of the code
	$(BIN)/ruff format --check .

lint: install ## Check the code for known mistakes
	$(BIN)/ruff check .

types: install ## Check the types
	$(BIN)/mypy

buf: install ## Check that the protos are formatted, clean and compatible with the last release
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf lint
	@if git rev-parse -q --verify refs/tags/v0.1.0 >/dev/null; then $(BIN)/buf breaking --against '.git#tag=v0.1.0'; fi

generate: install ## Rebuild generated/ from protos/
	rm -rf generated && mkdir generated
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=generated --mypy_out=quiet:generated \
		--grpc_python_out=generated --mypy_grpc_out=quiet:generated $(PROTOS:protos/%=%)

generated: generate ## Check that generated/ matches protos/
	git diff --exit-code --stat -- generated
	@test -z "$$(git status --porcelain -- generated)" || { git status --short -- generated; exit 1; }

audit: ## Look for known vulnerabilities of the service's dependencies, if the database of them can be reached
	@if $(PYTHON) -c 'import socket; socket.create_connection(("$(ADVISORIES)", 443), 5)' 2>/dev/null; then \
		$(MAKE) --no-print-directory $(SUPPLY)/installed && $(SUPPLY)/bin/pip-audit --vulnerability-service osv \
			--disable-pip --requirement requirements.txt --progress-spinner off; \
	else echo "audit: $(ADVISORIES) cannot be reached, so the dependencies are not audited" >&2; fi

sbom: $(SUPPLY)/installed ## List the service's dependencies in CycloneDX form: sbom.json
	@$(SUPPLY)/bin/python -W ignore -m cyclonedx_py requirements requirements.txt --pyproject pyproject.toml \
		--output-reproducible --output-format JSON --output-file sbom.json
	@echo "sbom.json is written"

ADVISORIES := api.osv.dev

$(SUPPLY)/installed: requirements-supply.txt
	@test -x $(SUPPLY)/bin/python || $(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-supply.txt
	@touch $@

bench: install ## Measure each call against a bare servicer; writes bench.json
	$(BIN)/python -m benchmarks.bench

scale: install ## Measure with ten million appointments and ten thousand watchers; writes scale.json (DIR=… keeps the data)
	$(BIN)/python -m benchmarks.scale $(if $(DIR),--data $(DIR))

soak: install ## Test for longer: random actions, hostile requests, and faults (SEED=1 MINUTES=10)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pytest tests/test_model.py tests/fuzz --hypothesis-profile=soak
	@if $(BIN)/python -c 'import atheris' 2>/dev/null; then $(BIN)/python -m tests.fuzz.decode_atheris -max_total_time=120; fi
	$(BIN)/python -m tests.history --seed $(or $(SEED),1) --minutes $(or $(MINUTES),10)

image: ## Build the container image frontdesk:latest
	docker build --tag frontdesk:latest .

lock: install ## Update requirements.txt (the service), requirements-dev.txt (with the tools) and requirements-supply.txt
	$(COMPILE) --output-file requirements.txt pyproject.toml
	$(COMPILE) --extra dev --output-file requirements-dev.txt pyproject.toml
	$(COMPILE) --output-file requirements-supply.txt requirements-supply.in

COMPILE = $(BIN)/python -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --no-header

clean: ## Delete everything that make created, with the data in .data
	rm -rf $(VENV) .data .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/node/node_modules
