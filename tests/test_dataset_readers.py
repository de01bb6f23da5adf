"""What is read from data folders as people's tools write them, and what is named and left out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from data_folders import grey, write_csv

from comfyui_l2p.l2p_core.dataset.readers import Listing, read


def content(listing: Listing) -> list[tuple[str, str, int | None]]:
    return [(sample.name, sample.caption, sample.seed) for sample in listing.samples]


def reasons(listing: Listing) -> dict[str, str]:
    return {problem.where: problem.reason for problem in listing.problems}


def images(folder: Path, *names: str) -> None:
    for name in names:
        grey(folder / name)


def test_the_published_columns(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "deep/b.png")
    write_csv(tmp_path / "metadata.csv", [("deep/b.png", "a hare", 2**64 - 1), ("a.png", " a fox ", 7)])
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", 7), ("deep/b.png", "a hare", 2**64 - 1)]
    assert listing.samples[1].path == tmp_path.resolve() / "deep" / "b.png"
    assert not listing.problems


@pytest.mark.parametrize("header", [("file_name", "text"), ("Text", "extra", " File_Name "), ("image", "prompt")])
def test_other_columns_in_any_order(tmp_path: Path, header: tuple[str, ...]) -> None:
    images(tmp_path, "a.png")
    cells = {"file_name": "a.png", "image": "a.png", "text": "a fox", "prompt": "a fox", "extra": "x"}
    write_csv(tmp_path / "data.csv", [[cells[name.strip().lower()] for name in header]], header)
    assert content(read(tmp_path)) == [("a.png", "a fox", None)]


@pytest.mark.parametrize(
    ("encoding", "newline", "delimiter"),
    [("utf-8-sig", "\r\n", ","), ("utf-8", "\n", ";"), ("utf-16", "\r\n", "\t"), ("utf-8", "\n\n", ",")],
)
def test_tables_from_other_programs(tmp_path: Path, encoding: str, newline: str, delimiter: str) -> None:
    images(tmp_path, "ä.png")
    lines = [["image", "prompt", "seed"], ["ä.png", f'"Füchse{delimiter} ""rot"" 狐"', "3.0"], []]
    text = newline.join(delimiter.join(line) for line in lines)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    assert content(read(tmp_path)) == [("ä.png", f'Füchse{delimiter} "rot" 狐', 3)]


def test_captions_over_several_lines_and_line_numbers_after_them(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "first\nsecond", 1), ("gone.png", "x", 1)])
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "first\nsecond", 1)]
    assert reasons(listing) == {"metadata.csv line 4": "the image 'gone.png' does not exist"}


def test_json_lines(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        json.dumps({"file_name": "a.png", "text": "a fox", "seed": 5}),
        "",
        json.dumps({"text": "a hare", "file_name": "b.png", "width": 3}),
        json.dumps({"file_name": "c.png", "text": ["no text"]}),
        json.dumps(["no object"]),
        r'{"file_name": "c.png", "text": "half a character \udc80"}',
        '{"file_name": "c.png", "text": "cut sho',
    ]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(rows), encoding="utf-8-sig")
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", 5), ("b.png", "a hare", None)]
    assert reasons(listing) == {
        "metadata.jsonl line 4": "image and caption must be texts",
        "metadata.jsonl line 5": "it is no JSON object",
        "metadata.jsonl line 6": "it holds half a character (a lone surrogate)",
        "metadata.jsonl line 7": "it is no JSON",
    }
    assert listing.unlisted == 1


def test_texts_beside_images(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.v2.JPG", "set/c.webp", "d.png", "e.png", "f.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa fox\r\n")
    (tmp_path / "b.v2.txt").write_text("a hare", encoding="utf-8")
    (tmp_path / "set" / "c.txt").write_text("an owl", encoding="utf-8")
    (tmp_path / "e.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "f.txt").write_bytes(b"caf\xe9")
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None), ("b.v2.JPG", "a hare", None), ("set/c.webp", "an owl", None)]
    assert list(reasons(listing)) == ["d.png", "e.png", "f.png"]
    assert "there is no d.txt beside it" in reasons(listing)["d.png"]
    assert "e.txt is empty" in reasons(listing)["e.png"]
    assert "not UTF-8" in reasons(listing)["f.png"]


def test_folders_of_all_of_these(tmp_path: Path) -> None:
    images(tmp_path, "one/a.png", "two/b.png", "two/sub/c.png", "two/sub/left_out.png", "three/d.png")
    write_csv(tmp_path / "one" / "metadata.csv", [("a.png", "in one", 1)])
    (tmp_path / "two" / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "in two"}\n{"file_name": "sub/c.png", "text": "below two"}', encoding="utf-8"
    )
    (tmp_path / "three" / "d.txt").write_text("in three", encoding="utf-8")
    images(tmp_path, ".hidden/e.png")
    listing = read(tmp_path)
    assert content(listing) == [
        ("one/a.png", "in one", 1),
        ("three/d.png", "in three", None),
        ("two/b.png", "in two", None),
        ("two/sub/c.png", "below two", None),
    ]
    assert not listing.problems
    assert listing.unlisted == 1


def test_one_table_of_a_folder(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "x", 1), ("b.png", "y", 1)])
    part = write_csv(tmp_path / "validation.csv", [("b.png", "y", 1)])
    assert content(read(part)) == [("b.png", "y", 1)]


def test_a_row_without_a_caption_takes_the_text_beside_it(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    write_csv(tmp_path / "metadata.csv", [("a.png", "", 1), ("b.png", "  ", 2)])
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", 1)]
    assert reasons(listing) == {"metadata.csv line 3": "the image 'b.png' has no caption"}


def test_several_captions_of_an_image_stay_and_repeats_go(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "short", 1), ("a.png", "long", 1), ("./a.png", "short", 1)])
    write_csv(tmp_path / "other.csv", [("a.png", "long", 1)])
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "long", 1), ("a.png", "short", 1)]
    assert listing.repeats == 2


def test_backslashes_of_windows(tmp_path: Path) -> None:
    images(tmp_path, "deep/er/a.png")
    write_csv(tmp_path / "metadata.csv", [("deep\\er\\a.png", "a fox", 1)])
    assert content(read(tmp_path)) == [("deep/er/a.png", "a fox", 1)]


def test_other_capitals_are_the_same_file_where_the_system_says_so(tmp_path: Path) -> None:
    images(tmp_path, "Photo.png")
    (tmp_path / "Photo.txt").write_text("of the text", encoding="utf-8")
    write_csv(tmp_path / "metadata.csv", [("photo.PNG", "of the table", 1)])
    listing = read(tmp_path)
    if (tmp_path / "photo.PNG").exists():
        assert content(listing) == [("Photo.png", "of the table", 1)] and not listing.problems
    else:
        assert "does not exist" in reasons(listing)["metadata.csv line 2"]


@pytest.mark.parametrize(
    "path", ["../outside.png", "sub/../../outside.png", "..\\outside.png", "C:\\x.png", "C:x.png", "\\\\host\\x.png"]
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, path: str) -> None:
    images(tmp_path, "outside.png", "data/a.png", "data/sub/b.png")
    write_csv(tmp_path / "data" / "metadata.csv", [(path, "x", 1), ("a.png", "x", 1), ("sub/b.png", "x", 1)])
    listing = read(tmp_path / "data")
    assert [sample.name for sample in listing.samples] == ["a.png", "sub/b.png"]
    assert "leads out of the data folder" in reasons(listing)["metadata.csv line 2"]


def test_an_absolute_path_is_refused_wherever_it_leads(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "metadata.csv", [(tmp_path / "a.png", "x", 1), ("b.png", "x", 1)])
    assert "leads out" in reasons(read(tmp_path))["metadata.csv line 2"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_may_not_lead_out(tmp_path: Path) -> None:
    images(tmp_path, "outside/a.png", "data/b.png")
    data = tmp_path / "data"
    (data / "folder").symlink_to(tmp_path / "outside", target_is_directory=True)
    (data / "file.png").symlink_to(tmp_path / "outside" / "a.png")
    (data / "inside.png").symlink_to(data / "b.png")
    names = ("folder/a.png", "file.png", "inside.png", "b.png")
    write_csv(data / "metadata.csv", [(name, "x", 1) for name in names])
    listing = read(data)
    assert [sample.name for sample in listing.samples] == ["b.png", "inside.png"]
    assert list(reasons(listing)) == ["file.png", "folder", "metadata.csv line 2", "metadata.csv line 3"]
    assert all("leads out of the data folder" in reason for reason in reasons(listing).values())


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_data_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    images(tmp_path, "real/a.png")
    write_csv(tmp_path / "real" / "metadata.csv", [("a.png", "x", 1)])
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert content(read(tmp_path / "link")) == [("a.png", "x", 1)]


def test_a_link_in_circles_ends(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "x", 1)])
    if os.name != "nt":
        (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    assert len(read(tmp_path).samples) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    grey(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None)]
    assert reasons(listing) == {r"caf\udce9.png": "its name is not UTF-8: rename it"}


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5", "abc", "0x1", "9" * 5000])
def test_a_seed_that_is_none_is_named(tmp_path: Path, seed: str) -> None:
    images(tmp_path, "a.png", "b.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "x", seed), ("b.png", "x", "")])
    listing = read(tmp_path)
    assert content(listing) == [("b.png", "x", None)]
    assert "is no whole number" in reasons(listing)["metadata.csv line 2"]


def test_an_open_quote_costs_the_lines_that_it_swallows(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "e.png")
    text = 'image,prompt\na.png,"a fox"\nb.png,"a hare\nc.png,an owl\nd.png,"a mouse"\ne.png,a bee\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None), ("e.png", "a bee", None)]
    [problem] = listing.problems
    assert problem.where == "metadata.csv lines 3 to 5"
    assert problem.count == 3


def test_tables_of_other_things_are_left_alone(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    write_csv(tmp_path / "prompts.csv", [("a hare",)], ("prompt",))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nno json', encoding="utf-8")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None)]
    assert not listing.problems


def test_metadata_that_cannot_be_read_as_such_is_an_error(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    write_csv(tmp_path / "metadata.csv", [("a.png", "x")], ("picture", "words"))
    with pytest.raises(ValueError, match=r"metadata.csv has no column for images \(image, file_name"):
        read(tmp_path)
    (tmp_path / "metadata.csv").write_bytes("image,prompt\na.png,café".encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.csv is not UTF-8 text: save it as UTF-8"):
        read(tmp_path)


def test_nothing_to_train_on_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: check the name"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no captioned images: put a metadata.csv"):
        read(tmp_path)
    images(tmp_path, "a.png")
    with pytest.raises(ValueError, match="no image that can be trained on: a.png: it has no caption"):
        read(tmp_path)


def test_the_order_is_that_of_names_however_tables_are_ordered(tmp_path: Path) -> None:
    images(tmp_path, *(f"{i}.png" for i in range(5)))
    write_csv(tmp_path / "metadata.csv", [(f"{i}.png", "x", i) for i in (3, 0, 4)])
    write_csv(tmp_path / "more.csv", [(f"{i}.png", "x", i) for i in (2, 1)])
    assert [sample.seed for sample in read(tmp_path).samples] == [0, 1, 2, 3, 4]
