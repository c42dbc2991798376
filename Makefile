# Everything one does in the checkout; `make help` lists it.
#
# What it needs lies in a private environment, .venv, made on first use. Four stamps in it say what has been installed
# there: .base (build and run), .test, .dev (the checkers) and .fuzz. They are renewed when pyproject.toml changes. Nothing
# outside the checkout is written, but for `make peers`.
#
#   PYTHON=python3.12   the interpreter to make the environment with
#   ARGS="-x -k ring"   more arguments for pytest, the demo or the benchmarks
#   SECONDS=30          how long each torture test goes on under `make slow`, each target under `make fuzz`
#   EXAMPLES=2000       how many cases each test tries under `make examples`
#   JOBS=2              how many targets `make fuzz` runs at once

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
PYTEST := $(PY) -m pytest
# As many tests at once as there are processors: most of them wait, for processes that start and end. ARGS=-n0: one by one.
BESIDE := -n auto --maxprocesses 8 --dist worksteal
SECONDS ?= 30
JOBS ?= $(shell nproc)
EXAMPLES ?= 2000
SANITIZED := build/sanitize
COPIED := pyproject.toml setup.py README.md LICENSE vhostmp shm workers tools tests typings
# Alignment is left out: a guest may put a table of indirect descriptors at any address, and each field is one load.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined
SANITIZE := tests/unit/shm tests/unit/workers tests/unit/vhostmp tests/oracle tests/fuzz tests/adversity/test_kill_points.py \
  tests/adversity/test_kill_beside.py
STUBS = $(subst /,.,$(patsubst %.pyi,vhostmp/%,$(shell find shm workers tools -name '*.pyi')))

# Prints the requirements of a table in pyproject.toml, one a line.
define REQUIREMENTS
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
extras = project["project"]["optional-dependencies"]
table = {"base": project["build-system"]["requires"] + project["project"]["dependencies"], **extras}
print("\n".join(line for line in table[sys.argv[1]] if not line.startswith("vhostmp")))
endef
export REQUIREMENTS
install = $(PY) -c "$$REQUIREMENTS" $(1) > $(VENV)/$(1).txt && $(PIP) install -r $(VENV)/$(1).txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo bench test quick slow examples fuzz planted peers testpeers oracle model sanitize lint types layout \
        checklayout order stub format dist testinstalled ci clean

help: ## List the targets (the default)
	@echo "usage: make TARGET [ARGS=...]"; echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# ---- the environment and the compiled modules

$(VENV)/.base: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON); on Debian, as root: apt-get install python3 python3-venv python3-dev gcc make" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null && command -v gcc >/dev/null \
	  || { echo "missing pip for venv, Python.h or gcc; on Debian, as root: apt-get install python3-venv python3-dev gcc" >&2; exit 1; }
	@echo "making $(VENV) and building (a minute or two, once)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(call install,base)
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(call install,test)
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	@$(call install,fuzz)
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(call install,dev)
	@touch $@

build: $(VENV)/.base ## Compile what has changed
	@$(PY) setup.py --quiet build_ext --inplace

# ---- run it

demo: build ## Run the back-end-swap demo: no root, no QEMU, no set-up
	$(PY) -m vhostmp demo $(ARGS)

bench: build ## Measure packets a second, with the spread, against its peers
	$(PY) -m vhostmp bench $(ARGS)

# ---- test it

test: build $(VENV)/.test ## Run every test but those against other people's programs
	$(PYTEST) -m "not peer" $(BESIDE) $(ARGS)

quick: build $(VENV)/.test ## Run the tests that take less than a quarter of a second
	$(PYTEST) -m "not peer and not slow" $(ARGS)

slow: build $(VENV)/.test ## Run the slow tests for longer (SECONDS=30 each where they torture)
	SECONDS=$(SECONDS) $(PYTEST) -m "slow and not peer" --timeout $$((120 + 4 * $(SECONDS))) $(ARGS)

