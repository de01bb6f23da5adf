"""What is read from data folders as people's tools write them, and what is named and skipped."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from data_folders import grey, write_csv

from comfyui_l2p.l2p_core.dataset import formats
from comfyui_l2p.l2p_core.dataset.image_folder import open_folder
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
        "metadata.jsonl line 5": "it is not a JSON object",
        "metadata.jsonl line 6": "it contains half a character (a lone surrogate)",
        "metadata.jsonl line 7": "it is not valid JSON: write one object in braces per line",
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


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("IMG_0.JPG", "IMG_0.TXT"),
        ("img_0.jpg", "IMG_0.txt"),
        ("Caf\u00e9.png", "cafe\u0301.txt"),
        ("Stra\u00dfe.png", "STRASSE.caption"),
        ("0.jpg", "0.jpg.txt"),
        ("0.jpg", "0.caption"),
        ("deep/b.webp", "DEEP/B.WEBP.TXT"),
    ],
)
def test_a_caption_is_found_however_its_name_is_spelled(tmp_path: Path, image: str, text: str) -> None:
    images(tmp_path, image)
    (tmp_path / text).parent.mkdir(exist_ok=True)
    (tmp_path / text).write_text("a fox", encoding="utf-8")
    assert content(read(tmp_path)) == [(image, "a fox", None)]


@pytest.mark.parametrize("written", ["PHOTO.PNG", "caf\u00e9/photo.png", "Cafe\u0301\\Photo.PNG"])
def test_a_table_finds_an_image_however_its_name_is_spelled(tmp_path: Path, written: str) -> None:
    name = "cafe\u0301/Photo.png" if "af" in written else "Photo.png"
    images(tmp_path, name)
    write_csv(tmp_path / "metadata.csv", [(written, "of the table", 1)])
    listing = read(tmp_path)
    assert content(listing) == [(name, "of the table", 1)] and not listing.problems


def test_names_that_differ_in_capitals_alone_must_be_exact(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "A.png", "b.png")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("capitals are all the same to this file system")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    write_csv(tmp_path / "more.csv", [("a.PNG", "x", 1), ("b.PNG", "a bee", 2)])
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None), ("b.png", "a bee", 2)]
    assert reasons(listing)["more.csv line 2"] == (
        "the image 'a.PNG' may be any of A.png, a.png: write it as the file is named"
    )


def test_formats_that_pillow_reads_are_read(tmp_path: Path) -> None:
    names = ["a.gif", "b.jfif", "c.ppm", "d.tga", "e.JP2", "f.qoi"]
    images(tmp_path, *names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("a fox", encoding="utf-8")
    data = open_folder(tmp_path, area=64 * 64, multiple=16)
    assert [image.sample.name for image in data.images] == names and not data.problems


def test_captioned_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PLUGINS", {n: formats.Plugin(p.package, "no_such", p.register)
                                             for n, p in formats.PLUGINS.items()})  # fmt: skip
    monkeypatch.setattr(formats, "known", lambda: frozenset({"PNG"}))
    images(tmp_path, "a.png")
    for name in ("a.psd", "b.heic", "c.jxl", "d.cr2", "e.gif", "noise.npz", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text("a fox", encoding="utf-8")
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None)]
    assert reasons(listing) == {
        "b.heic": ".heic files need the package pillow-heif: install it into the Python that runs this, or "
        "save it as PNG or JPEG",
        "c.jxl": ".jxl files need the package pillow-jxl-plugin: install it into the Python that runs this, or "
        "save it as PNG or JPEG",
        "d.cr2": ".cr2 files are not read: save it as PNG or JPEG",
        "e.gif": ".gif files cannot be read by this version of Pillow: save it as PNG or JPEG",
    }
    assert listing.skipped == {".psd": 1, ".npz": 1, ".db": 1}


def test_a_plugin_of_pillow_is_taken_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    grey(tmp_path / "a.heic", 90, 32, 16)
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    [image] = open_folder(tmp_path, area=64 * 64, multiple=16).images
    assert image.size == (32, 16)


def test_folders_of_other_trainers(tmp_path: Path) -> None:
    images(tmp_path, "10_fox/a.png", "10_fox/b.png", "10_fox/c.png", "10_fox/sub/d.png")
    (tmp_path / "10_fox" / "a.txt").write_text("of the text", encoding="utf-8")
    (tmp_path / "10_fox" / "a.caption").write_text("of the caption", encoding="utf-8")
    (tmp_path / "10_fox" / "a.npz").touch()
    (tmp_path / "10_fox" / "lonely.txt").touch()
    metadata = {
        "a": {"caption": "of the metadata"},
        "b.png": {"caption": "a hare", "tags": "1hare, grass", "train_resolution": [512, 512]},
        "sub/d": {"tags": "1owl"},
        "/elsewhere/c.png": {"caption": "a mouse"},
    }
    (tmp_path / "10_fox" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8-sig")
    (tmp_path / "meta_of_something_else.json").write_text('{"version": 3}', encoding="utf-8")
    listing = read(tmp_path)
    assert content(listing) == [
        ("10_fox/a.png", "of the text", None),
        ("10_fox/b.png", "a hare, 1hare, grass", None),
        ("10_fox/sub/d.png", "1owl", None),
    ]
    assert "leads out of the data folder" in reasons(listing)["10_fox/metadata.json line 4"]
    assert listing.skipped == {".npz": 1, ".json": 1} and listing.unused == 2
    assert listing.repeat_folders == ["10_fox"]
    notes = " ".join(open_folder(tmp_path, area=64 * 64, multiple=16, max_bad_share=1).notes)
    assert "Files that are not read: 1 .json, 1 .npz." in notes
    assert "Skipped 2 text files without an image." in notes
    assert "such as 10_fox set repeats in other trainers; here every image is shown equally often." in notes


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a fox, asl\u00e9ep", "\u767d\u8272\u80cc\u666f\u4e0a\u7684\u72d0\u72f8 1"])
def test_utf_16_without_a_mark_is_read_as_such(tmp_path: Path, encoding: str, text: str) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    write_csv(tmp_path / "data.csv", [("b.png", "a hare", 3)])
    table = tmp_path / "data.csv"
    table.write_bytes(table.read_bytes().decode().encode(encoding))
    assert content(read(tmp_path)) == [("a.png", text, None), ("b.png", "a hare", 3)]


def test_a_text_with_nul_characters_is_named(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"a\0\0b fox")
    (tmp_path / "d.txt").write_bytes(b"a red\0circle")
    (tmp_path / "c.txt").write_bytes("a fox".encode("utf-32"))
    listing = read(tmp_path)
    assert content(listing) == [("a.png", "a fox", None)]
    assert all("NUL characters: save it as UTF-8" in reason for reason in reasons(listing).values())
    assert list(reasons(listing)) == ["b.png", "c.png", "d.png"]


def test_json_lines_that_are_not_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    line = '{"file_name": "%s.png", "text": "a fox"}'
    table = tmp_path / "metadata.jsonl"
    table.write_text(f"{line % 'a'},\n{line % 'b'},\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: it is not valid JSON: remove the comma at its end\.$"):
        read(tmp_path)
    table.write_text(f"\ufeff{line % 'a'}\n\ufeff{line % 'b'}\n", encoding="utf-8-sig")
    assert len(read(tmp_path).samples) == 2


def test_a_list_with_commas_beside_the_images_is_named_with_its_fault(tmp_path: Path) -> None:
    """As a JSON array's lines are copied; a file of another name may be of other things, so it is no error."""
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a fox"},\n', encoding="utf-8")
    fault = r"captions.jsonl (line 1: it is not valid JSON: remove the comma at its end)"
    with pytest.raises(ValueError, match=re.escape(f"{fault} is not read; a.png: it has no caption")):
        read(tmp_path)
    (tmp_path / "b.txt").write_text("a hare", encoding="utf-8")
    assert read(tmp_path).skipped == {fault: 1}


