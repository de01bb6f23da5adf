"""Names of runs, data sets and files that Windows refuses are refused in a sentence, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from comfyui_l2p.nodes.folders import datasets, files, names, run_files

PLACES = [files.target, datasets.folder, run_files.run_folder]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["what?", "a/b:c", "a<b", "con", "Nul.safetensors", "aux/x", "lpt1 .x", "end.", "dir /x", "a\\b. /c", "captions."],
)
def check_windows_refuses(monkeypatch: pytest.MonkeyPatch, place: Callable[[str], Path], name: str) -> None:
    monkeypatch.setattr(names, "WINDOWS", True)
    with pytest.raises(ValueError, match="Windows lets no file or folder be called"):
        place(name)


@pytest.mark.parametrize("place", PLACES)
def check_other_names_are_taken(monkeypatch: pytest.MonkeyPatch, place: Callable[[str], Path]) -> None:
    monkeypatch.setattr(names, "WINDOWS", True)
    for name in ("my run/con3.a", "console", "a\\..\\ünïcode é", " com10 "):
        assert place(name).name.startswith(name.strip().replace("\\", "/").rpartition("/")[2])
    with pytest.raises(ValueError, match="leads out of"):
        place("../out")
