# Every target makes its own virtual environment first: nothing to do by hand on a fresh machine.
#   make help

# PROFILE unset: what the table's table.yaml says
SEEDS    ?= 0
LAUNCHER ?= local
WORKERS  ?= auto
PYTHON   ?= $(shell for p in python3 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && { echo $$p; break; }; done)

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := $(VENV)/bench
RUN   := $(BIN)/python -m surflow.cli
REQUEST = $(if $(PROFILE),profile=$(PROFILE)) 'seeds=[$(SEEDS)]' \
	$(if $(WEIGHTS),weights=$(WEIGHTS)) $(if $(WEIGHTS_PATH),'weights_path="$(WEIGHTS_PATH)"') \
	$(if $(INCEPTION),'inception="$(INCEPTION)"') \
	$(if $(ROWS),'rows=[$(ROWS)]') $(if $(COLUMNS),'columns=[$(COLUMNS)]')
REPRODUCE = $(RUN).reproduce $(REQUEST) launcher=$(LAUNCHER) workers=$(WORKERS) \
	$(if $(DEVICES),devices=$(DEVICES)) $(if $(NODES),nodes=$(NODES)) $(if $(SLURM),'slurm={$(SLURM)}')

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-all verify docs bench bench-gpu figure-compositions lock clean
TABLES := $(subst _,-,$(patsubst experiments/%/table.yaml,%,$(wildcard experiments/*/table.yaml)))
.PHONY: $(addprefix reproduce-,$(TABLES)) $(addprefix report-,$(TABLES))

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | \
		awk -F'\t' '{printf "  %-25s %s\n", $$1, $$2}'
	@echo; grep -H '^title:' experiments/*/table.yaml | \
		sed -E 's#^experiments/([^/]*)/table.yaml:title: *"?([^"]*)"?$$#\1\t\2#' | \
		awk -F'\t' '{gsub("_", "-", $$1); printf "  reproduce-%-15s %s\n", $$1, $$2}'
	@echo "  report-...                the same table from the records there are; runs nothing"
	@echo; echo "  PROFILE=paper|short|smoke|auto  SEEDS=0,1,2  ROWS=slice,max_pool  COLUMNS=cifar10"
	@echo "  WORKERS=auto|n  DEVICES=n  NODES=n  LAUNCHER=local|submitit|submitit_local|submitit_slurm"
	@echo "  SLURM=timeout_min:2880,slurm_partition:gpu  WEIGHTS=official  WEIGHTS_PATH=folder  INCEPTION=file"

setup: $(STAMP)  ## Make the virtual environment from the lock file

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "surflow: error: Python 3.11, 3.12 or 3.13 not found; install one, or give its path: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)  ## Run the tests (19 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(STAMP)  ## Run the tests, slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m ''

verify: $(STAMP)  ## Prove every layer: round trip, log-det, mass, gradients, compile-clean; a table
	$(RUN).verify workers=$(WORKERS) output=results/verify

docs: $(STAMP)  ## Write docs/layers.md from the docstrings, and the tables that pages repeat from results/
	$(BIN)/python docs/write_layers.py
	$(BIN)/python docs/write_tables.py

# The libraries of pyproject.toml's group `bench`, in a folder of their own that only the benchmark
# reads: they are in no lock file, and nothing else sees them. Without a network it goes on without.
$(BENCH): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(BENCH) \
		$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])') 2>/dev/null \
		&& touch $(BENCH) || echo "bench: could not install nflows, normflows and zuko; going on with what is there" >&2

bench: $(STAMP) $(BENCH)  ## Time ours against a plain step and three libraries; the nets' share of a VAE's step
	$(BIN)/python -m benchmarks

bench-gpu: $(STAMP)  ## Time the full PoolFlow on a GPU: speed-up, share of peak, memory, FID time
	$(BIN)/python -m benchmarks 'parts=[images]' bench_images@images=gpu

# one target for each experiments/<table>/table.yaml, which names the default profile
$(addprefix reproduce-,$(TABLES)): reproduce-%: $(STAMP)
	$(REPRODUCE) artefact=$(subst -,_,$*)

$(addprefix report-,$(TABLES)): report-%: $(STAMP)
	$(RUN).report artefact=$(subst -,_,$*) $(REQUEST)

figure-compositions: reproduce-compositions  ## Two composed surjections: density and samples

lock: $(STAMP)  ## Pin what is installed now in requirements.lock (after changing pyproject.toml)
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy only-if-needed -e '.[dev]'
	@{ echo "# Pinned by 'make lock'. environment.yml and the Makefile install from this file."; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed -E '/^(nvidia|triton|cuda)/d; s/^(torch[a-z]*==[0-9.]+)\+.*/\1/'; } > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

clean:  ## Remove caches and the virtual environment; runs/ and results/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
