"""The checks in `inside/`, which the host's own interpreter runs while the other tests go on, see conftest.py."""

from __future__ import annotations

import subprocess

from host_server import Host


def test_checks_inside_the_host(host: Host, inside: subprocess.Popen[str]) -> None:
    output, errors = inside.communicate(timeout=3600)
    assert inside.returncode == 0, f"{output[-8000:]}\n{errors[-2000:]}"
    assert " passed" in output
