# Everything runs in .venv, made on first use from the versions in constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
PARITY := .venv-parity
# a core each, but no more at once than memory has room for; a file's tests share what they set up
TESTS := python -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest test-newest check format bench fuzz parity docs clean

help: ## Show this list
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+).*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) ## Create .venv with everything needed (about 3 minutes, 7 GB)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or later, or say which with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,onnx]'
	@touch $(READY)

demo: $(READY) ## Refine a small model of a drawn world and print before and after
	$(BIN)/clip-refine demo --overwrite

test: $(READY) ## Run all tests
	$(BIN)/$(TESTS)

# uv, since pip chooses no lowest versions; constraints.txt has no say in either
VERSIONS_oldest := lowest-direct
VERSIONS_newest := highest
# which need a newer PyTorch than the rest does
ONNX_TESTS := tests/roads/test_export.py tests/roads/test_vector_maps.py
test-oldest test-newest: test-%: ## All tests with the oldest libraries that pyproject.toml allows; test-newest: the newest (7 GB each)
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(VERSIONS_$*) --editable '.[dev]'
	.venv-$*/bin/$(TESTS) $(ONLY)
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(VERSIONS_$*) --editable '.[dev,onnx]'
	.venv-$*/bin/$(TESTS) $(ONNX_TESTS)

check: $(READY) ## Format, lint, types, import contract, tests, in chromium too where there is one
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/$(TESTS)

format: $(READY) ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## Time ours against what one would write otherwise: one table, some minutes
	$(BIN)/python benchmarks/bench.py

SECONDS ?= 600
fuzz: $(READY) .venv-fuzz ## Read changed files of every kind for 10 minutes, or SECONDS=60 TARGETS='states sums'
	PYTHONPATH=src:.:.venv-fuzz OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(SECONDS) $(TARGETS)

# apart from .venv, whose tests shall be what everybody has; without a wheel changes are random
.venv-fuzz: | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps --target $@ atheris \
		|| echo "atheris has no wheel for this Python or machine: changes are made at random, not by coverage."

# What other people run on our models, without what would replace .venv's packages: clip_benchmark
# fails on numpy 2.4, and clip-retrieval asks for a numpy before 2 and for pkg_resources, which the
# newest setuptools no longer has. The rest is shared with .venv.
TOOLS := clip_benchmark==1.6.2 webdataset braceexpand pycocoevalcap \
	mteb==2.26.24 pytrec-eval-terrier polars polars-runtime-32 requests urllib3 charset-normalizer \
	clip_retrieval==2.45.0 all_clip==1.3.0 clip-anytorch fire termcolor faiss-cpu h5py wandb platformdirs \
	flask flask_restful 'flask_cors<5' itsdangerous blinker prometheus_client \
	lightning torchmetrics lightning-utilities pytorch-lightning uv 'setuptools>=77,<81'
parity: $(READY) $(PARITY)/.ready ## Ours in other people's tools, and against their numbers
	PYTHONPATH=$(CURDIR)/src $(PARITY)/bin/python -m pytest -q tests/parity tests/vectors/test_nnn_parity.py tests/test_examples.py tests/test_package.py::test_a_resolver_finds_what_it_needs_in_the_index

$(PARITY)/.ready: Makefile | $(READY)
	$(PYTHON) -m venv --clear $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TOOLS) nnn-retrieval 'numpy>=2.3,<2.4'
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; $(BIN)/python -c "$$site" > $$($(PARITY)/bin/python -c "$$site")/shared.pth
	@touch $(PARITY)/.ready

# not --quiet, with which mkdocs counts no warnings
docs: .venv-docs/.ready ## Build the documentation site in site/; a warning is an error
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv --clear .venv-docs
	$(PYTHON) -c "import tomllib as t; print(*t.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
		| .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch .venv-docs/.ready

clean: ## Remove the environments, the runs and the site
	rm -rf .venv .venv-* runs site
