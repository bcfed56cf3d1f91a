# `make demo` and `make test` set everything up by themselves; Python 3.11 and make are all they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.baton-set-up

.PHONY: setup demo test lint stubs clean
setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml deploy/setup.sh
	@PYTHON="$(PYTHON)" sh deploy/setup.sh
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/baton demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

stubs: $(STAMP)
	$(BIN)/python proto/generate.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
