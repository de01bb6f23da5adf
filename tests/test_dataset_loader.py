"""Batches from disk: a pure function of their number, whatever threads, processes and broken images there are."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import features, grey, numbered, truncate, write_csv

from comfyui_l2p.l2p_core.dataset import images
from comfyui_l2p.l2p_core.dataset.image_folder import ImageFolder, open_folder
from comfyui_l2p.l2p_core.dataset.loader import Loader
from comfyui_l2p.l2p_core.dataset.problems import TooManyProblems
from comfyui_l2p.l2p_core.dataset.schedule import Schedule
from comfyui_l2p.l2p_core.training.batch import Batch, BatchSource

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """17 images in three buckets."""
    return open_folder(numbered(tmp_path_factory.mktemp("data"), 17), area=64 * 64, multiple=16)


def shown(batch: Batch) -> list[int]:
    """The numbers of a batch's images, as their pixels tell."""
    return images.to_uint8(batch.pixels[:, 0, 5, 5]).tolist()


def batches(data: ImageFolder, numbers: range | list[int], **options: object) -> list[Batch]:
    settings = {"batch_size": 3, "seed": 0, **options}
    with Loader(data, features, **settings) as source:  # type: ignore[arg-type]
        return [source.batch(number) for number in numbers]


def test_pixels_captions_seeds_and_numbers_stay_together(data: ImageFolder) -> None:
    for number, batch in enumerate(batches(data, range(12))):
        assert batch.numbers == [3 * number, 3 * number + 1, 3 * number + 2]
        assert batch.pixels.dtype == torch.float32
        assert tuple(batch.pixels.shape[2:]) in {(64, 64), (48, 80), (80, 48)}
        assert [int(caption) for caption in batch.captions] == shown(batch)
        assert batch.seeds == [1000 + image for image in shown(batch)]
        assert (batch.pixels == batch.pixels[:, :1, :1, :1]).all()


def test_a_loader_is_what_the_trainer_takes(data: ImageFolder) -> None:
    with Loader(data, features, batch_size=1, seed=0) as source:
        checked: BatchSource = source
        assert isinstance(checked.batch(0), Batch)


