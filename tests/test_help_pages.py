"""The help pages of the nodes, which the host's frontend looks up by node and language."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
NODES = sorted(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")))
PARTS = {
    "headings": r"^#+ ",
    "list entries": r"^- ",
    "rows of tables": r"^\|",
    "paragraphs": r"\n\n",
}


def page(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8").strip()


def test_every_node_has_its_pages_and_no_page_is_left_over() -> None:
    expected = {f"{node}.md" for node in NODES} | {f"{node}/zh.md" for node in NODES}
    assert {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")} == expected


@pytest.mark.parametrize("node", NODES)
def test_both_languages_say_the_same(node: str) -> None:
    """Part by part, the same inputs and the same numbers, as far as these can be counted."""
    english, chinese = page(f"{node}.md"), page(f"{node}/zh.md")
    for part, pattern in PARTS.items():
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], f"{part}: {counts[0]} in English, {counts[1]} in Chinese"
    code = [sorted(set(re.findall(r"`([^`]+)`", text))) for text in (english, chinese)]
    assert code[0] == code[1]
    assert re.search("[\u4e00-\u9fff]", chinese)
