# Everything happens in .venv, made with plain venv and pip; nothing else has to be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
TESTS := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo test test-fast coverage test-slow lint format clean

demo: $(STAMP)
	$(BIN)/mlx-redrafter demo

test: $(STAMP)-torch
	$(TESTS)

# The same tests; takes longer, and prints which lines no test runs.
coverage: $(STAMP)-torch
	$(TESTS) --cov --cov-report=term

# Unit tests of the packages that need no trained model: half a minute.
FAST := tests/test_architecture.py tests/target tests/drafting tests/decoding tests/tuning
test-fast: $(STAMP)
	$(TESTS) -m "not slow and not model" $(FAST)

test-slow: $(STAMP)-torch
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_types.py
	$(BIN)/vulture

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[linux,dev]'
	touch $@

# The PyTorch reference is for parity tests only; it is large, so the demo does without.
$(STAMP)-torch: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[torch]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
