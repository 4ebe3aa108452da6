# make demo    install into .venv, run the VLM-in-the-loop experiment on generated scenes and its twin without a judge, draw both
# make test    install into .venv, run every notebook and every test (make test-all: the slow tests as well)
# make test-people   the slow tests with real tools: Label Studio (VLM_ITL_LABEL_STUDIO=its executable) and a browser
# make lint    ruff on notebooks and tests, mypy on the library
# make sync    write vlm_itl/*.py, cleaned notebooks and README.md anew from the notebooks (make export: only the modules)
# make check   what CI runs: in sync, lint, test
# make audit   ask for known holes in the pinned dependencies (needs a network); make trust: break things on purpose, half an hour
# make study   measure the README's results on photographs (VLM_ITL_SHARED; about ten hours of two cores, goes on where it stopped)
# make bench   what it costs beside what others would use, in one run (ten minutes on a quiet machine; results/bench.md)
# make results show them: tables, figures, README (seconds)
# make house   how well the book can be read: statistics of its chapters
# make clean   remove caches; make distclean: .venv as well. Neither touches runs/
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), VENV=... the folder of the environment,
# ARGS='-p seed 1' adds parameters to the demo.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
NBDEV_TEST_SECONDS ?= 1800
PYTEST_SECONDS ?= 2700
PYTEST_ARGS ?= -m "not slow" -n auto -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

FEW := "human only" "human only, entropy" "accept all" "learned, class"

BIN := $(abspath $(VENV))/bin
# The stamp carries a checksum of what the installation depends on, so that neither a fresh checkout nor nbdev rewriting
# pyproject.toml with the same content installs again.
INPUTS := settings.ini setup.py pyproject.toml constraints.txt
SUM := $(shell { echo '$(CURDIR)'; cat $(INPUTS); } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(SUM)

.PHONY: help setup demo test test-all test-people audit trust study bench results house export sync check-sync lint check clean distclean hooks
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

setup: $(STAMP)
	@:

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing into $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv here (on Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q vlm_itl
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP)
	@$(BIN)/vlm_itl_run nbs/run_al.ipynb -f configs/demo.yaml $(ARGS) </dev/null

# One thread per process, since notebooks and tests run one per core; short trainings in the run notebooks. A fresh cache, so that no generated data of an
# older version is read. The modules are compiled first, or two hundred processes would each do it where Python may not write beside them
# (PYTHONDONTWRITEBYTECODE). pytest comes last, and its closing line is the last one.
test: $(STAMP)
	@set -e; \
	cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; \
	export VLM_ITL_CACHE="$$cache" VLM_ITL_PROGRESS=0 HF_HUB_OFFLINE=1 WANDB_MODE=offline; \
	export MPLBACKEND=agg TOKENIZERS_PARALLELISM=false PATH="$(BIN):$$PATH"; \
	python -m compileall -q vlm_itl; \
	echo "notebooks"; \
	OMP_NUM_THREADS=1 VLM_ITL_MAX_STEPS=20 timeout $(NBDEV_TEST_SECONDS) nbdev_test --timing </dev/null; \
	OMP_NUM_THREADS=1 timeout $(PYTEST_SECONDS) python -m pytest $(PYTEST_ARGS) </dev/null

# Label Studio lives in an environment of its own (python3 -m venv studio; studio/bin/pip install label-studio); the first start takes minutes, so its
# empty tables are kept in the cache. What is missing is skipped, and -rs says why.
test-people: $(STAMP)
	@OMP_NUM_THREADS=1 VLM_ITL_PROGRESS=0 HF_HUB_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=agg \
	  $(BIN)/python -m pytest -m slow -rs $(wildcard tests/test_people*.py tests/test_canvas*.py) </dev/null

test-all:
	@$(MAKE) --no-print-directory test PYTEST_ARGS="-n auto" PYTEST_SECONDS=3600

export: $(STAMP)
	@PATH="$(BIN):$$PATH" nbdev_export

sync: $(STAMP)
	@PATH="$(BIN):$$PATH" tools/sync.sh

check-sync: $(STAMP)
	@PATH="$(BIN):$$PATH" tools/check_sync.sh

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

check:
	@.ci/run

audit: $(STAMP)
	@PATH="$(BIN):$$PATH" tools/audit.sh

# The tests of the guarantees, slow ones too; their figures go to results/trust.json.
trust: $(STAMP)
	@OMP_NUM_THREADS=1 VLM_ITL_PROGRESS=0 HF_HUB_OFFLINE=1 WANDB_MODE=offline MPLBACKEND=agg $(BIN)/python tools/trust.py

study: $(STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/judge_pays.py --seeds 10
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/judge_pays.py --seeds 10 --masks 10 20 --rows $(FEW)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/label_pool.py --seeds 10
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench_stop.py
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/judge_classes.py
	@$(MAKE) --no-print-directory results

bench: $(STAMP)
	@$(BIN)/python benchmarks/bench_all.py

results: $(STAMP)
	@$(BIN)/python benchmarks/judge_pays.py --show
	@$(BIN)/python benchmarks/label_pool.py --show
	@$(BIN)/python benchmarks/bench_stop.py --show
	@$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb
	@PATH="$(BIN):$$PATH" tools/sync.sh

house: $(STAMP)
	@$(BIN)/python tools/house.py

# Once a clone: notebooks are cleaned when Jupyter saves them, and git merges them cell by cell.
hooks: $(STAMP)
	@PATH="$(BIN):$$PATH" nbdev_install_hooks

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis _proc _docs
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
