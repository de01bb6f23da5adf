# Everything runs in a virtual environment of its own, made on first use and again when the packaging changes.
PYTHON ?= python3
VENV ?= .venv
# The version that figures and tests were made with; any from 2.4 on works.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# mypy does not follow the import hook that maps the repository root to the package's name; it follows a link.
TYPECHECK = MYPYPATH=$(VENV)/src $(BIN)/python -m mypy -p comfyui_l2p

.PHONY: demo test typecheck types-posix types-windows clean

demo: $(READY)
	$(BIN)/l2p demo --output demo

# One thread for each of the tests' processes, of which there is one a logical processor: of two threads on busy cores
# each waits for the other. Each takes neighbouring files, for the sake of what a file's tests share, and at the end
# half of what another has left. The tests in a running ComfyUI share one server, so they run in one process.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal --ignore tests/host
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/host

# For two systems at once, each with its own cache: mypy takes nothing from that of another.
typecheck: $(READY)
	$(MAKE) --jobs 2 types-posix types-windows

types-posix: $(READY)
	$(TYPECHECK)

types-windows: $(READY)
	$(TYPECHECK) --platform win32 --cache-dir .mypy_cache/win32

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[standalone,dev]"
	mkdir -p $(VENV)/src && ln -sfn "$(CURDIR)" $(VENV)/src/comfyui_l2p
	touch $(READY)

clean:
	rm -rf $(VENV)
