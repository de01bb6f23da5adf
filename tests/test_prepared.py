"""Micro-batches made ready ahead of use, and what a step waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import tiny_models
import torch
from tiny_models import RandomBatches

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.ops.sample_randomness import draw
from comfyui_l2p.l2p_core.training import prepared
from comfyui_l2p.l2p_core.training.batch import Batch
from comfyui_l2p.l2p_core.training.prepared import Preparation, Prepared
from comfyui_l2p.l2p_core.training_config import TrainingConfig

CPU = torch.device("cpu")
CONFIG = TrainingConfig(steps=4, caption_dropout=0.5, precision="fp32")
EMPTY = tiny_models.captions(1)[0]
SIGMAS = flow.training_sigmas()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that batches take to a GPU, without one: no memory can be pinned."""
    monkeypatch.setattr(accelerator, "has_own_memory", lambda device_type: True)
    monkeypatch.setattr(accelerator, "pinned", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))


def made(batches: object, numbers: Iterator[int]) -> list[Prepared]:
    prepare = Preparation(batches, CONFIG, SIGMAS, EMPTY, CPU)  # type: ignore[arg-type]
    with prepared.ahead(prepare, numbers, CPU) as ready:
        return list(ready)


def same(one: Prepared, other: Prepared) -> bool:
    ours, theirs = ([*batch[:3], *batch.captions] for batch in (one, other))
    return all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


def test_a_thread_makes_the_batches_that_the_loop_would_make(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threaded = made(RandomBatches(own_seeds=True), iter(range(6)))
    monkeypatch.undo()
    assert all(map(same, threaded, made(RandomBatches(own_seeds=True), iter(range(6)))))
    assert len(threaded) == 6


def test_a_batch_is_what_its_number_says() -> None:
    (batch,) = made(RandomBatches(), iter([3]))
    source = RandomBatches().batch(3)
    for row, number in enumerate(source.numbers):
        drawn = draw(CONFIG.seed, number, source.pixels.shape[1:], levels=len(SIGMAS), dropout=0.5, own_seed=None)
        assert torch.equal(batch.noise[row], drawn.noise) and batch.sigma[row] == SIGMAS[drawn.sigma_index]
        assert batch.captions[row] is (EMPTY if drawn.drop_caption else source.captions[row])
    assert torch.equal(batch.pixels, source.pixels)


def test_one_batch_is_made_while_another_is_used_and_no_more(as_on_a_gpu: None) -> None:
    asked: list[int] = []

    class Source:
        def batch(self, number: int) -> Batch:
            asked.append(number)
            return RandomBatches().batch(number)

    prepare = Preparation(Source(), CONFIG, SIGMAS, EMPTY, CPU)
    with prepared.ahead(prepare, iter(range(10)), CPU) as ready:
        next(ready)
        next(ready)
    assert asked in ([0, 1], [0, 1, 2])


def test_what_a_source_says_is_wrong_reaches_the_loop(as_on_a_gpu: None) -> None:
    class Broken:
        def batch(self, number: int) -> Batch:
            raise ValueError("image 7 is broken")

    with pytest.raises(ValueError, match="image 7 is broken"):
        made(Broken(), iter(range(3)))


def test_images_too_large_to_pin_are_not(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []

    def noted(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        pinned.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(accelerator, "pinned", noted)
    monkeypatch.setattr(prepared, "_PINNED_AT_MOST", 5000)
    source = RandomBatches(batch_size=2, size=32)
    config = dataclasses.replace(CONFIG, caption_dropout=0.0)
    Preparation(source, config, SIGMAS, EMPTY, CPU)(0)
    assert torch.Size([2, 3, 32, 32]) not in pinned and torch.Size([2]) in pinned
