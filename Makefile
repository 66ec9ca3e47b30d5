# Everything here works in a fresh clone with python3 and network, and nothing else. The provider itself runs on
# Python 3.11 and newer; the PostgreSQL that the tests and the demo use comes as a wheel for 3.11 and 3.12 alone.
#
#   make demo    a story: a pod's secrets mounted, used, rotated
#   make test    everything that has to hold before a change lands
#   make bench   measure it, and write docs/benchmarks.md; QUICK=1 in a minute or two, docs/ left as it is
#   make soak    a node under load and outages for MINUTES=10: nothing may be lost, and nothing left at the end
#   make fuzz    hostile input through the driver's socket, EXAMPLES=5000 of each of eight kinds
#   make unit    the tests alone, for the loop while writing; T="tests/test_spc.py -k alias" narrows them
#   make check   the linters, the type checker and what can be known of the locks offline
#   make audit   ask, on the network, for new advisories and yanked versions of what is locked
#   make dist    the wheel and its bill of materials, with checksums, in dist/
#   make tools   fetch kubectl, helm and promtool into .cache/tools, checksummed; the tests do it by themselves
#   make stubs   generate provider/v1alpha1 from protos
#   make schemas generate the JSON Schemas of a class from the parser's tables
#   make lock    bring requirements/ in line with pyproject.toml, and what is told of it: make bills
#   make upgrade the same, to the newest versions that it allows
#   make clean   remove everything that make made

# The first interpreter on the path that will do.
PYTHON ?= $(firstword $(foreach python,python3 python3.12 python3.11,\
	$(shell $(python) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) and print("$(python)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_FLAGS := --quiet --disable-pip-version-check
T ?=
# As many as the smallest machine of CI has cores: leases that live for seconds are renewed late beside more.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test bench soak fuzz unit check audit dist coverage tools stubs schemas lock bills upgrade clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(READY)
	@$(BIN)/python -m tests.demo

# On a quiet machine: what else runs is in every number.
bench: $(READY)
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick)

MINUTES ?= 10
soak: $(READY)
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

# What one of these finds belongs into the tests as an example.
EXAMPLES ?= 5000
fuzz: $(READY)
	@FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -s --show-capture=no tests/test_hostile.py

# Stops at the first part that fails; the parts are ordered by how fast they tell.
test: check coverage
	@echo "All of it holds."

check: $(READY)
	@echo "== ruff: lint and format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "Run '$(BIN)/ruff format' on the files that --diff names:"; $(BIN)/ruff format --check .; exit 1; }
	@echo "== mypy --strict"
	@$(BIN)/mypy --strict
	@echo "== import-linter: the rooms of provider/"
	@$(BIN)/lint-imports --no-logo
	@echo "== locks: pinned, hashed, and without a fault that requirements/advisories.toml knows"
	@$(BIN)/python -m requirements.audit
	@echo "== zizmor: the workflows of .github/"
	@$(BIN)/zizmor --offline --quiet --persona pedantic .github

# These four rooms are pure, so every branch of them can be reached.
PURE := provider/spc/*,provider/versions*,provider/errors*,provider/redact*

# A module's tests share a server, so they stay together; the marker `alone` is for those that measure.
TOGETHER := -n $(WORKERS) --dist loadscope -m "not alone"
ALONE := -m alone

coverage: $(READY)
	@echo "== pytest: unit, property, integration, stubs, locks and the built wheel, $(WORKERS) processes"
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(TOGETHER)
	@echo "== pytest: what needs the machine to itself"
	@$(BIN)/coverage run -m pytest $(ALONE)
	@$(BIN)/coverage combine --quiet
	@echo "== coverage, branches counted: at least 95 %"
	@$(BIN)/coverage report --fail-under=95
	@echo "== coverage of the pure rooms: 100 %"
	@$(BIN)/coverage report --fail-under=100 --include='$(PURE)'

unit: $(READY)
ifeq ($(strip $(T)),)
	@$(BIN)/python -m pytest -q $(TOGETHER)
	@$(BIN)/python -m pytest -q $(ALONE)
else
	@$(BIN)/python -m pytest -q $(T)
endif

# Once: a second time there is nothing to fetch.
tools: $(READY)
	@$(BIN)/python -m tests.tools

coverage unit: tools

stubs: $(READY)
	@$(BIN)/python protos/generate.py
	@echo "provider/v1alpha1 is generated anew."

schemas: $(READY)
	@$(BIN)/python -m provider.spc.schema provider/spc deploy/schemas
	@echo "The JSON Schemas are generated anew."

LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command "make lock" $(LOCK_FLAGS)
BUILD_REQUIRES = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")

# The image's two locks are parts of dev.txt, so that it holds what the tests ran with.
upgrade: LOCK_FLAGS := --upgrade
lock upgrade: | $(READY)
	@$(LOCK) --extra dev --output-file requirements/dev.txt pyproject.toml
	@$(LOCK) --constraint requirements/dev.txt --output-file requirements/runtime.txt pyproject.toml
	@$(BIN)/python -c '$(BUILD_REQUIRES)' | \
		$(LOCK) --constraint requirements/dev.txt --output-file requirements/build.txt -
	@echo "requirements/ is locked."
	@$(MAKE) --no-print-directory bills

# Of what is installed, so that comes first.
bills: $(READY)
	@$(BIN)/python -m requirements.licences
	@$(BIN)/python -m requirements.sbom
	@echo "docs/licences.md and the bill of materials are those of the locks."

audit: $(READY)
	@$(BIN)/python -m requirements.audit --online
	@echo "No advisory and no yanked version."

# The wheel has its bill inside, too; beside it, it can be looked at, and signed, without it.
dist: $(READY)
	@rm -rf dist
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@cp requirements/vault-csi-provider.cdx.json dist/
	@cd dist && sha256sum *.whl *.json > SHA256SUMS && cat SHA256SUMS

# Stamped, so that a second make is instant; built anew when a lock or the metadata changes.
$(READY): requirements/dev.txt pyproject.toml
	@test -n "$(PYTHON)" || \
		{ echo "Python 3.11 or 3.12 is needed, and no python3, python3.12 or python3.11 here is one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV) from requirements/dev.txt: some 700 MB with the servers that the tests use, once."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install $(PIP_FLAGS) --require-hashes -r requirements/dev.txt
	@$(BIN)/pip install $(PIP_FLAGS) --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find provider tests protos requirements -name __pycache__ -type d -prune -exec rm -rf {} +
