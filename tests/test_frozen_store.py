"""Frozen blocks in float8 or in CPU memory: the same training, to the last bit or to the rounding that is promised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import RandomBatches, pixel_model
from torch import Tensor, nn

from comfyui_l2p.l2p_core.checkpoint import load_model, save
from comfyui_l2p.l2p_core.device import accelerator
from comfyui_l2p.l2p_core.distributed.ranks import Ranks
from comfyui_l2p.l2p_core.freeze import trainable_names
from comfyui_l2p.l2p_core.memory.block_stream import BlockStream, allocations, pinned_bytes
from comfyui_l2p.l2p_core.memory.frozen_store import FrozenLinear
from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.l2p_core.ops import eight_bit
from comfyui_l2p.l2p_core.ops.eight_bit import FLOAT8, packed
from comfyui_l2p.l2p_core.training import loading as training_model
from comfyui_l2p.l2p_core.training.trainer import Trainer
from comfyui_l2p.l2p_core.training_config import TrainingConfig

pytestmark = pytest.mark.usefixtures("unflushed")

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    steps=4, lr=1e-3, blocks=1, ema_decay=0.5, caption_dropout=0.3, lora_rank=3, precision="bf16", clip_norm=0.1
)
EMPTY = tiny_models.captions(1)[0]


def config(**changes: object) -> TrainingConfig:
    return dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]


def run(chosen: TrainingConfig, until: int = 2, model: L2PModel | None = None) -> Trainer:
    return go_on(Trainer(model or pixel_model(), chosen, EMPTY), until)


def go_on(trained: Trainer, until: int) -> Trainer:
    for metrics in trained.run(RandomBatches()):
        if metrics.step == until:
            break
    return trained


def same(one: Trainer, other: Trainer) -> bool:
    ours, theirs = one._weights.state(), other._weights.state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def frozen_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]


@pytest.mark.parametrize("policy", ["shallow", "lora"])
@pytest.mark.parametrize(("precision", "checkpointing"), [("bf16", True), ("bf16", False), ("fp32", True)])
def test_streamed_weights_train_as_plain_layers_do(policy: str, precision: str, checkpointing: bool) -> None:
    """Gradients, and so weights, averages and moments, are equal to the last bit."""
    chosen = config(policy=policy, precision=precision, gradient_checkpointing=checkpointing)
    streamed = run(dataclasses.replace(chosen, stream=True))
    assert len(frozen_layers(streamed.model)) == 2 * 6, "all linear layers of two blocks"
    assert same(run(chosen), streamed)


def test_float8_trains_as_plain_layers_with_the_rounded_weights_do() -> None:
    chosen = config(precision="fp32", frozen="fp8")
    rounded = pixel_model()
    trained = trainable_names(rounded.config, chosen.blocks)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name.startswith("layers.") and name not in trained and weight.ndim == 2:
                kept = weight.bfloat16() if "adaLN" in name else packed(weight, FLOAT8).as_dtype(torch.float32)
                weight.copy_(kept)
    plain = run(dataclasses.replace(chosen, frozen="full"), model=rounded)
    assert same(plain, run(chosen)) and same(plain, run(dataclasses.replace(chosen, stream=True)))
    assert not same(plain, run(config(precision="fp32"))), "rounding has changed nothing"


@pytest.mark.parametrize("policy", ["shallow", "lora"])
def test_streamed_float8_equals_resident_float8(policy: str) -> None:
    chosen = config(frozen="fp8", policy=policy)
    assert same(run(chosen), run(dataclasses.replace(chosen, stream=True)))


def test_float8_errs_by_a_sixteenth_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 333, generator=generator) * torch.logspace(-26, 30, 40)[:, None]
    weight[3] = 0
    weight[4, 5:] *= 1e-4
    kept = packed(weight, FLOAT8)
    assert kept.elements.dtype == FLOAT8 and kept.scale is not None and kept.scale.shape == (40, 1)
    error = (kept.as_dtype(torch.float32) - weight).abs()
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2.0**-17)
    assert bool((error <= bound).all()) and float(error.max()) > 0
    # The factors are powers of two, so that bfloat16 holds the very numbers.
    assert torch.equal(kept.as_dtype(torch.bfloat16).float(), kept.as_dtype(torch.float32))


def test_converting_piece_by_piece_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = packed(torch.randn(13, 17), FLOAT8)
    whole = kept.as_dtype(torch.float32)
    monkeypatch.setattr(eight_bit, "_AT_ONCE", 7)
    assert torch.equal(kept.as_dtype(torch.float32), whole)
    assert kept.scale is not None and torch.equal(kept.elements.float() * kept.scale, whole)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_goes_on_bit_for_bit_and_samples(stream: bool, tmp_path: Path) -> None:
    chosen = config(frozen="fp8", stream=stream, policy="lora")
    straight, half = run(chosen, 4), run(chosen, 2)
    half.save(tmp_path / "state.safetensors")
    rest = Trainer(pixel_model(), dataclasses.replace(chosen, stream=not stream), EMPTY)
    rest.resume(tmp_path / "state.safetensors")
    assert same(straight, go_on(rest, 4))
    batch = RandomBatches().batch(0)
    with torch.no_grad(), straight.averaged() as one, rest.averaged() as other:
        velocities = [model(batch.pixels, torch.tensor([0.3, 0.9]), batch.captions) for model in (one, other)]
    assert torch.equal(*velocities) and bool(velocities[0].isfinite().all())


@pytest.mark.parametrize(
    "chosen",
    [config(), config(frozen="fp8"), config(precision="fp32", stream=True), config(frozen="fp8", stream=True)],
    ids=["plain", "fp8", "streamed", "streamed fp8"],
)
def test_loading_gives_the_trainer_what_it_would_make_of_a_loaded_model(chosen: TrainingConfig, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(pixel_model().state_dict(), path)
    seen: list[tuple[int, int]] = []
    loaded = training_model.load(path, chosen, Ranks(device=CPU), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert bool(frozen_layers(loaded)) == (chosen.frozen == "fp8" or chosen.stream)
    assert same(run(chosen, model=loaded), run(chosen, model=load_model(path)))


def test_the_device_has_room_for_two_blocks_and_reads_them_in_any_order() -> None:
    shapes = [[(torch.float32, torch.Size((3, n))), (torch.bfloat16, torch.Size((2,)))] for n in range(1, 6)]
    stream = BlockStream(shapes, CPU)
    expected: list[Tensor] = []
    for block in range(5):
        expected.append(torch.randn(shapes[block][0][1]))
        stream.tensor(block, 0).fill(expected[block])
        stream.tensor(block, 1).fill(torch.full((2,), float(block)))
    assert len(stream._slots) == 2
    for block in (0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2):
        assert torch.equal(stream.tensor(block, 0).read(), expected[block])
        assert stream.tensor(block, 1).read().tolist() == [block, block]


def test_what_is_filled_in_while_a_block_is_on_the_device_is_read_at_once_and_later() -> None:
    stream = BlockStream([[(torch.float32, torch.Size((3,)))] for _ in range(4)], CPU)
    pieces = [stream.tensor(block, 0) for block in range(4)]
    for block in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3):
        pieces[block].read()
        new = torch.randn(3)
        pieces[block].fill(new)
        assert torch.equal(pieces[block].read(), new)
        pieces[block - 1].fill(new + 1)  # that one may be there, on its way, or not
        assert torch.equal(pieces[block - 1].read(), new + 1)


def test_memory_that_cannot_be_pinned_is_said_once_and_used_unpinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def limited(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")
        return empty(*arguments, **options)

    monkeypatch.setattr(accelerator, "_warned", Event())
    monkeypatch.setattr(torch, "empty", limited)
    for _ in range(3):
        assert accelerator.pinned((2, 3), torch.bfloat16).shape == (2, 3)
    (record,) = caplog.records
    assert "did not pin more RAM (CUDA error: out of memory)" in record.getMessage()


@pytest.mark.parametrize(("sizes", "groups", "pinned"), [
    ([], [], 0),
    ([5], [[5]], 8),
    ([3] * 14, [[3] * 10, [3, 3], [3], [3]], 32 + 8 + 4 + 4),
    ([8, 8], [[8, 8]], 16),
    ([9, 1, 1], [[9], [1, 1]], 16 + 2),
], ids=str)  # fmt: skip
def test_blocks_share_allocations_that_waste_little(sizes: list[int], groups: list[list[int]], pinned: int) -> None:
    assert allocations(sizes) == groups and pinned_bytes(sizes) == pinned


def test_where_nothing_is_frozen_nothing_is_stored() -> None:
    assert not frozen_layers(run(config(blocks=2, frozen="fp8", stream=True), 1).model)
    with pytest.raises(ValueError, match='policy "all" trains everything: remove it'):
        config(policy="all", frozen="fp8")
    with pytest.raises(ValueError, match="stream = true needs offload = true"):
        config(policy="all", stream=True)
