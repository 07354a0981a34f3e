# Thin lines over the command `babelray`; see `make help`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# What a user may set: make train CONFIG=configs/base.yaml NAME=first WORKERS=4
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.yaml
NAME ?=
WORKERS ?=
CHECKPOINT ?= best
INPUT ?= -
TEST_SET ?=
COMPARE ?=
BENCH ?=
RUNS ?= runs
SET ?=
OVERLAY ?=
COMPONENTS ?=
NODES ?=
GPUS ?=
# What make image PUSH=1 has noted.
IMAGE ?= $(shell cat .image-$(if $(filter cpu-smoke,$(OVERLAY)),cpu,gpu) 2>/dev/null)
NAMESPACE ?=
VARIANT ?= gpu
PUSH ?=
BUILD_ARGS ?=
STORAGE ?=
PYTEST ?=
SEED ?=
FAULTS ?=
WRITE ?=
CLUSTER ?=
HARDWARE ?=

BIN := $(VENV)/bin
BABELRAY := $(BIN)/babelray
LOCK := requirements.lock
STAMP := $(VENV)/.installed

settings = $(foreach setting,$(SET),--set $(setting))
need_name = $(if $(NAME),,$(error NAME is missing: which run? For example: make $@ NAME=demo))
# Where to; with RAY_ADDRESS set, what is Kubernetes' stays empty.
cluster = $(if $(OVERLAY),--overlay $(OVERLAY)) $(foreach name,$(COMPONENTS),--component $(name)) \
	$(if $(NODES),--nodes $(NODES)) $(if $(GPUS),--gpus $(GPUS)) \
	$(if $(RAY_ADDRESS),,$(if $(IMAGE),--image $(IMAGE))) $(if $(NAMESPACE),--namespace $(NAMESPACE)) \
	$(if $(STORAGE),--storage $(STORAGE))
TRAIN = $(BABELRAY) train $(settings) $(if $(NAME),--name $(NAME)) $(if $(WORKERS),--workers $(WORKERS))

.PHONY: help
help: ## Show this list
	@echo "Usage: make TARGET [VARIABLE=value ...]"
	@echo
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
		| awk 'BEGIN {FS = ":.*## "} {printf "  %-15s %s\n", $$1, $$2}'
	@echo
	@echo "Variables (with what they are now):"
	@echo "  CONFIG=$(CONFIG)  NAME=$(NAME)  WORKERS=$(WORKERS)  CHECKPOINT=$(CHECKPOINT)"
	@echo "  TEST_SET=$(TEST_SET)  COMPARE=$(COMPARE)  (of make evaluate)  RUNS=$(RUNS) (of make launch stop resume evaluate status logs)"
	@echo "  OVERLAY=$(OVERLAY)  COMPONENTS='$(COMPONENTS)'  NODES=$(NODES)  GPUS=$(GPUS)  IMAGE=$(IMAGE)  NAMESPACE=$(NAMESPACE)"
	@echo "  STORAGE=$(STORAGE)  (of make launch manifests resume doctor; with RAY_ADDRESS set, to that Ray cluster)"
	@echo "  SET='a.b=c ...' (settings over CONFIG)  INPUT=$(INPUT)  CLUSTER=1 (of make doctor)  HARDWARE=$(HARDWARE) (of make plan)  PYTHON=$(PYTHON)  VENV=$(VENV)"
	@echo "  PYTEST='...' (arguments for pytest)  BENCH='...' (arguments of make bench and make bench-gpu)"
	@echo "  SEED=n, FAULTS='rank-killed ...', WRITE=1 (of make chaos: when faults strike, which,"
	@echo "  and whether the table goes into docs/reliability.md; see python -m tests.chaos --help)"

.PHONY: setup
setup: $(STAMP) ## Make the virtual environment .venv with exactly the locked versions

# Without an NVIDIA GPU the CPU build of torch is enough, and on Linux gigabytes smaller; it lies on
# PyTorch's own index. Where that cannot be reached, pip's own index has to do.
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP = $(BIN)/python -m pip --disable-pip-version-check

