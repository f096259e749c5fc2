# Two commands do all the set-up: `make demo` and `make test`. Each makes its own .venv first.

ARGS ?=
# For `make faults`: how long faults are made, and the seed of an earlier run to repeat its draws.
SEED ?=
VENV := .venv
BIN := $(VENV)/bin
# What `venv` writes goes here, and it is gone when the environment is whole.
UNFINISHED := $(VENV)/unfinished
# Python tells of Ctrl-C with a traceback: what goes to stderr is shown only after a failure of another kind.
attempt = trap 'exit 130' INT; $(1) 2>$(2) || { cat $(2) >&2; false; }
# The first Python that is new enough; name another with `make demo PYTHON=…`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Of the user's environment, what would give another Python, other packages or another place to install to.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONWARNINGS PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONPLATLIBDIR
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIREMENT PIP_EDITABLE PIP_QUIET PIP_VERBOSE
# Python reads an editable install's path in the encoding of the locale; for the locale C it takes one with UTF-8 instead.
unexport LC_ALL
export LC_CTYPE = C

# While Python starts, it tells of Ctrl-C with a traceback, but not of SIGTERM. A shell has what it starts in the background
# ignore Ctrl-C, and sends SIGTERM instead.
stoppable = trap 'kill -TERM $$p 2>/dev/null' INT TERM; $(1) & p=$$!; wait $$p; code=$$?; \
	while kill -0 $$p 2>/dev/null; do wait $$p; code=$$?; done; exit $$code
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo up test test-all test-unit check format lint types imports faults soak bench clean

demo: $(VENV)/demo-installed
	@$(call stoppable,$(BIN)/queryd demo $(ARGS))

up: $(VENV)/demo-installed
	@$(call stoppable,$(BIN)/queryd up $(ARGS))

# Two workers, for most tests wait for servers that they have started. A file's tests stay together, as they share such
# servers, and files keep their order: the long ones come first. ARGS='-n 0' is one process, for a debugger.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What the embedded servers can show in minutes.
test: $(VENV)/dev-installed
	@QUERYD_TEST_BROKER=$${QUERYD_TEST_BROKER:-embedded} $(PYTEST) -m 'not slow' $(ARGS)

# Everything, on Apache Kafka where Docker or Java and Maven are.
test-all: $(VENV)/dev-installed
	@$(PYTEST) $(ARGS)

# No server is started.
test-unit: $(VENV)/dev-installed
	@$(PYTEST) tests/unit tests/contract -m 'not slow' $(ARGS)

check: format lint types imports test-all

format: $(VENV)/dev-installed
	$(BIN)/ruff format --check .

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .

types: $(VENV)/dev-installed
	$(BIN)/mypy

imports: $(VENV)/dev-installed
	$(BIN)/lint-imports

faults: SECONDS ?= 120
soak: SECONDS ?= 3600
# The last line says how it went; a soak is nothing but long.
faults soak: $(VENV)/dev-installed
	@exec $(BIN)/python -m tests.faults.run --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(VENV)/bench-installed
	@$(BIN)/python -m bench $(or $(ARGS),--plots docs)

clean:
	rm -rf $(VENV) .queryd .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# An environment belongs to one Python and one place: neither survives an upgrade or a move. Its pip knows both. One that
# was interrupted while it was made is made again.
.PHONY: usable
usable:
	@test ! -e $(UNFINISHED) || rm -rf $(VENV)
	@test ! -e $(VENV) || { $(BIN)/python -c 'import pip' && \
		head -n 2 $(BIN)/pip | grep --quiet --fixed-strings "$$($(BIN)/python -c 'import sys; print(sys.prefix)')/bin/"; } 2>/dev/null || \
		{ echo "$(VENV) was made by another Python, or in another place: make clean, and then this again" >&2; exit 1; }

$(VENV)/bin/python: | usable
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "queryd needs Python 3.11 or newer$(if $(PYTHON), and PYTHON=$(PYTHON) is not): install it or name it, make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	@$(call attempt,$(PYTHON) -m venv $(VENV),$(UNFINISHED)) || \
		{ rm -rf $(VENV); echo "could not make $(VENV): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@rm $(UNFINISHED)

$(VENV)/demo-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing queryd and its demo into $(VENV) (about a minute, once)" >&2
	@$(call attempt,$(INSTALL) -e '.[demo]',$(VENV)/install.log)
	@touch $@

$(VENV)/dev-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing queryd and its tests into $(VENV) (about a minute, once)" >&2
	@$(call attempt,$(INSTALL) -e '.[dev]',$(VENV)/install.log)
	@touch $@

$(VENV)/bench-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing queryd and the peers of its benchmark into $(VENV) (about a minute, once)" >&2
	@$(call attempt,$(INSTALL) -e '.[bench]',$(VENV)/install.log)
	@touch $@
