"""RAM that is free: what others hold is not, and a container has its own limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from comfyui_l2p.l2p_core.device import system_memory

HOLDS = """
import sys
held = bytearray(b"\\1") * (600 << 20)
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(psutil.virtual_memory().available < 2 << 30, reason="too little RAM is free to take some of it")
def test_what_another_program_holds_is_not_free() -> None:
    before = system_memory.free_memory_and_swap()
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        during = system_memory.free_memory_and_swap()
        process.kill()
    # Others take and give back memory at the same time.
    assert during < before - (200 << 20)
    assert during <= system_memory.total_memory_and_swap()


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000", [700]), ("max", []), ("100", [0])], ids=["limit", "none", "beyond it"]
)
def test_a_containers_limit_counts_and_cached_files_make_way(tmp_path: Path, limit: str, expected: list[int]) -> None:
    files = [tmp_path / name for name in ("limit", "used", "stat")]
    for path, text in zip(files, (limit, "500", "anon 300\ninactive_file 200\n"), strict=True):
        path.write_text(text, encoding="ascii")
    nowhere = tuple(str(tmp_path / "missing") for _ in files)
    groups = (nowhere, tuple(map(str, files)))
    assert system_memory._left_of_container(groups) == expected  # type: ignore[arg-type]
