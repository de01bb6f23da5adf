"""Batches as a pure function of their number, and images that are made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comfyui_l2p.l2p_core.dataset.images import from_uint8, to_uint8
from comfyui_l2p.l2p_core.files.tensor_file import save
from comfyui_l2p.l2p_core.tiny import image_set as data
from comfyui_l2p.l2p_core.tiny import judge
from comfyui_l2p.l2p_core.training.batch import Batch

pytestmark = pytest.mark.usefixtures("unflushed")


def image_set(count: int = 7) -> data.ImageSet:
    """Images whose every pixel is their number."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return data.ImageSet(pixels, [f"image {i}" for i in range(count)], list(range(100, 100 + count)))


def batches(seed: int = 0, batch_size: int = 3, **process: int) -> data.Batches:
    return data.Batches(image_set(), lambda text: torch.tensor([[float(text.split()[1])]]), batch_size, seed, **process)


def numbers(batch: Batch) -> list[int]:
    return ((batch.pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_an_epoch_shows_every_image_once() -> None:
    source = batches()
    shown = [row for number in range(14) for row in numbers(source.batch(number))]
    epochs = [shown[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_its_number_and_the_seed_alone() -> None:
    forwards, backwards = batches(), batches()
    expected = [numbers(forwards.batch(number)) for number in range(9)]
    assert [numbers(backwards.batch(number)) for number in reversed(range(9))] == expected[::-1]
    other = batches(seed=1)
    assert [numbers(other.batch(number)) for number in range(9)] != expected


def test_processes_share_the_batches_of_one() -> None:
    whole, parts = batches(batch_size=6), [batches(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for number in range(5):
        found = [part.batch(number) for part in parts]
        assert [row for part in found for row in numbers(part)] == numbers(whole.batch(number))
        assert [sample for part in found for sample in part.numbers] == whole.batch(number).numbers


def test_captions_seeds_and_pixels_stay_together() -> None:
    batch = batches(batch_size=5).batch(3)
    assert batch.numbers == [15, 16, 17, 18, 19]
    assert [int(caption) for caption in batch.captions] == numbers(batch)
    assert batch.seeds == [100 + row for row in numbers(batch)]
    assert batch.pixels.dtype == torch.float32


def test_generated_images_are_made_once_and_shared_by_larger_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PART", 4)
    made: list[str] = []

    def generate(captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        made.extend(captions)
        return data.rendered(captions, seeds)

    small = data.generated(generate, 6, 0, tmp_path, "test")
    assert len(made) == 8
    large = data.generated(generate, 12, 0, tmp_path, "test")
    assert len(made) == 12
    assert torch.equal(large.pixels[:6], small.pixels)
    assert large.captions[:6] == small.captions
    assert len(set(large.seeds)) == 12
    assert data.generated(generate, 6, 1, tmp_path, "test").captions != small.captions


def test_renderings_show_their_captions() -> None:
    captions, seeds = [data.caption_of(i) for i in range(8)], [data.seed_of(i) for i in range(8)]
    assert judge.score(data.rendered(captions, seeds), captions).whole == 1


def test_pixels_survive_eight_bits() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_a_foreign_file_among_the_images_is_named(tmp_path: Path) -> None:
    save({"x": torch.zeros(1)}, tmp_path / "test-0-000000.safetensors")
    with pytest.raises(ValueError, match="not a file of cached images"):
        data.generated(data.rendered, 1, 0, tmp_path, "test")
