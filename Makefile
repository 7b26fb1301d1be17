# Every target works in a fresh clone: it sets up .venv when that is missing or older than the project files.

PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
PROJECT_FILES := pyproject.toml sdk/pyproject.toml
# Judged in full runs only: with ARGS a run may cover a part on purpose.
COVERAGE ?= $(if $(ARGS),0,97)

# How long make soak sends what schemathesis makes up.
MINUTES ?= 30
# How many filters make soak makes up for each way to search.
FILTERS ?= 5000

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve replicas test check bench soak

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo '  ARGS="..." is passed on, for example: make test ARGS="-k search --postgres=embedded"'

demo: .venv/runtime.stamp ## ingest the Python documentation on this machine and search it; KEEP=1 leaves it serving
	@echo "== pgshelf demo"
	@.venv/bin/pgshelf demo $(if $(filter-out 0,$(KEEP)),--keep) $(ARGS)

serve: .venv/runtime.stamp ## serve on http://127.0.0.1:8432, with a PostgreSQL of its own unless PGSHELF_DATABASE_URL is set
	@echo "== pgshelf serve"
	@.venv/bin/pgshelf serve $(ARGS)

replicas: .venv/runtime.stamp ## a primary, two standbys and the service over them on this machine, to try replication
	@$(PY) -m tests.replication $(ARGS)

test: .venv/dev.stamp ## run the tests on a real PostgreSQL, with coverage
	@echo "== pytest, coverage of service and sdk at least $(COVERAGE) %"
	@$(PY) -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadgroup --cov --cov-report=term --cov-fail-under=$(COVERAGE) $(ARGS)

check: .venv/dev.stamp ## lint, format, types, import contracts, generated SDK
	@echo "== ruff check"
	@.venv/bin/ruff check .
	@echo "== ruff format --check"
	@.venv/bin/ruff format --check .
	@echo "== mypy"
	@$(PY) -m mypy
	@echo "== import-linter"
	@.venv/bin/lint-imports --no-logo
	@echo "== sdk/generate.py --check"
	@$(PY) sdk/generate.py --check

bench: .venv/dev.stamp ## run every file in benchmarks/ and print its figures
	@set -e; for file in $(filter-out %/locustfile.py,$(wildcard benchmarks/[!_]*.py)); do echo "== $$file"; $(PY) -m benchmarks.$$(basename $$file .py) $(ARGS); done

soak: .venv/dev.stamp ## kills -9 while clients write, a library moves, a provider fails; outages; slow clients; hostile texts; MINUTES=30 of schemathesis; seeds are printed
	@echo "== kills -9 while clients write, while a library moves and while a provider fails; outages of a provider"
	@$(PY) -m tests.soak $(ARGS)
	@echo "== $(FILTERS) generated filters, each searched every way"
	@$(PY) -m pytest -n 0 -s tests/test_filters.py --filters $(FILTERS)
	@echo "== schemathesis against /schema, $(MINUTES) minutes"
	@$(PY) -m pytest -n 0 -s tests/test_schemathesis.py --soak-minutes $(MINUTES)

.venv/runtime.stamp: $(PROJECT_FILES)
	@$(FIND_PYTHON)
	@echo "== installing pgshelf into .venv"
	@$(PIP) install -e ./sdk -e .
	@touch $@

# pip learned to read [dependency-groups] in 25.1; Python 3.11 brings an older one.
.venv/dev.stamp: .venv/runtime.stamp
	@echo "== installing the development tools into .venv"
	@$(PIP) install 'pip>=25.1'
	@$(PIP) install --group dev
	@touch $@

# The first interpreter that is new enough and able to make an environment; PYTHON=... goes first.
define FIND_PYTHON
usable='import pip, sys; sys.exit(sys.version_info < (3, 11))'; \
if $(PY) -c "$$usable" >/dev/null 2>&1; then exit 0; fi; \
for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
    echo "== making .venv with $$($$python --version)"; \
    exec $$python -m venv .venv; \
  fi; \
done; \
echo "pgshelf needs Python 3.11 or newer with its venv module (Debian: apt install python3-venv)." >&2; \
echo "Name one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
exit 1
endef
