# Two commands matter to a newcomer: `make serve` and `make test`. Both set everything up.
# A distribution's own Python comes first: it is built with optimisations that self-compiled ones often lack (a tenth of a
# small request's time). Any other: make PYTHON=/path/to/python3
PYTHON ?= $(shell for p in /usr/bin/python3 python3.13 python3.12 python3.11 python3.14 python3; do \
  command -v $$p >/dev/null 2>&1 \
  && $$p -c 'import ensurepip, sqlite3, ssl, sys, venv; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
  && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
SERVING := $(VENV)/.serving
STAMP := $(VENV)/.installed
SERVE_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
FAULTS_ARGS ?=
SOAK_ARGS ?=

.PHONY: install serve test test-clients test-apps test-diffusers image first-picture lint fmt bench bench-scheduling bench-faults bench-jobs soak fuzz clean help
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# who only wants to serve does not wait for what the tests need
$(SERVING): requirements/serve.txt requirements/build.txt pyproject.toml
	@scripts/install "$(PYTHON)" "$(VENV)"
	@touch $@

$(STAMP): requirements/dev.txt $(SERVING)
	@scripts/install "$(PYTHON)" "$(VENV)" dev
	@touch $@

install: $(STAMP) ## make .venv with the program and everything that the tests need

serve: $(SERVING) ## start the gateway on :8080 with the built-in backend
	@set -a; if [ -f .env ]; then . ./.env; fi; unset DOCKER_HUB_USERNAME DOCKER_HUB_TOKEN; \
	  IMG_SERVING_ENV_FILE=.env; exec $(BIN)/img-serving serve $(SERVE_ARGS)

test: $(STAMP) ## run the whole suite
	@$(BIN)/python -m pytest -n auto $(TEST_ARGS)

test-clients: $(STAMP) ## the official client libraries, and the programs of docs/recipes with theirs, against the real server
	@PYTHON=$(BIN)/python scripts/official-clients $(TEST_ARGS)

test-apps: $(STAMP) ## docs/recipes with the real SillyTavern (4 minutes; APPS="sillytavern open-webui": 2.5 GB, 10 minutes)
	@scripts/recipe-apps $(APPS)

image: ## build the container image without a Docker engine, and try it (root; buildah, podman, runc)
	@scripts/container-image

first-picture: ## time the newcomer's path: clone, make serve, first picture
	@scripts/first-picture

test-diffusers: ## the diffusers engine's tests, in .venv-diffusers with PyTorch (TORCH=torch==… for another wheel)
	@scripts/test-diffusers "$(PYTHON)" .venv-diffusers -n 2 tests/engines/diffusers $(TEST_ARGS)

lint: $(STAMP) ## style, format and strict types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

fmt: $(STAMP) ## put the code into the house format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(STAMP) ## measure the gateway beside nginx (needs nginx and wrk), and the way of a picture from a worker
	@$(BIN)/python bench/proxy.py
	@$(BIN)/python bench/grpc_hop.py

bench-scheduling: $(STAMP) ## measure the scheduler's decisions, in virtual time (BENCH_ARGS="--quick --check --plots DIR")
	@$(BIN)/python bench/scheduling.py $(BENCH_ARGS)

bench-faults: $(STAMP) ## break upstream servers under load and see who notices (10 minutes; FAULTS_ARGS=--quick: one and a half)
	@$(BIN)/python bench/faults.py $(FAULTS_ARGS)

bench-jobs: $(STAMP) ## measure how fast 10,000 durable jobs are accepted, and that plain requests write none (under a minute)
	@$(BIN)/python bench/jobs.py $(BENCH_ARGS)

soak: $(STAMP) ## prove that nothing is lost: kill -9 under load, generations of 310 s (9 minutes; SOAK_ARGS=--quick: one)
	@status=0; for each in kill_restart long_generation; do \
	  $(BIN)/python soak/$$each.py $(SOAK_ARGS) || status=1; done; exit $$status

fuzz: $(STAMP) ## send the gateway ten times as much of what it should refuse as the suite does, new every time (5 minutes; FUZZ_FACTOR=100)
	@FUZZ_FACTOR=$${FUZZ_FACTOR:-10} $(BIN)/python -m pytest -n auto --dist loadfile tests/fuzz $(TEST_ARGS)

clean: ## remove the virtual environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
