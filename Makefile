# Two targets do everything: `make demo` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
RECIPE ?= launch/recipes/demo.yaml
# Extra flags for pip, e.g. PIP_FLAGS="--index-url …/whl/cpu" for a CPU build of torch where the index offers one.
PIP_FLAGS ?=
# Processes that share the tests.
TEST_WORKERS ?= 2
# A file goes to one worker, so that what it makes once is made once.
BY_FILE := --dist loadfile --no-loadscope-reorder
# Tools for tests and linting; an image leaves them out with DEV=.
DEV ?= --group dev
# Weights and text of the demo, likewise.
DEMO ?= --group demo

LAUNCH := ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml

# Shell scripts: of the launchers, the images and CI.
SCRIPTS := launch/torchrun.sh launch/check_wheel.sh launch/slurm/*.sbatch launch/wandb/*.sh docker/entrypoint.sh .ci/run

# The tests of `make test-fast`: they need no model, and a test asserts that they never import torch. What is ignored takes a minute.
FAST_TESTS := tests/accountants --ignore=tests/accountants/test_smoothed.py tests/privtrain/test_config_reference.py \
	tests/attacks/test_auroc.py tests/attacks/test_roc.py tests/attacks/test_intervals.py tests/attacks/test_caps.py \
	tests/attacks/test_statistics_known_answers.py tests/attacks/test_audit_bounds.py tests/attacks/test_audit_plan.py \
	tests/attacks/test_verdict.py tests/attacks/test_blind_baseline.py

.PHONY: demo test test-fast campaign faults gpu lint format release install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "privtrain needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e . $(DEV)
	if [ -n "$(DEMO)" ]; then $(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps $(DEMO); fi
	touch $@

demo: install
	$(BIN)/privtrain plan $(RECIPE) run.name=$(notdir $(RUN)) run.output_dir=$(patsubst %/,%,$(dir $(RUN)))
	$(LAUNCH) -m privtrain train $(RECIPE) run.name=$(notdir $(RUN)) run.output_dir=$(patsubst %/,%,$(dir $(RUN)))
	$(LAUNCH) -m attacks score $(RUN)
	$(BIN)/attacks analyse $(RUN)
	$(BIN)/attacks report $(RUN)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(BY_FILE)

# Under two minutes on two cores; never imports torch. CONTRIBUTING.md describes the tiers.
test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow and not campaign" $(FAST_TESTS)

campaign: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m campaign --timeout 3600 tests tests/bench -s

# Kill, stop and starve a job of two ranks at every phase of a step, 112 times; prints the README's table.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.faults

# On one GPU, in at most eight minutes; tests/gpu/README.md says what a bare machine needs.
gpu: install
	$(BIN)/python -m pytest tests/gpu -m gpu
	$(BIN)/python -m tests.gpu.timings

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/shellcheck $(SCRIPTS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build sdist and wheel, install the wheel into a clean environment outside the checkout, and run it there. Uploads nothing.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' privtrain/__init__.py)
release: install
	grep -q "^## \[$(VERSION)\]" CHANGELOG.md || { echo "CHANGELOG.md has no section [$(VERSION)]"; exit 1; }
	grep -q "^version: $(VERSION)$$" CITATION.cff || { echo "CITATION.cff is not of version $(VERSION)"; exit 1; }
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	launch/check_wheel.sh dist/privtrain-$(VERSION)-py3-none-any.whl $(VERSION)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
