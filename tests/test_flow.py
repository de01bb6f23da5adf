"""Schedule, noising, loss and Euler sampling."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from comfyui_l2p.l2p_core import flow


class Towards:
    """The exact velocity field of a data set of one image: (x - x0) / sigma."""

    def __init__(self, x0: Tensor):
        self.x0 = x0
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, captions: Sequence[Tensor]) -> Tensor:
        self.calls += 1
        return (x - self.x0) / sigma[:, None, None, None]


def test_schedule_falls_from_one_to_zero_and_shift_holds_it_high() -> None:
    schedule = flow.sigmas(30)
    assert schedule.shape == (31,) and schedule.dtype == torch.float32
    assert schedule[0] == 1 and schedule[-1] == 0
    assert (schedule.diff() < 0).all()
    assert torch.allclose(flow.sigmas(10, shift=1.0), torch.linspace(1, 0, 11))
    assert schedule[15] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_partial_denoise_starts_lower() -> None:
    schedule = flow.sigmas(10, shift=3.0, denoise=0.4)
    assert schedule[0] == pytest.approx(3 * 0.4 / (1 + 2 * 0.4))
    assert len(schedule) == 11


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 5, "shift": 0.0}, {"steps": 5, "denoise": 1.5}])
def test_impossible_schedules_are_explained(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be|at least"):
        flow.sigmas(**arguments)  # type: ignore[arg-type]


def test_noising_ends_at_the_image_and_at_the_noise() -> None:
    x0, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    noisy = flow.add_noise(x0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[1], noise[1])


def test_loss_of_the_exact_field_is_zero_and_in_float32() -> None:
    x0, noise = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    loss = flow.velocity_loss(Towards(x0), x0, noise, torch.tensor([0.3, 0.8]), [])
    assert loss.dtype == torch.float32 and loss < 1e-10
    errors = flow.velocity_errors(lambda x, s, c: torch.zeros_like(x), x0, noise, torch.tensor([0.3, 0.8]), [])
    assert torch.allclose(errors, (noise - x0).square().flatten(1).mean(1))


def test_sampling_the_exact_field_reaches_the_image_in_any_number_of_steps() -> None:
    x0 = torch.rand(2, 3, 4, 4) * 2 - 1
    for steps in (1, 7):
        pixels = flow.sample(Towards(x0), torch.randn(2, 3, 4, 4), [], sigmas=flow.sigmas(steps))
        assert torch.allclose(pixels, x0, atol=1e-5)


def test_samples_stay_in_range() -> None:
    pixels = flow.sample(Towards(torch.full((1, 3, 2, 2), 5.0)), torch.randn(1, 3, 2, 2), [], sigmas=flow.sigmas(3))
    assert pixels.max() == 1


def test_image_to_image_starts_from_the_noised_image() -> None:
    seen = []

    def still(x: Tensor, sigma: Tensor, captions: Sequence[Tensor]) -> Tensor:
        seen.append((x, sigma))
        return torch.zeros_like(x)

    init, noise = torch.rand(1, 3, 4, 4) * 2 - 1, torch.randn(1, 3, 4, 4)
    schedule = flow.sigmas(4, denoise=0.5)
    flow.sample(still, noise, [], sigmas=schedule, init=init)
    assert torch.allclose(seen[0][0], (1 - schedule[0]) * init + schedule[0] * noise)
    assert seen[0][1].dtype == torch.float32


def test_guidance_extrapolates_and_one_is_a_single_pass() -> None:
    def by_caption(x: Tensor, sigma: Tensor, captions: Sequence[Tensor]) -> Tensor:
        return torch.ones_like(x) * captions[0].mean()

    positive, negative = [torch.ones(1, 1)], [torch.zeros(1, 1)]
    noise = torch.zeros(1, 3, 2, 2)
    guided, _ = flow.integrate(by_caption, noise, positive, sigmas=flow.sigmas(1), cfg=3.0, negative=negative)
    assert torch.allclose(guided, torch.full_like(noise, -3.0))
    field = Towards(noise)
    flow.sample(field, noise, positive, sigmas=flow.sigmas(5), cfg=1.0)
    assert field.calls == 5
    with pytest.raises(ValueError, match="negative caption"):
        flow.sample(field, noise, positive, sigmas=flow.sigmas(5), cfg=2.0)


def test_progress_sees_every_step_and_can_interrupt() -> None:
    x0 = torch.rand(1, 3, 2, 2)
    seen = []
    flow.sample(
        Towards(x0),
        torch.randn(1, 3, 2, 2),
        [],
        sigmas=flow.sigmas(3),
        progress=lambda step, steps, predicted: seen.append((step, steps, torch.allclose(predicted, x0, atol=1e-5))),
    )
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, True)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.sample(Towards(x0), torch.randn(1, 3, 2, 2), [], sigmas=flow.sigmas(3), progress=interrupt)
