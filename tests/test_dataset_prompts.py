"""Lists of prompts as people keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_folders import write_csv

from comfyui_l2p.l2p_core.dataset import prompts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a fox, asleep\r\n\r\n  雪中的狐狸 \r\na fox, asleep\na hare".encode(encoding))
    assert prompts.read(path) == ["a fox, asleep", "雪中的狐狸", "a hare"]


@pytest.mark.parametrize("column", ["prompt", "text", "Caption"])
@pytest.mark.parametrize("header", [["{}"], ["seed", "{}"], ["image", "{}", "seed"]])
def test_a_table_has_them_in_a_column(tmp_path: Path, column: str, header: list[str]) -> None:
    names = [name.format(column) for name in header]
    rows = [["1" if name != column else text for name in names] for text in ("a fox, asleep", 'a "red" hare')]
    assert prompts.read(write_csv(tmp_path / "p.csv", rows, names)) == ["a fox, asleep", 'a "red" hare']


def test_tabs_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("n\tcaption\n1\ta fox, asleep\n2\ta hare\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"text": "a fox"}\n{"text": "a hare", "n": 1}\n', encoding="utf-8")
    assert prompts.read(tmp_path / "p.tsv") == ["a fox, asleep", "a hare"]
    assert prompts.read(tmp_path / "p.jsonl") == ["a fox", "a hare"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.csv", "prompt\na fox, asleep\n", "line 2: it has more cells than there are columns: quote"),
        ("p.csv", 'prompt\n"a fox\n', "line 2: the quotes do not match"),
        ("p.csv", "words\na fox\n", "has no column named prompt or text or caption"),
        ("p.jsonl", '{"text": "a fox"}\n{"words": 1}\n', "line 2: it has no caption"),
        ("p.txt", "\n \n", "contains no prompt: write one per line"),
        ("p.docx", "a fox", "is not a list of prompts"),
        ("gone/p.txt", None, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        prompts.read(path)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="half a character"):
        prompts.from_text("a \ud800 fox")


def test_lines_that_begin_with_a_number_sign_are_comments_and_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\na fox #1\n  # more\na hare\n", encoding="utf-8")
    assert prompts.read(path) == ["a fox #1", "a hare"]
    assert (
        prompts.skipped(path)
        == "2 lines that begin with # are skipped as comments in prompts.txt, the first: '# animals'."
    )
    path.write_text("a fox\n", encoding="utf-8")
    assert prompts.skipped(path) is None
    assert prompts.skipped(write_csv(tmp_path / "p.csv", [("# a fox",)], ("prompt",))) is None
