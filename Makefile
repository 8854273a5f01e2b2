# Every target makes the environment it needs (.venv) on its first call; later calls start at once.
# A changed settings.ini or lock/ installs again. Needs make, bash and Python 3.11 or newer, nothing else.
# Package indexes: pip's own settings are used, so PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS choose e.g. a CPU-only torch.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# What a caller may set: make train BETA_KL=0.1
# weight of the KL term, and the run directory
BETA_KL ?= 0.3
RUN_DIR ?= runs/$(shell date +%F)/train-beta_kl$(BETA_KL)-$(shell date +%H%M%S)
# the environment, and the Python to make it with (empty: the first of python3, python3.14 ... python3.11 that is new enough)
VENV ?= .venv
PYTHON ?=
# which benchmarks make bench runs, and papermill's arguments for them; with arguments the result is runs/bench-NAME.ipynb
BENCH ?= $(wildcard nbs/bench/*.ipynb)
BENCH_ARGS ?=
# how pytest runs: in three processes, since many tests wait for what they start; all tests of a file in the same one, since they share what is slow to make; the order is tests/conftest.py's
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

# how many command lines make fuzz tries, and of which seed
LINES ?= 2000
SEED ?= 0

RUN := $(VENV)/bin/python

# A user-level "python3" kernel, a PYTHONPATH or user site-packages of some other project would shadow what .venv holds.
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONNOUSERSITE := 1
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME
# Every process would compile torch and transformers anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE
export PYTHON

.PHONY: help preflight train quick lint types test fuzz bench lab docs readme export tinyagent lock sbom clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# .user holds what settings.ini lists as requirements, .dev all. Both are installed by the hashes of lock/.
SETUP := settings.ini setup.py pyproject.toml $(wildcard lock/*.txt)
$(VENV)/.user: $(SETUP)
	.ci/venv $(VENV) run
$(VENV)/.dev: $(SETUP)
	.ci/venv $(VENV) dev
$(VENV)/tools/.done: $(wildcard lock/tools.txt)
	.ci/venv $(VENV)/tools tools

# One thread unless told otherwise: the tiny agent gains little from more, and on a busy machine they mostly wait for each other.
train: export OMP_NUM_THREADS ?= 1
train: $(VENV)/.user  ## nbs/train.ipynb on the tiny agent; BETA_KL=0.3 and RUN_DIR=runs/... can be set
	@set -e; run='$(RUN_DIR)'; mkdir -p -m 700 "$$run"; n=1; while [ -e "$$run/out.$$n.ipynb" ]; do n=$$((n+1)); done; \
	  $(RUN) -m papermill nbs/train.ipynb "$$run/out.$$n.ipynb" -p beta_kl $(BETA_KL) -p run_dir "$$run"; \
	  $(RUN) -m cbnb.report "$$run"

preflight: export OMP_NUM_THREADS ?= 1
preflight: $(VENV)/.user  ## the review of that run before it is started: nbs/preflight.ipynb on the tiny agent; BETA_KL=0.3 can be set
	@$(RUN) -m cbnb.cli preflight --beta-kl $(BETA_KL)

quick: $(VENV)/.dev  ## lint, types, and the notebooks and tests that a change since main touches: at most three minutes
	@$(RUN) .ci/quick.py

lint: $(VENV)/.dev  ## ruff over notebooks, tests and scripts: names, imports, width, format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev  ## mypy over the exported package
	@$(VENV)/bin/mypy

test: $(VENV)/.dev  ## nbdev_test over nbs/, then pytest; both run, and either failing fails
	@rc=0; TMPDIR=$$(.ci/tmp) || exit 1; trap 'rm -rf "$$TMPDIR"' EXIT; export TMPDIR CBNB_TEST_RUNS="$$TMPDIR/runs"; mkdir "$$CBNB_TEST_RUNS"; \
	  $(RUN) .ci/nbtest.py || rc=1; OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) || rc=1; exit $$rc

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(VENV)/.dev  ## command lines made from the parser of cbnb itself, for what must hold of each; LINES=10000 and SEED=1 can be set
	$(RUN) tests/fuzz_cli.py $(LINES) $(SEED)

bench: export OMP_NUM_THREADS ?= 1
bench: $(VENV)/.dev  ## the benchmarks of nbs/bench/, run in place; fetches peers on its first call. BENCH=nbs/bench/kl.ipynb runs one, BENCH_ARGS='-p device cuda' sets its parameters
	@set -e; for n in $(BENCH); do out=$$n; if [ -n '$(BENCH_ARGS)' ]; then mkdir -p runs; out=runs/bench-$${n##*/}; fi; \
	  $(RUN) -m papermill $$n $$out --cwd nbs/bench $(BENCH_ARGS); done
	$(VENV)/bin/nbdev_clean

# JupyterLab asks for news and updates, or its user whether it may, unless its settings say so
QUIET_LAB := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

# cache_ports: with it a kernel whose ports another process has taken is started again with the same ones
lab: $(VENV)/.user  ## JupyterLab on nbs/, opened at start.ipynb, on this machine's loopback with a fresh token
	@mkdir -p $(VENV)/etc/lab/labconfig
	@printf '%s\n' '$(QUIET_LAB)' >$(VENV)/etc/lab/labconfig/default_setting_overrides.json
	JUPYTER_CONFIG_DIR=$(abspath $(VENV))/etc/lab $(RUN) -m jupyterlab --ip=127.0.0.1 --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/start.ipynb --KernelManager.cache_ports=False \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

docs: $(VENV)/.dev  ## the notebooks and pages as a static site in _docs/, readable without a server or a network
	$(RUN) .ci/pages.py docs

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	$(RUN) .ci/pages.py readme

export: $(VENV)/.dev  ## modules from notebooks, notebooks cleaned, parameters cells, tables of the site, README.md: run it before a commit
	$(VENV)/bin/nbdev_export
	$(RUN) .ci/pages.py strip
	$(RUN) .ci/pages.py parameters
	$(VENV)/bin/nbdev_clean
	$(RUN) .ci/pages.py tables
	$(RUN) .ci/pages.py readme

tinyagent: $(VENV)/.user  ## rebuild the embedded tiny agent: at most an hour on one core
	OMP_NUM_THREADS=1 $(RUN) -m cbnb.evaluate.tinyagent cbnb/tinyagent_model

lock: $(VENV)/tools/.done  ## lock/: hashes of all packages, after a change of settings.ini or constraints.txt; versions that are in neither stay
	$(VENV)/tools/bin/python .ci/lock.py

# validation against the schema takes a hundred times as long as the rest, and asks the tool about its own output
sbom: $(VENV)/.user $(VENV)/tools/.done  ## sbom.json: what .venv holds, with versions and licences, as CycloneDX
	$(VENV)/tools/bin/cyclonedx-py environment --no-validate --gather-license-texts --output-reproducible --of JSON -o sbom.json.part $(RUN)
	mv sbom.json.part sbom.json

clean:  ## what builds, docs and tests left; keeps .venv and runs/
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis .cache .ruff_cache .mypy_cache sbom.json
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
