"""A real ComfyUI server with the pack, for tests that use it as a user's machine would: over HTTP and websocket.

The checkout is found at $COMFYUI_PATH, else where this pack sits in one, else at ~/comfy/ComfyUI; its interpreter at
$COMFYUI_PYTHON, else in the checkout's .venv. The server gets a base directory of its own, so that nothing of the
user's models, settings and custom nodes is read or changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from host_server import Host, Server  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NO_HOST = "no ComfyUI: set COMFYUI_PATH to a checkout (and COMFYUI_PYTHON to its interpreter)"

collect_ignore = ["inside"]
"""For the host's interpreter only, see test_inside.py."""


def find_host() -> Host | None:
    """The checkout and interpreter to test in, None if there is none."""
    candidates = [os.environ.get("COMFYUI_PATH"), ROOT.parents[1], Path.home() / "comfy" / "ComfyUI"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "comfy" / "sd.py").is_file():
            path = Path(candidate).resolve()
            inside = [path / ".venv" / "bin" / "python", path / ".venv" / "Scripts" / "python.exe"]
            pythons = [Path(os.environ["COMFYUI_PYTHON"])] if "COMFYUI_PYTHON" in os.environ else inside
            python = next((python for python in pythons if python.is_file()), None)
            return Host(path, python) if python else None
    return None


@pytest.fixture(scope="session")
def host() -> Host:
    found = find_host()
    if found is None:
        pytest.skip(NO_HOST)
    return found


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(host, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once how to run what was skipped; the short report names no reasons."""
    if find_host() is None:
        terminalreporter.write_line(f"The tests in a running host were skipped, {NO_HOST}.")
