"""Aspect-ratio buckets, and data folders sorted into them by their headers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_folders import grey, numbered, truncate, write_csv

from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.dataset import buckets
from comfyui_l2p.l2p_core.dataset import images as image_files
from comfyui_l2p.l2p_core.dataset.buckets import ImageSize
from comfyui_l2p.l2p_core.dataset.image_folder import ImageFolder, open_folder
from comfyui_l2p.l2p_core.dataset.problems import TooManyProblems
from comfyui_l2p.l2p_core.deep_images.common import ImageInfo
from comfyui_l2p.l2p_core.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("unflushed")


def test_the_buckets_of_1024_pixels() -> None:
    landscape = [
        ImageSize(1408, 704),
        ImageSize(1344, 768),
        ImageSize(1216, 832),
        ImageSize(1152, 896),
        ImageSize(1088, 960),
    ]
    portrait = [ImageSize(size.height, size.width) for size in reversed(landscape)]
    assert buckets.sizes(1024 * 1024, 16) == [*landscape, ImageSize(1024, 1024), *portrait]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bucket_exceeds_the_area_or_needs_padding(variant: str) -> None:
    multiple, side = ModelConfig().with_head(variant).size_multiple, VARIANTS[variant].pixels
    found = buckets.sizes(side * side, multiple)
    assert ImageSize(side, side) in found
    assert len(found) > 5
    for size in found:
        assert size.width % multiple == size.height % multiple == 0
        assert 0.85 * side * side < size.area <= side * side
        assert max(size) <= buckets.MAX_ASPECT * min(size)
    assert len(set(found)) == len(found)
    assert {ImageSize(size.height, size.width) for size in found} == set(found)


@pytest.mark.parametrize("side", [16, 31, 64, 100, 333, 512, 768, 1000])
def test_any_area_has_a_square(side: int) -> None:
    found = buckets.sizes(side * side, 16)
    assert ImageSize(side // 16 * 16, side // 16 * 16) in found
    assert all(size.area <= side * side and min(size) >= 16 for size in found)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 160 pixels"):
        buckets.sizes(100 * 100, 160)


def test_images_go_to_the_nearest_shape() -> None:
    found = buckets.sizes(1024 * 1024, 16)
    for size in found:
        assert buckets.nearest(size.width * 3, size.height * 3, found) == size
    assert buckets.nearest(10000, 100, found) == found[0]
    assert buckets.nearest(1, 9, found) == found[-1]
    assert buckets.nearest(1920, 1080, found) == ImageSize(1344, 768)


def test_enlargement_and_crop() -> None:
    assert buckets.enlargement(50, 50, ImageSize(100, 100)) == 2
    assert buckets.enlargement(400, 200, ImageSize(100, 100)) == 0.5
    assert buckets.cropped_share(400, 200, ImageSize(100, 100)) == 0.5
    assert buckets.cropped_share(300, 300, ImageSize(100, 100)) == 0


def opened(folder: Path, **options: object) -> ImageFolder:
    return open_folder(folder, **{"area": 64 * 64, "multiple": 16, **options})  # type: ignore[arg-type]


def test_a_folder_is_sorted_without_decoding(tmp_path: Path) -> None:
    numbered(tmp_path, 10)
    for path in tmp_path.glob("*.png"):
        truncate(path)
    data = opened(tmp_path)
    assert data.sizes == {ImageSize(64, 64): 4, ImageSize(80, 48): 3, ImageSize(48, 80): 3}
    assert [image.sample.seed for image in data.images] == list(range(1000, 1010))
    assert data.images[1].size == ImageSize(96, 64)
    assert data.images[1].bucket == ImageSize(80, 48)
    assert data.captions == [f"image {number}" for number in range(10)]
    assert data.total == 10
    assert not data.problems
    assert not data.notes


def test_bad_samples_are_named_up_to_a_share(tmp_path: Path) -> None:
    numbered(tmp_path, 40)
    (tmp_path / "007.png").write_bytes(b"no image")
    (tmp_path / "unwanted.png").write_bytes(b"not named by the table")
    data = opened(tmp_path)
    assert [problem.where for problem in data.problems] == ["007.png"]
    assert (len(data.images), data.total) == (39, 40)
    assert "1 of 40 samples are skipped: 007.png: it is not an image of a known format" in data.notes[0]
    (tmp_path / "008.png").unlink()
    (tmp_path / "009.png").unlink()
    with pytest.raises(TooManyProblems, match="3 of 40 samples are bad, more than 5%") as caught:
        opened(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert lines[:2] == [
        "  metadata.csv line 10: the image '008.png' does not exist",
        "  metadata.csv line 11: the image '009.png' does not exist",
    ]
    assert lines[2].startswith("  007.png: it is not an image of a known format (PNG, JPEG, WEBP, ")
    assert len(opened(tmp_path, max_bad_share=0.1).images) == 37


def test_a_long_list_of_bad_samples_is_cut(tmp_path: Path) -> None:
    grey(tmp_path / "good.png")
    write_csv(tmp_path / "metadata.csv", [("good.png", "x", 1), *((f"{i}.png", "x", 1) for i in range(70))])
    with pytest.raises(TooManyProblems, match="70 of 71 samples") as caught:
        opened(tmp_path)
    assert str(caught.value).endswith("and 20 more")


def test_enlarged_and_cropped_images_are_spoken_of(tmp_path: Path) -> None:
    grey(tmp_path / "small.png", 0, 20, 20)
    grey(tmp_path / "long.png", 0, 400, 100)
    grey(tmp_path / "fine.png", 0, 64, 64)
    write_csv(tmp_path / "metadata.csv", [(name, "x", 1) for name in ("small.png", "long.png", "fine.png")])
    first, second = opened(tmp_path).notes
    assert first == "1 image must be enlarged by more than 1.5: small.png (3.2 times)."
    assert second == "The crop removes more than 25% of 1 image: long.png (58%)."


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    numbered(tmp_path, 6)
    found = {opened(tmp_path).fingerprint, opened(tmp_path, area=32 * 32).fingerprint}
    assert opened(tmp_path).fingerprint in found
    for seed, caption, width in [(1, "x", 64), (2, "x", 64), (2, "y", 64), (2, "y", 80)]:
        grey(tmp_path / "000.png", 0, width, 64)
        write_csv(tmp_path / "metadata.csv", [("000.png", caption, seed)])
        found.add(opened(tmp_path).fingerprint)
    assert len(found) == 6


def test_the_index_remembers_sizes_and_notices_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, index = numbered(tmp_path / "data", 6), tmp_path / "index.json"
    counts: list[tuple[int, int]] = []
    first = opened(data, index=index, progress=lambda done, total: counts.append((done, total)))
    assert counts == [(done, 6) for done in range(1, 7)]
    looked: list[str] = []
    real = image_files.look

    def look(path: Path) -> ImageInfo:
        looked.append(path.name)
        return real(path)

    monkeypatch.setattr(image_files, "look", look)
    assert opened(data, index=index).fingerprint == first.fingerprint
    assert looked == []
    grey(data / "003.png", 3, 32, 64)
    os.utime(data / "004.png", ns=(1, 1))
    changed = opened(data, index=index)
    assert sorted(looked) == ["003.png", "004.png"]
    assert changed.images[3].size == ImageSize(32, 64)
    (note,) = [note for note in changed.notes if "changed since" in note]
    assert note.startswith("1 image changed since this run last read them: 003.png."), "a copy has a new time alone"
    assert not [note for note in opened(data, index=index).notes if "changed since" in note]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 100,
        '{"version":0,"images":[]}',
        '{"version":1,"images":{"000.png":[1]}}',
        '{"version":1,"images":{"000.p',
        '{"version":1,"images":\xff',
    ],
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, content: str) -> None:
    data, index = numbered(tmp_path / "data", 3), tmp_path / "index.json"
    expected = opened(data, index=index)
    whole = index.read_bytes()
    index.write_text(content, encoding="latin-1")
    assert opened(data, index=index).fingerprint == expected.fingerprint
    assert index.read_bytes() == whole


@pytest.mark.parametrize("content", ["[]", '{"version": 2, "shirts": [38, 40]}', "\xff", "38, 40"])
def test_a_file_of_somebody_else_in_the_indexs_place_is_left_alone(tmp_path: Path, content: str) -> None:
    data, index = numbered(tmp_path / "data", 3), tmp_path / "sizes.json"
    index.write_text(content, encoding="latin-1")
    found = opened(data, index=index)
    assert found.fingerprint == opened(data).fingerprint and index.read_text(encoding="latin-1") == content
    (note,) = found.notes
    assert note.startswith("The file sizes.json beside the run's files was not written by a run and is not touched.")
    run = RunFolder(tmp_path)
    run.clear()
    assert index.exists()
    index.write_text("", encoding="utf-8")
    assert not opened(data, index=index).notes
    run.clear()
    assert not index.exists()
