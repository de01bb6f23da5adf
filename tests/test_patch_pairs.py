"""The informed start: sums over pairs of patches, the embedder fitted to them, and what starts with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import HEAD_WIDTH

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, load_tensors, save
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.dataset.kept_pairs import KeptPairs
from comfyui_l2p.l2p_core.initialise import random_values
from comfyui_l2p.l2p_core.patch_pairs import ENOUGH, FEW, FILE, PatchPairs, fit_embedder
from comfyui_l2p.l2p_core.run import loop
from comfyui_l2p.l2p_core.run.recipe import DataSection, ModelSection, Recipe
from comfyui_l2p.l2p_core.tiny import bundled, image_set
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions
from comfyui_l2p.train.cli import main

DIM, CHANNELS = 24, 4


def linear_world(contrast: float, noise: float = 0.0, count: int = 64) -> tuple[PatchPairs, torch.Tensor]:
    """Pairs whose latents are a fixed linear image of their pixels, and that map (latent values, pixel values)."""
    generator = torch.Generator().manual_seed(0)
    side, cells = 4, 2
    pairs = PatchPairs(side, CHANNELS, cells)
    decode = torch.randn(cells * cells * CHANNELS, side * side * 3, generator=generator) * contrast
    for _ in range(8):
        z = torch.randn(count, 16, cells * cells * CHANNELS, generator=generator)
        x = z @ decode + noise * torch.randn(count, 16, side * side * 3, generator=generator)
        pairs.add(image(x, side, 3), image(z, cells, CHANNELS))
    return pairs, decode


def image(patches: torch.Tensor, side: int, channels: int) -> torch.Tensor:
    """16 patches of each image, in four rows, in the order "p q c"."""
    tiles = patches.view(-1, 4, 4, side, side, channels)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, 4 * side, 4 * side)


def embedder(values: int = 4 * CHANNELS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(DIM, values, generator=generator), torch.randn(DIM, generator=generator)


def test_sums_are_those_of_the_patches_however_they_come() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels, latents = torch.rand(4, 3, 32, 48, generator=generator), torch.randn(4, 16, 4, 6, generator=generator)
    whole, parts = PatchPairs(16, 16), PatchPairs(16, 16)
    whole.add(pixels, latents)
    for part in range(4):
        parts.add(pixels[part : part + 1], latents[part : part + 1])
    assert whole.count == parts.count == 4 * 2 * 3
    for name, value in whole.sums.items():
        assert torch.allclose(value, parts.sums[name], atol=1e-4), name
    x = pixels[1, :, 16:32, 32:48].permute(1, 2, 0).flatten()  # the patch of row 1, column 2
    z = latents[1, :, 2:4, 4:6].permute(1, 2, 0).flatten()
    one = PatchPairs(16, 16)
    one.add(pixels[1:2, :, 16:, 32:], latents[1:2, :, 2:, 4:])
    assert torch.allclose(one.sums["zx"].float(), z[:, None] * x, atol=1e-5)


def test_a_cropped_image_gives_its_whole_patches() -> None:
    pairs = PatchPairs(16, 16)
    pairs.add(torch.rand(1, 3, 44, 60), torch.rand(1, 16, 6, 8))
    assert pairs.count == 2 * 3


@pytest.mark.parametrize("latents", [(1, 8, 4, 4), (2, 16, 4, 4), (1, 16, 8, 8), (1, 16, 2, 4)])
def test_images_and_latents_that_do_not_belong_together_are_refused(latents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not those of latents"):
        PatchPairs(16, 16).add(torch.rand(1, 3, 32, 32), torch.rand(latents))


def test_the_fit_finds_the_embedder_where_pixels_tell_the_latents() -> None:
    pairs, decode = linear_world(0.3)
    weight, bias = embedder()
    exact = weight @ torch.linalg.pinv(decode.T)
    assert exact.norm() < weight.norm()  # so that no ridge is wanted
    found = fit_embedder(pairs, weight, bias)
    assert found.noise_gain < 1
    assert found.explained > 0.999
    # Where no patch has anything, rounding decides: only what the embedder makes of patches is fixed, and its size.
    assert torch.allclose(found.weight @ decode.T, weight, atol=1e-3)
    assert found.noise_gain == pytest.approx(float(exact.norm() / weight.norm()) ** 2, rel=0.02)
    assert torch.allclose(found.bias, bias, atol=0.05)


def test_ridge_holds_the_gain_of_noise() -> None:
    pairs, _ = linear_world(0.05, noise=0.01)
    weight, bias = embedder()
    found = fit_embedder(pairs, weight, bias)
    assert found.noise_gain == pytest.approx(1.0, abs=1e-6)
    assert found.weight.norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)
    assert 0 < found.explained < 1
    noise = torch.randn(20_000, 48, generator=torch.Generator().manual_seed(3))
    latent = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(4))
    energies = (noise @ found.weight.T).square().sum(1).mean(), (latent @ weight.T).square().sum(1).mean()
    assert energies[0].item() == pytest.approx(energies[1].item(), rel=0.05)


def test_what_cannot_be_fitted_is_one_sentence() -> None:
    pairs, _ = linear_world(0.3)
    weight, bias = embedder(values=12)
    with pytest.raises(ValueError, match="use the data set that this source made"):
        fit_embedder(pairs, weight, bias)
    pairs.count = FEW - 1
    with pytest.raises(ValueError, match="are too few for a fitted start"):
        fit_embedder(pairs, *embedder())


def test_a_file_keeps_the_sums_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    pairs, _ = linear_world(0.3)
    path = tmp_path / FILE
    pairs.save(path)
    loaded = PatchPairs.load(path)
    assert (loaded.count, loaded.space) == (pairs.count, pairs.space)
    assert all(torch.equal(value, loaded.sums[name]) for name, value in pairs.sums.items())
    pairs.sums["xx"] = pairs.sums["xx"][:3]
    pairs.save(path)
    with pytest.raises(CheckpointError, match="does not hold sums over patches"):
        PatchPairs.load(path)
    with pytest.raises(CheckpointError, match="does not hold sums over patches"):
        PatchPairs.load(bundled.SOURCE)
    sums = {name: torch.zeros(1) for name in pairs.sums}
    about = json.dumps({"side": 1 << 20, "channels": 16, "cells": 2, "order": "p q c", "count": 1})
    save(sums, path, {"l2p.kind": "patch pairs", "l2p.pairs": about}, overwrite=True)
    with pytest.raises(CheckpointError, match="does not hold sums over patches"):
        PatchPairs.load(path)
    path.write_bytes(b"text")
    with pytest.raises(CheckpointError):
        PatchPairs.load(path)


def test_pairs_of_a_folder_grow_over_several_runs_until_there_are_enough(tmp_path: Path) -> None:
    images, latents = torch.rand(2, 3, 32, 32), torch.rand(2, 16, 4, 4)
    for run in range(1, 3):
        with KeptPairs(tmp_path, PatchPairs(16, 16)) as pairs:
            pairs.add(images, latents)
        assert PatchPairs.load(tmp_path / FILE).count == run * 8
    full = PatchPairs.load(tmp_path / FILE)
    full.count = ENOUGH
    full.save(tmp_path / FILE)
    with KeptPairs(tmp_path, PatchPairs(16, 16)) as pairs:
        pairs.add(images, latents)
    assert PatchPairs.load(tmp_path / FILE).count == ENOUGH
    (tmp_path / FILE).write_bytes(b"damaged")
    with KeptPairs(tmp_path, PatchPairs(16, 16)) as pairs:
        pairs.add(images, latents)
    assert PatchPairs.load(tmp_path / FILE).count == 8


@pytest.fixture(scope="module")
def world() -> PatchPairs:
    """Pairs of renderings of the bundled world."""
    pairs = PatchPairs(16, 16)
    images = image_set.rendered(evaluation_captions(320), range(320))
    pairs.add(images, tiny.load_autoencoder().encode(images))
    return pairs


def test_a_conversion_starts_close_to_the_source_and_the_same_file_twice(world: PatchPairs, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report = convert(
            bundled.SOURCE, tmp_path / f"{name}.safetensors", head_width=HEAD_WIDTH, init="fitted", pairs=world, seed=3
        )
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert "explains" in report.summary() and "noise gain" in report.summary()
    made, about = load_tensors(tmp_path / "one.safetensors")
    source, _ = load_tensors(bundled.SOURCE)
    found = fit_embedder(world, source["x_embedder.weight"], source["x_embedder.bias"])
    assert found.explained > 0.5
    assert torch.equal(made["x_embedder.weight"], found.weight.to(made["x_embedder.weight"].dtype))
    assert about["l2p.init"] == "fitted"
    name = "local_decoder.out_conv.weight"
    shapes = {key: tuple(tensor.shape) for key, tensor in made.items()}
    scaled = torch.cat(list(random_values(name, shapes, 3, "scaled"))).view(shapes[name])
    assert torch.equal(made[name], scaled.to(made[name].dtype))


def test_conversions_that_cannot_be_fitted(world: PatchPairs, tmp_path: Path) -> None:
    target = tmp_path / "made.safetensors"
    with pytest.raises(ValueError, match="choose that data set"):
        convert(bundled.SOURCE, target, init="fitted")
    with pytest.raises(ValueError, match="works only from a latent source to the variant 1k"):
        convert(bundled.SOURCE, target, variant="4k", head_width=HEAD_WIDTH, init="fitted", pairs=world)
    with pytest.raises(ValueError, match="another latent space"):
        convert(bundled.SOURCE, target, head_width=HEAD_WIDTH, init="fitted", pairs=PatchPairs(16, 4))
    assert not target.exists()


def test_a_variant_that_cannot_start_fitted_is_refused_before_its_images_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="works only from a latent source to the variant 1k"):
        loop.train(Recipe(ModelSection("tiny", variant="4k", init="fitted"), DataSection("tiny")), folder)
    assert not (folder / "images").exists()


def test_the_command_line_makes_images_with_pairs_and_starts_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(evaluation_captions(4)), encoding="utf-8")
    folder = tmp_path / "images"
    main(["synth", "tiny", str(folder), "--prompts", str(prompts), "--seeds", "1", "--steps", "1"])
    assert PatchPairs.load(folder / FILE).count == 4 * 16
    assert main(["convert", "tiny", str(tmp_path / "a.safetensors"), "--init", "fitted", "--pairs", str(folder)]) == 2
    assert "too few for a fitted start" in capsys.readouterr().err


def test_pairs_without_a_fitted_start_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "a.safetensors"
    assert main(["convert", "tiny", str(target), "--pairs", str(tmp_path)]) == 2
    assert "add --init fitted" in capsys.readouterr().err
    assert not target.exists()
