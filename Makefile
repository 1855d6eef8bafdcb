# make quickstart   set up and pretrain a small GPT on CPU, two ranks; ends with a summary and pictures. FLAGS="..." go to
#                   the run: FLAGS="--deepspeed --deepspeed-config configs/deepspeed/zero1.json" trains on DeepSpeed's engine
# make test         set up and run the whole test suite; WORKERS=2 test files at a time
# make test-fast    the tests without processes, Megatron and pictures, in about a minute
# make test-te      the tests that need the real Transformer Engine, in an environment of its own (.venv-te)
# make test-bridge  the tests with Megatron-Bridge, in an environment of its own (.venv-bridge)
# make test-core    param groups, scheduler and audit at older releases of megatron-core, each in an environment of its own
# make selfcheck    what a CPU can do of the selfcheck of a GPU machine, with small models (docs/gpu.md)
# make test-wheel   every command of the wheel, in an environment without the checkout
# make test-hosts   runs over ssh and pdsh on two hosts made of namespaces, healthy and broken; root, else skipped
# make test-megatron MEGATRON_LM_DIR=...   with a checkout of Megatron-LM: its scripts, and its unit tests with our hooks
# make sweep-example   the worked example: sweep of proxy and target, tuned config, report; hours (docs/transfer-example.md)
# make figures        the runs that the tables of docs/evidence.md lack, then its figures; hours, goes on where it was
# make figures-quick  its machinery in two minutes
# make figures-draw   the figures and tables of docs/evidence.md from what is committed, in seconds
# make docs         the pages of docs/ with the API, as a site in site/; fails on a link that leads nowhere
# make test-next MEGATRON_LM_DIR=...   hooks, param groups, resume and hybrid models on a checkout of Megatron-LM's main
# make lint bench   what their names say
# Everything is installed into .venv; PYTHON=... chooses the interpreter (3.12 or newer).

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell .ci/find_python)
WORKERS ?= 2
# Whose torch the tests of older releases of megatron-core use.
CORE_PYTHON ?= $(BIN)/python

.PHONY: setup quickstart test test-fast figures figures-quick figures-draw sweep-example test-te test-bridge test-core selfcheck \
	test-wheel test-hosts test-megatron test-next lint docs bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml .ci/find_python
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one or call make PYTHON=/path/to/python3.12"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

quickstart: setup
	launch/quickstart.sh $(FLAGS)

test: setup
	$(BIN)/python -m pytest -m "not hosts" --numprocesses $(WORKERS) --dist loadfile

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not hosts"

figures: setup
	launch/figures.sh

figures-quick: setup
	launch/figures.sh --quick

figures-draw: setup
	launch/figures.sh --draw

sweep-example: setup
	launch/sweep_example.sh

test-te:
	PYTHON="$(PYTHON)" .ci/install_te.sh .venv-te
	.ci/test_te .venv-te

test-bridge: setup
	.ci/test_bridge $(BIN)/python

test-core: setup
	.ci/test_core $(CORE_PYTHON) 0.17.1 0.18.2

selfcheck: setup
	rm -rf runs/selfcheck-cpu
	$(BIN)/python tools/gpu_selfcheck.py --cpu --quick --output runs/selfcheck-cpu

test-wheel: setup
	.ci/test_wheel $(BIN)/python

test-hosts: setup
	.ci/test_hosts $(BIN)/python $(HOSTS_OPTIONS)

test-megatron: setup
	MEGATRON_LM_DIR="$(MEGATRON_LM_DIR)" $(BIN)/python tests/upstream_suite/compare.py
	MEGATRON_LM_DIR="$(MEGATRON_LM_DIR)" $(BIN)/python -m pytest tests/upstream/test_megatron_lm.py

test-next: setup
	.ci/test_next $(BIN)/python "$(MEGATRON_LM_DIR)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python benchmarks/patch_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu_speed.py
	$(BIN)/python benchmarks/alignment_cost.py

clean:
	rm -rf site $(VENV) .venv-te .venv-bridge .venv-core-*
