"""A real ComfyUI server with the pack, for tests that use it as a user's machine would: over HTTP and websocket.

The checkout is found at $COMFYUI_PATH, else where this pack sits in one, else at ~/comfy/ComfyUI; its interpreter at
$COMFYUI_PYTHON, else in the checkout's .venv. The server gets a base directory of its own, so that nothing of the
user's models, settings and custom nodes is read or changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from host_server import Host, Server  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NO_HOST = "no ComfyUI: set COMFYUI_PATH to a checkout (and COMFYUI_PYTHON to its interpreter)"

INSIDE = Path(__file__).parent / "inside"
collect_ignore = ["inside"]
"""For the host's interpreter only, see `inside`."""


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


@pytest.fixture(scope="session", autouse=True)
def inside(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[str]]]:
    """The checks inside the host, in two processes that start before the first of the host's tests: they take minutes,
    each mostly of one core."""
    wanted = any(item.path.name == "test_inside.py" for item in request.session.items)
    found = find_host()
    if not wanted or found is None:
        yield []
        return
    files = sorted(INSIDE.glob("check_*.py"))
    processes = [_checks(found, files[half::2]) for half in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def _checks(host: Host, files: list[Path]) -> subprocess.Popen[str]:
    command = [
        *(host.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull),
        *("--rootdir", INSIDE, "--confcutdir", INSIDE, "--import-mode=importlib"),
        *("-o", "python_files=check_*.py", "-o", "python_functions=check_*", *files),
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        # Of several threads on busy cores each waits for the others.
        env=os.environ | {"COMFYUI_PATH": str(host.path), "OMP_NUM_THREADS": "1", "DATASKETCH": _datasketch()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def _datasketch() -> str:
    """The folder of this library, which hosts do not bring and the checks lend them."""
    found = importlib.util.find_spec("datasketch")
    return found.submodule_search_locations[0] if found and found.submodule_search_locations else ""


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # The host has no tifffile; it is Python alone, so ours does for both.
    packages = tmp_path_factory.mktemp("packages")
    spec = importlib.util.find_spec("tifffile")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, packages / "tifffile")
    with Server(host, tmp_path_factory.mktemp("comfyui"), PYTHONPATH=str(packages)) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask last what has become of the checks inside the host."""
    items.sort(key=lambda item: item.path.name == "test_inside.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once how to run what was skipped; the short report names no reasons."""
    if find_host() is None:
        terminalreporter.write_line(f"The tests in a running host were skipped, {NO_HOST}.")
