# `make demo` and `make test` each work alone on a machine that has only Python and make:
# they create .venv, install the package into it and run. Every path is relative and every
# tool is run as `python -m`, so that a checkout whose path has spaces works.

PYTHON ?= python3
# What follows `python -m negative_cache.demo`, e.g. make demo DEMO_ARGS="--steps 500".
DEMO_ARGS ?=
# What follows `python benchmarks/report.py`, e.g. make report REPORT_ARGS="--full".
REPORT_ARGS ?=
# What follows `python -m pytest`, e.g. make test PYTEST_ARGS="-k losses".
PYTEST_ARGS ?=
# Test processes; PYTEST_WORKERS=0 runs the tests in the main process (for --pdb).
PYTEST_WORKERS ?= 2

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# Exists only when an installation has run to its end.
STAMP := $(VENV)/.installed
# Holds the process id of the installation under way: what an interrupted one leaves behind.
INSTALLING := $(VENV)/.installing
# The demo's data are the functions of the installed packages: every target installs the same
# extras, so that the demo's corpus does not depend on whether `make test` has run before.
EXTRAS := demo,test
# The site is built by an environment of its own for the same reason. Docstrings are read and not
# run, so that it needs neither TensorFlow nor the package.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo report docs test test-keras3 test-keras2 lint format smoke clean clean-venv

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON (python3), DEMO_ARGS, REPORT_ARGS, PYTEST_ARGS, PYTEST_WORKERS (2)"

venv: $(STAMP) ## Create .venv and install the package, editable

demo: $(STAMP) ## Train on real data: in-batch softmax against the negative cache
	@$(VENV_PYTHON) -m negative_cache.demo $(DEMO_ARGS)

report: $(STAMP) ## Measure the comparison behind the claims, write benchmarks/RESULTS.md
	@TF_USE_LEGACY_KERAS=0 KERAS_BACKEND=tensorflow $(VENV_PYTHON) benchmarks/report.py $(REPORT_ARGS)

run_pytest = KERAS_BACKEND=tensorflow $(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test: $(STAMP) ## Run the whole test suite under Keras 3, then under Keras 2
	@keras3=0; keras2=0; \
	trap 'exit 130' INT; trap 'exit 143' TERM; \
	echo "== Keras 3"; TF_USE_LEGACY_KERAS=0 $(run_pytest) || keras3=$$?; \
	echo "== Keras 2"; TF_USE_LEGACY_KERAS=1 $(run_pytest) || keras2=$$?; \
	verdict() { if [ $$1 -eq 0 ]; then echo passed; else echo "FAILED (pytest exit $$1)"; fi; }; \
	echo "== Keras 3: $$(verdict $$keras3); Keras 2: $$(verdict $$keras2)"; \
	[ $$keras3 -eq 0 ] && [ $$keras2 -eq 0 ]

test-keras3: $(STAMP) ## Run the test suite under Keras 3 only
	@TF_USE_LEGACY_KERAS=0 $(run_pytest)

test-keras2: $(STAMP) ## Run the test suite under Keras 2 only
	@TF_USE_LEGACY_KERAS=1 $(run_pytest)

lint: $(STAMP) ## Check style, formatting and types
	@status=0; \
	$(VENV_PYTHON) -m ruff check . || status=1; \
	$(VENV_PYTHON) -m ruff format --check . || status=1; \
	$(VENV_PYTHON) -m mypy || status=1; \
	exit $$status

format: $(STAMP) ## Format the code and fix what ruff can fix
	@$(VENV_PYTHON) -m ruff check --fix-only .
	@$(VENV_PYTHON) -m ruff format .

smoke: ## Build sdist and wheel into dist/, try the wheel in an empty environment (TENSORFLOW=newest KERAS=3)
	@.ci/smoke $(or $(TENSORFLOW),newest) $(or $(KERAS),3) $(PYTHON)

docs: $(DOCS_STAMP) ## Build the site into site/, with links checked
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict
	@echo "Built site/index.html"

clean: ## Remove build products and caches, keep .venv
	@rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: clean ## Remove .venv and .venv-docs too
	@rm -rf $(VENV) $(DOCS_VENV)

$(DOCS_STAMP): docs/requirements.txt
	@rm -rf $(DOCS_VENV)
	@"$(PYTHON)" -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# The installation. $(error) stops with one line; a failing recipe would print make's own as well.

at_least_3_10 = import sys; sys.exit(sys.version_info < (3, 10))
usable_venv = $(VENV_PYTHON) -c 'import pip; $(at_least_3_10)' 2>/dev/null

problem = $(shell \
	if [ -e $(INSTALLING) ]; then \
	  if kill -0 "$$(cat $(INSTALLING))" 2>/dev/null; then \
	    echo "another make (process $$(cat $(INSTALLING))) is installing into $(VENV): wait for it to end, or remove $(INSTALLING)"; \
	    exit; \
	  fi; \
	elif [ -e $(VENV) ]; then \
	  $(usable_venv) || echo "$(VENV) exists but has no pip or no Python >= 3.10: remove it with 'make clean-venv'"; \
	  exit; \
	fi; \
	if ! command -v "$(PYTHON)" >/dev/null 2>&1; then \
	  echo "$(PYTHON) not found: install Python >= 3.10, or name one with 'make PYTHON=/path/to/python3'"; \
	elif ! "$(PYTHON)" -c '$(at_least_3_10)' 2>/dev/null; then \
	  echo "Python >= 3.10 is needed, $(PYTHON) is '$$("$(PYTHON)" --version 2>&1 | head -n 1)': name another with 'make PYTHON=/path/to/python3'"; \
	elif ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or name another Python with 'make PYTHON=/path/to/python3'"; \
	fi)

# Only what an interrupted installation left is deleted; a .venv made by hand is installed into.
$(STAMP): setup.py pyproject.toml
	$(if $(problem),$(error $(problem)))
	@set -e; \
	if [ -e $(INSTALLING) ]; then echo "Removing the $(VENV) of an interrupted installation."; rm -rf $(VENV); fi; \
	fresh=0; [ -e $(VENV) ] || fresh=1; \
	mkdir -p $(VENV); echo $$$$ > $(INSTALLING); rm -f $@; \
	if [ $$fresh -eq 1 ]; then "$(PYTHON)" -m venv $(VENV); fi; \
	echo "Installing negative-cache and its dependencies into $(VENV) (TensorFlow: about 600 MB to download the first time)."; \
	if ! $(VENV_PYTHON) -m pip install --disable-pip-version-check --editable ".[$(EXTRAS)]"; then \
	  [ $$fresh -eq 1 ] || rm -f $(INSTALLING); \
	  echo "Installation failed, see pip's message above (is there a TensorFlow for $$($(VENV_PYTHON) --version)?)." >&2; \
	  exit 1; \
	fi; \
	touch $@; rm -f $(INSTALLING)
