"""The files, links and folders that the pages name are there, and all of them are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("l2p_core/", "nodes/", "train/", "tests/", "web/", "docs/", "locales/", "example_workflows/", "subgraphs/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w./-]+)`", text) if name.startswith(OWN)}
    linked = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in linked if not (page.parent / link).exists()]
    assert not missing


def test_the_folder_table_is_complete() -> None:
    """Every package folder has its row, and every flat file of the core its name in the core's row."""
    text = PAGES[0].read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w./]+)/` \| (.*) \|$", text, re.MULTILINE))
    packages = {
        file.parent.relative_to(ROOT).as_posix()
        for part in ("l2p_core", "nodes", "train")
        for file in (ROOT / part).rglob("__init__.py")
    }
    assert packages <= rows.keys(), sorted(packages - rows.keys())
    files = {path.stem for path in (ROOT / "l2p_core").glob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(\w+)`", rows["l2p_core"]))
    assert files == named, sorted(files ^ named)
