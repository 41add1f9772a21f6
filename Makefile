# make quickstart   install, then search, report and name the command that serves the winner (no GPU needed)
# make test         install with what the tests need, then run them
# make check        what must hold before a commit: ruff, formatting, mypy, tests
# make chaos        kill everything a study has, at random, and write to docs/reliability.md how it came out (20 minutes)
# make lock         resolve pyproject.toml again and write the locks
# make clean        remove the environment and everything that can be made again; runs/ stays
#
# Installing is done once for each content of requirements*.lock and pyproject.toml.
#   PYTHON=python3.12       another interpreter, 3.11 or later
#   VENV=path               another place for the environment
#   TORCH_ARGS='...'        arguments of pip for torch alone, such as --index-url with the index of the build you want;
#                           a plain Linux install brings the CUDA build, several GB: give a CPU index where that is too much

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
UV ?= uv==0.13.9
PYTEST_ARGS ?=

BIN := $(VENV)/bin
sum = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
RUNTIME := $(VENV)/.runtime-$(call sum,requirements.lock pyproject.toml)
DEV := $(VENV)/.dev-$(call sum,requirements-dev.lock pyproject.toml)

export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= true

.PHONY: quickstart install test check chaos lock clean

quickstart: $(RUNTIME)
	$(BIN)/statespan sweep examples/quickstart.yaml

install: $(RUNTIME)

test: $(DEV)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: $(DEV)
	$(BIN)/python -m tests.chaos_report --write docs/reliability.md $(CHAOS_ARGS)

# torch goes first and alone: the lock names its version without a build, and what is installed satisfies it
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'statespan needs Python 3.11 or later; $(PYTHON) is older: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)'

$(RUNTIME): $(BIN)/uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -r requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.runtime-* && touch $@

$(DEV): $(RUNTIME)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -r requirements-dev.lock
	rm -f $(VENV)/.dev-* && touch $@

# packages of the CUDA build come with torch itself; naming them would force them on every machine
COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --annotation-style line
PLAIN = sed -E -e 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' -e '/^(nvidia|cuda)-/d'
lock: $(BIN)/uv
	$(COMPILE) $(LOCK_ARGS) --quiet --output-file requirements.lock
	$(COMPILE) $(LOCK_ARGS) --quiet --extra dev --constraint requirements.lock --output-file requirements-dev.lock
	$(PLAIN) -e '/^triton==/d' -i requirements.lock
	$(PLAIN) -e 's/-c requirements.lock, |, -c requirements.lock//' -i requirements-dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