def test_a_batch_depends_on_its_number_and_the_seed_alone(data: ImageFolder) -> None:
    expected = batches(data, range(20))
    for options in ({"workers": 1, "prefetch": 0}, {"workers": 8, "prefetch": 5}):
        for numbers in (range(19, -1, -1), [7, 7, 3, 19, 0]):
            for number, batch in zip(numbers, batches(data, numbers, **options), strict=True):
                assert torch.equal(batch.pixels, expected[number].pixels)
                assert shown(batch) == shown(expected[number])
                assert batch.numbers == expected[number].numbers
    assert list(map(shown, batches(data, range(20), seed=1))) != list(map(shown, expected))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_one_sees(data: ImageFolder, world_size: int) -> None:
    whole = batches(data, range(10), batch_size=2 * world_size)
    parts = [batches(data, range(10), batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number in range(10):
        shares = [part[number] for part in parts]
        assert torch.equal(torch.cat([share.pixels for share in shares]), whole[number].pixels)
        assert [n for share in shares for n in share.numbers] == whole[number].numbers
        assert [n for share in shares for n in share.seeds] == whole[number].seeds


def test_every_image_is_shown_equally_often(data: ImageFolder) -> None:
    """Within what the buckets' last started batches hold."""
    counts = Counter(image for batch in batches(data, range(17 * 4)) for image in shown(batch))
    assert len(counts) == 17
    assert all(11 <= count <= 13 for count in counts.values())


@pytest.mark.parametrize(
    ("counts", "batch_size"), [([7], 3), ([1], 8), ([100, 1, 10, 3], 8), ([5] * 9, 8), ([2, 3], 1)]
)
def test_schedules_serve_buckets_by_their_images(counts: list[int], batch_size: int) -> None:
    schedule = Schedule(counts, batch_size, seed=0)
    epochs = 3 * batch_size
    total = schedule.batches_before(epochs)
    assert abs(total * batch_size - epochs * sum(counts)) < len(counts) * batch_size
    streams: list[list[int]] = [[] for _ in counts]
    for number in range(total):
        bucket, positions = schedule.batch(number)
        streams[bucket] += positions
        epoch = schedule.epoch(number)
        assert schedule.batches_before(epoch) <= number < schedule.batches_before(epoch + 1)
    for stream, count in zip(streams, counts, strict=True):
        assert stream == list(range(len(stream)))
        assert abs(len(stream) - epochs * count) < batch_size


def test_an_epoch_of_a_bucket_shows_each_image_once_in_a_new_order() -> None:
    schedule = Schedule([6, 9], 2, seed=0)
    epochs = []
    for start in (0, 9, 18):
        order, place = schedule.order(1, start + 4)
        assert place == 4
        assert sorted(order.tolist()) == list(range(9))
        epochs.append(tuple(order.tolist()))
    assert len(set(epochs)) == 3


def test_turns_of_buckets_are_mixed() -> None:
    schedule = Schedule([64, 64], 2, seed=0)
    turns = [schedule.batch(number)[0] for number in range(64)]
    assert sum(turns) == 32
    assert turns != sorted(turns)
    assert 15 < sum(a != b for a, b in zip(turns, turns[1:], strict=False)) < 48


def test_a_large_data_set_needs_no_long_search() -> None:
    schedule = Schedule([1_000_000, 7, 31], 8, seed=0)
    bucket, positions = schedule.batch(123_456_789)
    assert len(positions) == 8
    assert bucket in range(3)


def damaged(folder: Path, broken: list[int], **options: object) -> ImageFolder:
    numbered(folder, 30, sizes=[(64, 64), (96, 64)])
    for number in broken:
        truncate(folder / f"{number:03d}.png")
    return open_folder(folder, area=64 * 64, multiple=16, **options)  # type: ignore[arg-type]


def test_a_broken_image_gives_way_to_the_next_of_its_bucket(tmp_path: Path) -> None:
    whole = [shown(batch) for batch in batches(damaged(tmp_path / "whole", []), range(30), batch_size=2)]
    data = damaged(tmp_path / "broken", [4])
    with Loader(data, features, batch_size=2, seed=0) as source:
        found = [shown(source.batch(number)) for number in range(30)]
        assert [(problem.where, problem.count) for problem in source.problems] == [("004.png", 1)]
        assert "damaged or truncated" in source.problems[0].reason
    changed = [
        (before, after)
        for one, other in zip(whole, found, strict=True)
        for before, after in zip(one, other, strict=True)
        if before != after
    ]
    assert changed
    assert all(before == 4 and after % 2 == 0 for before, after in changed)


def test_a_resumed_run_replaces_broken_images_by_the_same(tmp_path: Path) -> None:
    data = damaged(tmp_path, [3, 4, 9], max_bad_share=1)
    expected = batches(data, range(40), max_bad_share=1)
    for start in (1, 13, 33):
        resumed = batches(data, range(start, 40), max_bad_share=1, workers=1)
        for batch, other in zip(resumed, expected[start:], strict=True):
            assert torch.equal(batch.pixels, other.pixels)
            assert batch.seeds == other.seeds


def test_a_bucket_of_broken_images_is_filled_from_the_others(tmp_path: Path) -> None:
    grey(tmp_path / "tall.png", 99, 64, 96)
    numbered(tmp_path, 8, sizes=[(64, 64)])
    truncate(tmp_path / "tall.png")
    rows = [(f"{n:03d}.png", f"image {n}", n) for n in range(8)]
    write_csv(tmp_path / "metadata.csv", [*rows, ("tall.png", "image 99", 99)])
    data = open_folder(tmp_path, area=64 * 64, multiple=16)
    found = batches(data, range(18), batch_size=1, max_bad_share=0.2)
    tall = [batch for batch in found if tuple(batch.pixels.shape[2:]) == (80, 48)]
    assert tall
    assert all(shown(batch) == [0] for batch in tall)


def test_too_many_broken_images_stop_the_run_with_the_list(tmp_path: Path) -> None:
    data = damaged(tmp_path, [3, 4, 9])
    with (
        pytest.raises(TooManyProblems, match="2 of 30 samples are bad, more than 5%") as caught,
        Loader(data, features, batch_size=2, seed=0, workers=1) as source,
    ):
        for number in range(15):
            source.batch(number)
    assert len([line for line in str(caught.value).splitlines() if "damaged or truncated" in line]) == 2


def test_problems_of_the_folder_count_too(tmp_path: Path) -> None:
    numbered(tmp_path, 30)
    (tmp_path / "003.png").unlink()
    truncate(tmp_path / "004.png")
    data = open_folder(tmp_path, area=64 * 64, multiple=16)
    with pytest.raises(TooManyProblems, match="2 of 30 samples are bad"):
        batches(data, range(15), batch_size=2)


def test_where_nothing_can_be_decoded_it_is_said(tmp_path: Path) -> None:
    data = damaged(tmp_path, list(range(30)))
    with pytest.raises(ValueError, match="No image of .* can be decoded"):
        batches(data, range(1), max_bad_share=1)


def test_a_disk_that_fails_is_asked_again(data: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its image is not called broken, for a resumed run would then see another one."""
    expected = batches(data, range(3))
    real, tried, lock = images.load, Counter[str](), threading.Lock()
    fail = 2

    def load(path: Path, *rest: Any) -> torch.Tensor:
        with lock:
            tried[path.name] += 1
            failing = tried[path.name] <= fail
        if failing:
            raise OSError(5, "Input/output error")
        return real(path, *rest)

    monkeypatch.setattr(images, "load", load)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for batch, other in zip(batches(data, range(3), prefetch=0), expected, strict=True):
        assert torch.equal(batch.pixels, other.pixels)
    fail = 99
    tried.clear()
    with pytest.raises(ValueError, match=r"cannot be read \(Input/output error\): restore it"):
        batches(data, range(3))


def test_images_are_decoded_ahead_of_use_and_none_twice(data: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    enough = threading.Semaphore(0)
    real = images.load

    def load(path: Path, *rest: Any) -> torch.Tensor:
        pixels = real(path, *rest)
        decoded.append(path.name)
        enough.release()
        return pixels

    monkeypatch.setattr(images, "load", load)
    with Loader(data, features, batch_size=2, seed=0, prefetch=3, workers=2) as source:
        source.batch(0)
        for _ in range(8):
            assert enough.acquire(timeout=60)
        assert len(decoded) == 8
        for number in range(1, 5):
            source.batch(number)
    assert len(decoded) <= 2 * 8
    monkeypatch.undo()
    order = [image for batch in batches(data, range(8), batch_size=2) for image in shown(batch)]
    assert Counter(decoded) <= Counter(f"{image:03d}.png" for image in order)


def test_a_missing_caption_stops_with_its_sentence(data: ImageFolder) -> None:
    def missing(caption: str) -> torch.Tensor:
        raise ValueError(f"The caption {caption!r} has no features")

    with pytest.raises(ValueError, match="has no features"), Loader(data, missing, batch_size=1, seed=0) as source:
        source.batch(0)


def test_closing_ends_the_threads(data: ImageFolder) -> None:
    before = threading.active_count()
    source = Loader(data, features, batch_size=2, seed=0, prefetch=4)
    source.batch(0)
    assert threading.active_count() > before
    source.close()
    source.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"workers": 0}, {"prefetch": -1}])
def test_numbers_out_of_range_are_refused(data: ImageFolder, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Loader(data, features, **{"batch_size": 1, "seed": 0, **wrong})
