"""Hand-over between the spaces and sampling in stages, with exact velocity fields and with the bundled models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_l2p.l2p_core import delta, flow, hybrid
from comfyui_l2p.l2p_core.growth import grow
from comfyui_l2p.l2p_core.hybrid import Stage
from comfyui_l2p.l2p_core.tiny import bundled, judge, shapes


class Halving:
    """A codec without loss for images of 2 x 2 equal pixels."""

    downscale, channels = 2, 3

    def encode(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2.0)


class Towards:
    """The exact velocity field of a data set of one image, at any size that divides it."""

    def __init__(self, x0: Tensor):
        self.x0 = x0
        self.seen: list[tuple[float, tuple[int, ...]]] = []

    def __call__(self, x: Tensor, sigma: Tensor, captions: Sequence[Any]) -> Tensor:
        self.seen.append((sigma[0].item(), tuple(x.shape)))
        return (x - F.interpolate(self.x0, x.shape[-2:])) / sigma[:, None, None, None]


def seen(stage: Stage) -> list[tuple[float, tuple[int, ...]]]:
    assert isinstance(stage.model, Towards)
    return stage.model.seen


IMAGE = F.interpolate(torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1, scale_factor=4.0)


def stages(**changes: Any) -> list[Stage]:
    latent = Stage(Towards(Halving().encode(IMAGE)), "latent", (16, 16), 3, end=0.6)
    pixels = Stage(Towards(IMAGE), "pixels", (16, 16), 4)
    return [latent, replace(pixels, **changes)]


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_levels_map_there_and_back(shift: float) -> None:
    for sigma in (0.0, 0.2, 0.85):
        assert hybrid.latent_sigma(hybrid.pixel_sigma(sigma, shift), shift) == pytest.approx(sigma)
    assert hybrid.pixel_sigma(0.5, 3.0) == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [0.0, -2.0, float("inf"), float("nan")])
def test_a_shift_is_refused_as_it_was_given(shift: float) -> None:
    for mapped in (hybrid.pixel_sigma, hybrid.latent_sigma):
        with pytest.raises(ValueError, match=f"must be above 0, not {shift};"):
            mapped(0.5, shift)


def test_stages_after_the_one_of_the_largest_seed_have_noise() -> None:
    image = hybrid.sample(stages(), [torch.zeros(1, 8)] * 2, codec=Halving(), seed=2**64 - 1)
    assert torch.isfinite(image).all()
    assert hybrid.stage_seed(2**64 - 1, 1) == 0 and hybrid.stage_seed(5, 1) == 6


def test_a_handed_over_image_has_the_level_and_the_noise_it_states() -> None:
    noise = torch.randn(2, 3, 16, 16)
    pixels = hybrid.latents_to_pixels(Halving().encode(IMAGE), 0.7, noise, Halving())
    torch.testing.assert_close(pixels, 0.3 * IMAGE + 0.7 * noise)
    small = torch.randn(2, 3, 8, 8)
    latents = hybrid.pixels_to_latents(IMAGE, 0.2, small, Halving())
    torch.testing.assert_close(latents, 0.8 * Halving().encode(IMAGE) + 0.2 * small)


def test_a_hand_over_resizes_the_clean_image_and_not_the_noise() -> None:
    grey = torch.full((1, 3, 8, 8), 0.25)
    noise = torch.randn(1, 3, 40, 24)
    torch.testing.assert_close(hybrid.renoise(grey, 0.4, noise), 0.6 * 0.25 + 0.4 * noise)


def test_latents_hand_over_to_pixels_at_the_mapped_level() -> None:
    chain = stages()
    image = hybrid.sample(chain, [torch.zeros(1, 8)] * 2, codec=Halving(), space_shift=3.0)
    torch.testing.assert_close(image, IMAGE, atol=1e-5, rtol=0)
    latent, pixels = (seen(stage) for stage in chain)
    assert [shape for _, shape in latent] == [(2, 3, 8, 8)] * 3 and [shape for _, shape in pixels] == [
        (2, 3, 16, 16)
    ] * 4
    assert latent[0][0] == 1 and pixels[0][0] == pytest.approx(hybrid.pixel_sigma(0.6, 3.0))


def test_pixels_hand_over_to_latents_and_come_back_decoded() -> None:
    latent, pixels = stages()
    chain = [replace(pixels, end=0.5), replace(latent, end=0.0)]
    image = hybrid.sample(chain, [torch.zeros(1, 8)] * 2, codec=Halving())
    torch.testing.assert_close(image, IMAGE, atol=1e-5, rtol=0)


def test_pixels_grow_with_the_noise_of_their_stage() -> None:
    small = Stage(Towards(IMAGE), "pixels", (16, 16), 2, end=0.5)
    large = Stage(Towards(IMAGE), "pixels", (32, 32), 2)
    image = hybrid.sample([small, large], [torch.zeros(1, 8)] * 2, seed=7)
    torch.testing.assert_close(image, F.interpolate(IMAGE, (32, 32)), atol=1e-5, rtol=0)
    # The same by hand.
    x = hybrid.stage_noise(7, 2, small)
    x, _ = flow.integrate(Towards(IMAGE), x, [], sigmas=flow.sigmas_between(1.0, 0.5, 2))
    grown, level = grow(x, 0.5, hybrid.stage_noise(8, 2, large))
    assert seen(large)[0] == (pytest.approx(level), (2, 3, 32, 32))
    end, _ = flow.integrate(Towards(IMAGE), grown, [], sigmas=flow.sigmas_between(level, 0.0, 2))
    assert torch.equal(end.clamp(-1, 1), image)


def test_one_stage_of_pixels_is_ordinary_sampling() -> None:
    noise = hybrid.stage_noise(3, 2, stages()[1])
    expected = flow.sample(Towards(IMAGE), noise, [], sigmas=flow.sigmas(4))
    for _ in range(2):
        assert torch.equal(hybrid.sample(stages()[1:], [torch.zeros(1, 8)] * 2, seed=3), expected)


def test_an_image_is_finished_from_low_noise() -> None:
    only = Stage(Towards(IMAGE), "pixels", (16, 16), 2, start=0.3)
    blurred = F.interpolate(F.avg_pool2d(IMAGE, 4), (24, 24))
    image = hybrid.sample([only], [torch.zeros(1, 8)] * 2, init=blurred)
    torch.testing.assert_close(image, IMAGE, atol=1e-5, rtol=0)
    assert seen(only)[0][0] == pytest.approx(0.3)


def test_progress_counts_the_steps_of_all_stages_and_can_interrupt() -> None:
    said: list[tuple[int, int]] = []

    def progress(done: int, total: int, clean: Tensor) -> None:
        said.append((done, total))
        if done == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        hybrid.sample(stages(), [torch.zeros(1, 8)] * 2, codec=Halving(), progress=progress)
    assert said == [(n, 7) for n in range(1, 6)]


@pytest.mark.parametrize(
    ("chain", "options", "words"),
    [
        ([], {}, "at least one stage"),
        (stages(), {}, "needs the VAE"),
        (stages(end=0.2), {"codec": Halving()}, "end it at 0"),
        (stages(start=1.5), {"codec": Halving()}, "Stage 2 starts at noise level 1.5 and cannot end at 0"),
        ([replace(stages()[0], end=1.0), stages()[1]], {"codec": Halving()}, "cannot end at 1"),
        ([replace(stages()[0], size=(15, 16)), stages()[1]], {"codec": Halving()}, "multiples of 2, not 16 x 15"),
        (stages(), {"codec": Halving(), "space_shift": 0.0}, "shift between the spaces must be above 0"),
        (stages()[1:], {"init": IMAGE}, "must state its noise level"),
        ([replace(stages()[1], start=0.5)], {}, "Without an image the first stage starts at noise level 1"),
        ([replace(stages()[1], end=0.5), replace(stages()[1], size=(32, 16))], {}, "keeps the aspect ratio"),
        ([replace(stages()[1], end=0.5), stages(start=0.4)[1]], {}, "hands over at 0.5"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused_before_any_step(
    chain: list[Stage], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        hybrid.sample(chain, [torch.zeros(1, 8)] * 2, **options)
    assert not any(seen(stage) for stage in chain)


def test_growing_too_late_is_said() -> None:
    small = Stage(Towards(IMAGE), "pixels", (512, 512), 2, end=0.2)
    large = replace(small, size=(1024, 1024), end=0.0)
    assert "below 0.23 the larger image may lack fine detail" in hybrid.cautions([small, large])[0]
    assert not hybrid.cautions([replace(small, end=0.5), large])


def test_the_bundled_models_share_a_sampling() -> None:
    captions = shapes.evaluation_captions(3)
    source = bundled.TinySource()
    features = [source.words.encode(text) for text in captions]
    pixels = delta.load_model(bundled.DELTA, bundled.SOURCE)
    chain = [
        Stage(source.model, "latent", (64, 64), 3, end=0.6, cfg=2.0),
        Stage(pixels, "pixels", (64, 64), 3),
    ]
    options: dict[str, Any] = {"negative": [source.words.encode("")] * 3, "codec": source.autoencoder}
    image = hybrid.sample(chain, features, **options)
    assert judge.score(image, captions).whole >= 2 / 3
    pixels.tile = 32
    torch.testing.assert_close(hybrid.sample(chain, features, **options), image, atol=1e-4, rtol=0)
