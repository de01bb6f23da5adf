# Everything runs in a virtual environment of its own, made on first use and again when the packaging changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check typecheck clean

demo: $(READY)
	$(BIN)/l2p demo --output demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy -p comfyui_l2p
	$(BIN)/python -m pytest

typecheck: $(READY)
	$(BIN)/python -m mypy -p comfyui_l2p

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[standalone,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV)