@pytest.mark.parametrize(
    ("name", "written", "fault"),
    [
        ("metadata.json", b'[{"file_name": "a.png", "text": "a f', "line 1: it is not valid JSON: export it again"),
        ("captions.csv", "image,prompt\na.png,caf\xe9".encode("latin-1"), "it is not UTF-8 text: save it as UTF-8"),
        ("captions.jsonl", b"\xff\xfe\x00", "it is not UTF-8 text: save it as UTF-8"),
    ],
)
def test_captions_that_cannot_be_read_are_named_with_their_fault(
    tmp_path: Path, name: str, written: bytes, fault: str
) -> None:
    images(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match=re.escape(f"{name} ({fault}) is not read; a.png: it has no caption")):
        read(tmp_path)
    (tmp_path / "b.txt").write_text("a hare", encoding="utf-8")
    assert read(tmp_path).skipped == {f"{name} ({fault})": 1}


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
def test_links_are_followed_and_names_in_tables_still_cannot_leave(tmp_path: Path) -> None:
    images(tmp_path, "outside/a.png", "outside/deep/c.png", "data/b.png", "secret.png")
    data = tmp_path / "data"
    (data / "folder").symlink_to(tmp_path / "outside", target_is_directory=True)
    (data / "file.png").symlink_to(tmp_path / "outside" / "a.png")
    (data / "inside.png").symlink_to(data / "b.png")
    (data / "gone.png").symlink_to(tmp_path / "nowhere")
    names = ("folder/a.png", "folder/deep/c.png", "file.png", "inside.png", "b.png")
    write_csv(data / "metadata.csv", [(name, "x", 1) for name in (*names, "folder/../../secret.png")])
    listing = read(data)
    assert [sample.name for sample in listing.samples] == sorted(names)
    assert "leads out of the data folder" in reasons(listing)["metadata.csv line 7"]
    data_set = open_folder(data, area=64 * 64, multiple=16, max_bad_share=1)
    assert len(data_set.images) == 5


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_snapshot_of_a_hub_is_read(tmp_path: Path) -> None:
    """Every file there is a link to one named by its content alone."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    grey(blobs / "x.png").rename(blobs / "0123")
    write_csv(blobs / "x.csv", [("0.png", "a fox", 1)]).rename(blobs / "4567")
    (snapshot / "0.png").symlink_to(Path("../../blobs/0123"))
    (snapshot / "metadata.csv").symlink_to(Path("../../blobs/4567"))
    assert content(read(snapshot)) == [("0.png", "a fox", 1)]
    assert content(read(snapshot / "metadata.csv")) == [("0.png", "a fox", 1)]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_data_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    images(tmp_path, "real/a.png")
    write_csv(tmp_path / "real" / "metadata.csv", [("a.png", "x", 1)])
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert content(read(tmp_path / "link")) == [("a.png", "x", 1)]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_in_circles_end_and_nothing_is_read_twice(tmp_path: Path) -> None:
    images(tmp_path, "data/a.png", "data/sub/b.png", "c.png")
    for name in ("data/a", "data/sub/b", "c"):
        (tmp_path / name).with_suffix(".txt").write_text("x", encoding="utf-8")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub", target_is_directory=True)
    (tmp_path / "data" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert [sample.name for sample in read(tmp_path / "data").samples] == ["a.png", "sub/b.png", "up/c.png"]


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
    assert "is not a whole number" in reasons(listing)["metadata.csv line 2"]


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


def test_tables_of_other_trainers_are_read_or_named(tmp_path: Path) -> None:
    """By the names of their columns, whatever the file is called; else as files that are not read."""
    for number in range(3):
        grey(tmp_path / f"{number}.png", number)
    rows = [{"image_path": "0.png", "caption": "a fox"}, {"file_name": "1.png", "text": "a hen"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "boxes.jsonl").write_text('{"image_id": 7, "box": [1, 2]}', encoding="utf-8")
    (tmp_path / "scores.csv").write_text("name,score\n2.png,5\n", encoding="utf-8")
    (tmp_path / "captions.json").write_text('{"annotations": []}', encoding="utf-8")
    (tmp_path / "2.txt").write_text("a dog", encoding="utf-8")
    listing = read(tmp_path)
    assert [sample.caption for sample in listing.samples] == ["a fox", "a hen", "a dog"] and not listing.problems
    assert listing.skipped == {"boxes.jsonl": 1, "scores.csv": 1, ".json": 1}