# Keyed on what decides the environment: the locked versions and the package's own metadata.
# DeepSpeed comes as source: it is built without torch and compiles none of its operators.
$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make setup: error: $(PYTHON) not found:" \
		"name an interpreter, as in make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make setup: error: babelray needs Python 3.11 or newer, not $$($(PYTHON) --version):" \
		"name one, as in make setup PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || { echo "making $(VENV) with $$($(PYTHON) --version)"; \
		rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { \
		echo "make setup: error: $(PYTHON) cannot make a virtual environment" \
		"(Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "installing $$(grep -c == $(LOCK)) locked packages (the first time takes minutes)"
	@index=; if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
		&& curl -sfI --max-time 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1; \
		then index="--extra-index-url $(CPU_INDEX)"; fi; \
		DS_BUILD_OPS=0 $(PIP) install --quiet $$index --requirement $(LOCK)
	@$(PIP) install --quiet --no-deps --editable .
	@$(PIP) check
	@touch $@

.PHONY: demo
demo: setup ## Train a small model in minutes; print BLEU, translations and the page to look at
	@echo "== 1 of 4: the corpus, generated here"
	@$(BABELRAY) data prepare --config configs/tiny.yaml
	@echo; echo "== 2 of 4: train a small Transformer on two workers (runs/demo)"
	@$(BABELRAY) train --config configs/tiny.yaml --name demo --workers 2 --overwrite
	@echo; echo "== 3 of 4: BLEU on sentences that it never saw, by beam search"
	@$(BABELRAY) evaluate demo --samples 5
	@echo; echo "== 4 of 4: the page with curves, attention and samples"
	@$(BABELRAY) report demo

.PHONY: data
data: setup ## Prepare the corpus of CONFIG
	@$(BABELRAY) data prepare --config $(CONFIG) $(settings)

.PHONY: train
train: setup ## Train CONFIG as run NAME with WORKERS workers (each optional)
	@$(TRAIN) --config $(CONFIG)

# IMAGE as .image-… has it is one that was pushed, by digest: no name to build under.
.PHONY: image
image: ## Build the container image IMAGE (VARIANT=gpu|cpu); PUSH=1 pushes it, and make launch then uses it
	@IMAGE='$(if $(filter file,$(origin IMAGE)),,$(IMAGE))' VARIANT='$(VARIANT)' PUSH='$(PUSH)' \
		BUILD_ARGS='$(BUILD_ARGS)' k8s/build-image.sh

.PHONY: launch
launch: setup ## Train CONFIG as run NAME on Kubernetes, or on the Ray cluster at RAY_ADDRESS
	@$(BABELRAY) launch --config $(CONFIG) $(settings) $(if $(NAME),--name $(NAME)) $(cluster) \
		--runs $(RUNS)

.PHONY: manifests
manifests: setup ## Print what make launch would apply, and change nothing
	@$(BABELRAY) launch --dry-run --config $(CONFIG) $(settings) $(if $(NAME),--name $(NAME)) $(cluster) \
		--runs $(RUNS)

.PHONY: stop
stop: setup ## Save a checkpoint of run NAME and end it, wherever it runs
	@$(need_name)$(BABELRAY) stop $(NAME) --runs $(RUNS)

.PHONY: resume
resume: setup ## Go on with run NAME from its last checkpoint, where it ran
	@$(need_name)$(BABELRAY) resume $(NAME) $(settings) $(if $(WORKERS),--workers $(WORKERS)) \
		$(cluster) --runs $(RUNS)

.PHONY: doctor
doctor: setup ## Check this machine, and with CLUSTER=1 the cluster, before a run needs them
	@$(BABELRAY) doctor --config $(CONFIG) $(settings) $(if $(CLUSTER),--cluster $(cluster))

.PHONY: evaluate
evaluate: setup ## Compute BLEU of run NAME on TEST_SET, against the run COMPARE if given
	@$(need_name)$(BABELRAY) evaluate $(NAME) --checkpoint $(CHECKPOINT) $(settings) --runs $(RUNS) \
		$(if $(TEST_SET),--test-set $(TEST_SET)) $(if $(COMPARE),--compare $(COMPARE))

.PHONY: translate
translate: setup ## Translate INPUT (by default what you type) with run NAME
	@$(need_name)$(BABELRAY) translate $(NAME) --checkpoint $(CHECKPOINT) --input $(INPUT) $(settings)

.PHONY: serve
serve: setup ## Serve run NAME: a page to type in, a JSON endpoint (Ctrl-C ends)
	@$(need_name)$(BABELRAY) serve $(NAME) --checkpoint $(CHECKPOINT) $(settings)

.PHONY: report
report: setup ## Write the page of run NAME
	@$(need_name)$(BABELRAY) report $(NAME)

.PHONY: status
status: setup ## How all runs stand, or all about run NAME
	@$(BABELRAY) status $(NAME) --runs $(RUNS)

.PHONY: logs
logs: setup ## The logs of run NAME, as they come
	@$(need_name)$(BABELRAY) logs $(NAME) --follow --runs $(RUNS)

.PHONY: dashboard
dashboard: setup ## Where live runs (or run NAME) can be watched; starts Prometheus and Grafana if installed
	@$(BABELRAY) dashboard $(NAME) --runs $(RUNS)

# One thread a process: many small models and several processes at a time, on however few cores.
.PHONY: test
test: setup ## Run the tests (those marked slow aside)
ifeq ($(PYTEST),)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile \
		tests/unit tests/k8s tests/chaos
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" tests/integration tests/system
else
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(PYTEST)
endif

.PHONY: test-slow
test-slow: setup ## Run the tests that take minutes each
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(PYTEST)

.PHONY: test-gpu
test-gpu: setup ## Run the tests that need a CUDA device
	@$(BIN)/pytest -m gpu $(PYTEST)

.PHONY: chaos
chaos: setup ## Break real runs in every way; a table of what it cost (SEED=n FAULTS='...' WRITE=1)
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(WRITE),--write) $(FAULTS)

.PHONY: bench
bench: setup ## Measure speed against alternatives: one table (an hour; BENCH='--quick': minutes)
	@$(BIN)/python benchmarks/bench.py $(BENCH)

.PHONY: bench-gpu
bench-gpu: setup ## base and big on one GPU: tokens/s, MFU, memory, profile (without one it rehearses)
	@$(BIN)/python benchmarks/gpu.py $(BENCH)

# The paper's tables; each writes its results, its page in docs/paper and its plots anew.
PAPER = --output benchmarks/results/$1.json --page docs/paper/$1.md

.PHONY: attention-bench
attention-bench: setup ## Attentions beside each other, and why dot products are scaled (a minute)
	@$(BABELRAY) attention-bench $(NAME) --runs $(RUNS) $(call PAPER,attention)

.PHONY: table1
table1: setup ## The paper's Table 1, counted and measured (two minutes)
	@$(BABELRAY) table1 $(call PAPER,table1)

.PHONY: table2
table2: setup ## The paper's Table 2 beside run NAME (several names: NAME='a b')
	@$(BABELRAY) table2 $(NAME) --runs $(RUNS)

.PHONY: table3
table3: setup ## Rows of the paper's Table 3, scaled down, trained side by side (an hour); goes on where it was
	@$(BABELRAY) table3 --runs $(RUNS) $(call PAPER,table3) --image docs/images/paper/table3.svg

.PHONY: kinds
kinds: setup ## Transformer, LSTM, GRU and convolution in the same minutes (an hour)
	@$(BIN)/python benchmarks/kinds.py

.PHONY: plan
plan: setup ## What training CONFIG takes on HARDWARE (8xH100), without data: memory, hours, price
	@$(BABELRAY) plan --config $(CONFIG) $(settings) $(if $(HARDWARE),--hardware $(HARDWARE))

.PHONY: docs
docs: setup ## Write the pages and dashboards that are made of code: docs/metrics.md, k8s/monitoring
	@$(BIN)/python -m trainer.metrics_page
	@$(BIN)/python -m cluster.monitoring

.PHONY: lint
lint: setup ## Check style, types, layers, spelling and scripts; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck .ci/run k8s/*.sh
	@$(BIN)/hadolint Dockerfile

.PHONY: format
format: setup ## Put the code into its format and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: lock
# No local versions (torch's +cpu would pin one kind of machine), nothing that only CUDA builds need:
# torch pins that itself.
lock: ## Resolve requirements.lock anew from pyproject.toml
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
		$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
			print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' \
			> "$$scratch/wanted"; \
		$(PYTHON) -m venv "$$scratch/venv"; \
		DS_BUILD_OPS=0 "$$scratch/venv/bin/python" -m pip install --quiet -r "$$scratch/wanted"; \
		{ echo "# Exact versions of all that babelray runs with and is tested with: make lock"; \
		"$$scratch/venv/bin/python" -m pip freeze --exclude pip --exclude setuptools --exclude wheel \
			| sed -E 's/^([^=]+==[^+]+)\+.*/\1/' | grep -vE '^(nvidia-|cuda-|triton==)'; } \
			> "$$scratch/lock"; \
		mv "$$scratch/lock" $(LOCK)

.PHONY: clean
clean: ## Remove caches and the environment; runs/ and data/ stay
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
