# Two commands do all the set-up: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.ready
	$(BIN)/python tools/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" -q

# On the code that users run: tests/conftest.py would have XLA compile quickly instead.
test-slow: export XLA_FLAGS += --xla_backend_optimization_level=3
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu" -q

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"bdjax needs Python 3.11 or newer, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .jax_cache build dist *.egg-info
