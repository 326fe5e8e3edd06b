# `make demo` and `make test` are all a newcomer needs; both create .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-fast test-slow fuzz works-with bench bench-full gpu \
	experiments experiments-quick check format docs clean

help:
	@echo "make demo       a small lottery-ticket study of CartPole-v1: table and figures"
	@echo "make test       the tests"
	@echo "make test-fast  each test with the first of its parameters, but the longest tests"
	@echo "make test-slow  the tests that take long"
	@echo "make fuzz       drawn tests with new cases, CASES=1000 each; hours"
	@echo "make works-with Stable-Baselines3's and sb3-contrib's own tests on sparse policies, TorchRL"
	@echo "make bench      what sparsity gains on this machine, a few minutes; writes benchmarks/"
	@echo "make bench-full the same with scaling curves and more shapes, about 20 minutes"
	@echo "make gpu        on an NVIDIA GPU, under 9 minutes, offline: tests, tuning, targets, a sweep"
	@echo "make experiments        every claim: data, figures, experiments/README.md; hours, resumes"
	@echo "make experiments-quick  the same, tiny, in build/experiments; minutes"
	@echo "make check      ruff and mypy"
	@echo "make format     format the code"
	@echo "make docs       the documentation site, in build/site"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test,bench]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/sparse-tickets sweep --env CartPole-v1 --algos ppo bc --seeds 3 --levels 8 \
		--rate 0.4 --ppo.steps 196608 --evaluation.points 8 \
		--evaluation.episodes 8 --evaluation.final-episodes 40 --out runs/demo
	$(BIN)/sparse-tickets show runs/demo

# TESTS: more options of pytest. Idle workers pass their time on what others have not begun.
TESTS ?=
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest --fast -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

CASES ?= 1000
fuzz: $(INSTALLED)
	SPARSE_TICKETS_FUZZ=$(CASES) $(BIN)/python -m pytest tests/fuzz

# Their tests are in the source distributions alone. TESTS="tests/test_run.py": some of them.
OTHERS := build/works_with
works-with: $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[test,sb3,torchrl,ray,minari,tensorboard,wandb,trackio]' \
		'stable-baselines3[extra]' sb3-contrib
	$(BIN)/python -m pytest tests/integrations tests/tickets/test_tracking.py tests/test_docs.py
	$(BIN)/python -m pytest -m slow tests/tickets/test_ray.py
	rm -rf $(OTHERS) && mkdir -p $(OTHERS)
	for name in stable-baselines3 sb3-contrib; do \
		is=$$($(BIN)/pip show $$name | sed -n 's/^Version: //p') && \
		$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(OTHERS) $$name==$$is && \
		mkdir $(OTHERS)/$$name && \
		tar xzf $(OTHERS)/*$$is.tar.gz --strip-components 1 -C $(OTHERS)/$$name && \
		rm $(OTHERS)/*.tar.gz || exit 1; \
	done
	status=0; for name in stable-baselines3 sb3-contrib; do (cd $(OTHERS)/$$name && \
		PYTHONPATH=$(CURDIR)/tests/works_with \
		$(CURDIR)/$(BIN)/python -m pytest -p sb3_all_sparse $(TESTS)) || status=1; \
	done; exit $$status

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks run --suite quick
	$(BIN)/python -m benchmarks report

bench-full: $(INSTALLED)
	$(BIN)/python -m benchmarks run --suite full
	$(BIN)/python -m benchmarks report

# Offline, so nothing is installed: any Python with torch and triton does, .venv's if there is one.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_OPTIONS ?=
gpu:
	@mkdir -p build/gpu
	@$(GPU_PYTHON) -c 'import setuptools; setuptools.setup()' -q egg_info --egg-base build/gpu
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) \
		$(GPU_PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

experiments: $(INSTALLED)
	$(BIN)/python -m experiments

experiments-quick: $(INSTALLED)
	$(BIN)/python -m experiments --quick

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
