"""Names of runs, data sets and files that Windows refuses are refused in a sentence, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from comfyui_l2p.nodes.folders import datasets, evaluations, files, names, prompt_files, run_files

PLACES = [files.target, datasets.folder, run_files.run_folder]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["what?", "a/b:c", "a<b", "con", "Nul.safetensors", "aux/x", "lpt1 .x", "end.", "dir /x", "a\\b. /c", "captions."],
)
def check_windows_refuses(monkeypatch: pytest.MonkeyPatch, place: Callable[[str], Path], name: str) -> None:
    monkeypatch.setattr(names, "WINDOWS", True)
    with pytest.raises(ValueError, match="Windows does not allow the name"):
        place(name)


@pytest.mark.parametrize("place", PLACES)
def check_other_names_are_taken(monkeypatch: pytest.MonkeyPatch, place: Callable[[str], Path]) -> None:
    monkeypatch.setattr(names, "WINDOWS", True)
    for name in ("my run/con3.a", "console", "a\\..\\ünïcode é", " com10 "):
        assert place(name).name.startswith(name.strip().replace("\\", "/").rpartition("/")[2])
    with pytest.raises(ValueError, match="leads out of"):
        place("../out")


@pytest.mark.parametrize("place", [*PLACES, evaluations.page, prompt_files.work_folder])
@pytest.mark.parametrize("name", ["n" * 201, "名" * 67])
def check_a_name_that_no_disk_takes_is_refused_in_a_sentence(place: Callable[[str], Path], name: str) -> None:
    """Suffixes come to it, and 255 bytes is all that file systems take."""
    with pytest.raises(ValueError, match=r"The name '[n名]{40}'\.\.\. is too long: shorten it to 200 letters"):
        place(name)
    assert place(name[:60]).name


def check_a_folder_with_a_long_name_that_is_there_is_taken(tmp_path: Path) -> None:
    name = "n" * 250
    (tmp_path / name).mkdir()
    assert names.below(tmp_path, name) is not None
