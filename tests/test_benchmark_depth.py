"""The benchmark of bit depth measures what it says, after too few steps to mean anything."""

from __future__ import annotations

import pytest
import torch

from comfyui_l2p.l2p_core.model import L2PModel
from comfyui_l2p.train.benchmark import depth


def test_errors_are_counted_in_levels_of_8_bits() -> None:
    numbers = [0, 1000, 2000, 4095]
    off = torch.tensor([0.2, -0.24, 0.26, -3.0], dtype=torch.float64) / 255
    found = depth.errors(depth.values(numbers) + off, numbers)
    assert found.share == 0.5 and found.median == pytest.approx(0.24) and found.ninth_decile > 0.26


def test_steps_differ_by_less_than_the_tolerance_and_their_captions_differ() -> None:
    steps = depth.images([0, 1, 4095])
    assert steps.shape == (3, 3, depth.SIDE, depth.SIDE) and depth.SIDE**2 >= 64
    assert steps[0].unique().item() == -1 and steps[2].unique().item() == 1
    assert 0 < (steps[1, 0, 0, 0] + 1) / 2 * 255 < depth.TOLERANCE
    first, second = depth.captions([17, 18])
    assert first.shape == (1, depth.CONFIG.caption_dim) and not torch.equal(first, second)
    assert first.norm().item() == pytest.approx(second.norm().item())


def test_a_model_that_knows_the_ramp_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact velocity in place of the model: what is left is the error of sampling and measuring."""
    numbers = list(range(0, depth.LEVELS, 64))
    by_caption = {
        tuple(caption.flatten().tolist()): number
        for number, caption in zip(numbers, depth.captions(numbers), strict=True)
    }

    def exact(x: torch.Tensor, sigma: torch.Tensor, captions: list[torch.Tensor]) -> torch.Tensor:
        x0 = depth.images([by_caption[tuple(caption.flatten().tolist())] for caption in captions])
        return (x - x0) / sigma[:, None, None, None]

    found = depth.errors(depth.sampled(exact, numbers, seed=0), numbers)  # type: ignore[arg-type]
    assert found.share == 1 and found.ninth_decile < 1e-3


def test_training_leads_to_a_model_that_samples() -> None:
    model = depth.trained(2, seed=0)
    assert isinstance(model, L2PModel) and not model.training
    means = depth.sampled(model, [0, 4095], seed=0)
    assert means.shape == (2,) and bool(means.isfinite().all())