examples: build $(VENV)/.test ## Try messages, rings and descriptor tables for longer (EXAMPLES=2000 a test), others each time
	EXAMPLES=$(EXAMPLES) SEED="$${SEED-$$(date +%s)}" $(PYTEST) --timeout 1800 tests/fuzz tests/oracle $(ARGS)

fuzz: build $(VENV)/.fuzz ## Fuzz with coverage and sanitizers, SECONDS=30 a target, JOBS=2 at once (needs clang: make peers)
	$(PY) -m tests.fuzz.run --seconds $(SECONDS) --jobs $(JOBS) $(ARGS)

planted: build $(VENV)/.fuzz ## Plant bugs, one at a time, and see the fuzzers find them
	$(PY) -m tests.fuzz.planted $(ARGS)

peers: ## Install what peer tests and fuzzers use: Debian packages and a kernel to boot (as root)
	tools/peers.sh

testpeers: build $(VENV)/.test ## Run the tests against QEMU and DPDK; a missing peer is a failure
	VHOSTMP_PEERS=require $(PYTEST) -m peer $(ARGS)

oracle: build $(VENV)/.test ## Hold ours against Linux's vhost-net in a guest (ARGS="--seed 7 --cases 5000"; after make peers, as root)
	$(PY) -m tests.kernel $(ARGS)

model: build $(VENV)/.test ## Walk through every state of the protocols' models; SECONDS=30 for the largest
	SECONDS=$(SECONDS) $(PYTEST) -rA tests/model $(ARGS)

# Fewer examples than elsewhere: what `make fuzz` builds has the same sanitizers, and finds its way by coverage.
sanitize: build $(VENV)/.test ## Run rings, memory and messages under the address and undefined-behaviour sanitizers, in a copy; deaths at each kill point
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	tar -cf - --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar -xf - -C $(SANITIZED)
	cd $(SANITIZED) && VHOSTMP_DEBUG=1 CFLAGS="$(SANITIZERS)" \
	  $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc EXAMPLES=100 \
	  $(abspath $(PY)) -m pytest --capture=sys $(BESIDE) $(SANITIZE) $(ARGS)

# ---- check it

lint: $(VENV)/.dev ## Check style, spelling and pyproject.toml
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint shm workers tools tests
	$(VENV)/bin/codespell
	$(VENV)/bin/validate-pyproject pyproject.toml

types: build $(VENV)/.dev ## Check types, strictly: mypy and pyright
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)

layout: $(VENV)/.base ## Write shm/layout.h and shm/layout.pxd from shm/layout.py
	$(PY) -m vhostmp.tools.gen_layout

checklayout: $(VENV)/.base ## Check that they are up to date
	$(PY) -m vhostmp.tools.gen_layout --check

order: $(VENV)/.base ## Check that each ordered access carries its argument, its pair and its test
	$(PY) -m vhostmp.tools.check_order

stub: build $(VENV)/.dev ## Compare the compiled modules with their .pyi
	$(PY) -m mypy.stubtest --mypy-config-file pyproject.toml --allowlist typings/stubtest.txt \
	  --ignore-disjoint-bases $(STUBS)

format: $(VENV)/.dev ## Put the sources into the form that `make lint` asks for
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# ---- ship it

dist: $(VENV)/.dev ## Make the sdist, and the wheel from it
	rm -rf dist
	$(PY) -m build

testinstalled: dist ## Install the wheel into a clean environment and try it there
	rm -rf build/installed
	$(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip --quiet --disable-pip-version-check install dist/*.whl
	cd / && $(CURDIR)/build/installed/bin/python -I $(CURDIR)/tools/check_installed.py

# What measures no time runs beside each other; of the fuzz targets all at once.
ci: test testpeers ## All that must hold before a change lands
	$(MAKE) --jobs=$$(nproc) --output-sync=target lint types checklayout order stub testinstalled
	$(MAKE) sanitize
	$(MAKE) fuzz SECONDS=60 JOBS=8

clean: ## Remove everything that was built, the environment too
	rm -rf build dist $(VENV) vhostmp.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find shm workers vhostmp tools tests -name '*.so' -delete
	find shm workers vhostmp tools tests -name __pycache__ -prune -exec rm -rf {} +
