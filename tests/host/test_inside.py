"""Hands the checks in `inside/` to the host's own interpreter."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from host_server import Host

INSIDE = Path(__file__).parent / "inside"


def test_checks_inside_the_host(host: Host) -> None:
    command = [
        *(host.python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", os.devnull),
        *("--rootdir", INSIDE, "--confcutdir", INSIDE, "--import-mode=importlib"),
        *("-o", "python_files=check_*.py", "-o", "python_functions=check_*", INSIDE),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"COMFYUI_PATH": str(host.path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
