"""The checks in `inside/`, which the host's own interpreter runs while the other tests run, see conftest.py."""

from __future__ import annotations

import subprocess

import pytest
from host_server import Host


@pytest.mark.parametrize("half", range(2))
def test_checks_inside_the_host(host: Host, inside: list[subprocess.Popen[str]], half: int) -> None:
    output, errors = inside[half].communicate(timeout=3600)
    assert inside[half].returncode == 0, f"{output[-8000:]}\n{errors[-2000:]}"
    assert " passed" in output
