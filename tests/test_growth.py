"""The cosine transform, and growth of noisy images: what holds for every frequency band before and after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from comfyui_l2p.l2p_core.growth import grow, grown_sigma, safe_sigma
from comfyui_l2p.l2p_core.ops import dct
from comfyui_l2p.l2p_core.ops.dct import idct, resize_band


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dct2(x: Tensor) -> Tensor:
    return dct.dct(dct.dct(x).transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17])
def test_the_transform_is_the_orthonormal_dct(size: int) -> None:
    k, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (j + 0.5) * k / size)
    matrix[0] /= math.sqrt(2)
    x = noise(3, size)
    torch.testing.assert_close(dct.dct(x), x @ matrix.T.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(idct(dct.dct(x)), x, atol=2e-6, rtol=0)


def test_resizing_a_band_is_the_same_in_pieces_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = noise(12, 20)
    whole = resize_band(plane, 36, 60)
    torch.testing.assert_close(resize_band(whole, 12, 20), plane, atol=1e-5, rtol=0)
    torch.testing.assert_close(dct2(whole)[:12, :20], dct2(plane), atol=1e-5, rtol=0)
    monkeypatch.setattr(dct, "ELEMENTS_AT_ONCE", 64)
    assert torch.equal(resize_band(plane, 36, 60), whole)
    for height, width in ((36, 60), (12, 60), (12, 20)):
        assert torch.equal(
            resize_band(plane, height, width, torch.empty(height, width)), resize_band(plane, height, width)
        )


def test_every_band_has_the_marginals_of_the_new_noise_level() -> None:
    sigma, (height, width), (new_height, new_width) = 0.6, (16, 24), (32, 48)
    x0 = resize_band(noise(4, 6), height, width)[None, None] * 3
    x = (1 - sigma) * x0 + sigma * noise(400, 1, height, width)
    grown, level = grow(x, sigma, noise(400, 1, new_height, new_width, seed=1))
    spectrum = dct2(grown)[:, 0]
    assert level == pytest.approx(2 * sigma / (1 + sigma)) == grown_sigma(sigma, (height, width), (32, 48))
    # Mean of the old band: (1 - t') r X0; of the new band: 0. Standard deviation everywhere: t'.
    mean, expected = spectrum.mean(0), torch.zeros(new_height, new_width)
    expected[:height, :width] = (1 - level) * 2 * dct2(x0[0, 0])
    error = level / math.sqrt(400)
    assert (mean - expected).square().mean().sqrt() == pytest.approx(error, rel=0.1)
    assert (mean - expected).abs().max() < 5 * error
    deviation = spectrum.std(0)
    for band in (deviation[:height, :width], deviation[height:], deviation[:height, width:]):
        assert band.mean() == pytest.approx(level, rel=0.02)
        assert band.sub(level).abs().max() < 0.25 * level


def test_growing_to_the_same_size_changes_nothing() -> None:
    x = noise(2, 3, 10, 14)
    fresh = noise(2, 3, 10, 14, seed=1)
    grown, level = grow(x, 0.7, fresh)
    torch.testing.assert_close(grown, x, atol=1e-6, rtol=0)
    assert torch.equal(fresh, noise(2, 3, 10, 14, seed=1))
    assert level == pytest.approx(0.7)


def test_safe_levels_are_those_of_the_published_spectrum() -> None:
    for old, new, safe in ((512, 1024, 0.41), (1024, 4096, 0.38), (2048, 4096, 0.34)):
        assert safe_sigma((old, old), (new, new)) == pytest.approx(safe, abs=0.006)
    assert safe_sigma((512, 512), (1024, 1024), delta=0.05) < 0.41
    assert safe_sigma((1024, 512), (2048, 1024)) == pytest.approx(safe_sigma((512, 1024), (1024, 2048)))


@pytest.mark.parametrize("side", [102, 576])  # of 1K, and of the last stage of growth from there
def test_growing_to_10k_holds_less_than_three_images(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dct, "ELEMENTS_AT_ONCE", dct.ELEMENTS_AT_ONCE // 100)  # the image has a hundredth of 10K's
    x, fresh = noise(1, 3, side, side), noise(1, 3, 1024, 1024)
    image = fresh.numel() * 4
    with torch.profiler.profile(profile_memory=True) as profiler:
        grown, _ = grow(x, 0.5, fresh)
    now = peak = image + x.numel() * 4
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert now == pytest.approx(2 * image + x.numel() * 4, rel=0.05), "the result, the noise and the smaller image"
    assert peak < 2.9 * image
    assert grown.shape == fresh.shape


@pytest.mark.parametrize(
    ("shape", "sigma", "words"),
    [
        ((1, 3, 32, 40), 0.5, "keeps the aspect ratio; 32 x 32 has it"),
        ((1, 3, 8, 8), 0.5, "make the image smaller"),
        ((1, 3, 32, 32), 0.0, "a finished image is resized instead"),
        ((1, 3, 32, 32), math.nan, "above 0 and at most 1"),
        ((2, 3, 32, 32), 0.5, "only height and width may differ"),
        ((1, 4, 32, 32), 0.5, "only height and width may differ"),
    ],
)
def test_growth_that_cannot_be_is_a_sentence(shape: tuple[int, ...], sigma: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grow(noise(1, 3, 16, 16), sigma, noise(*shape))


def test_an_aspect_ratio_is_kept_to_the_pixel() -> None:
    grown, _ = grow(noise(1, 1, 30, 53), 0.5, noise(1, 1, 61, 107))
    assert grown.shape == (1, 1, 61, 107)
