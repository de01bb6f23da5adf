"""Sampling in both spaces in the host: Hybrid Sampler against the same stages wired from nodes, and the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import CFGGuider, DisableNoise, RandomNoise, SamplerCustomAdvanced
from hybrid_runs import CAPTION, IMAGE, MASK, Loaded, asked, load, run
from torch import Tensor

from comfyui_l2p.l2p_core import delta, hybrid, tiny
from comfyui_l2p.l2p_core.hybrid import Stage
from comfyui_l2p.l2p_core.tiny import judge
from comfyui_l2p.nodes import hybrid_sampling
from comfyui_l2p.nodes.hybrid import grow_pixels, latent_to_pixels, pixels_to_latent, schedule
from comfyui_l2p.nodes.hybrid_checks import Models, Prompts
from comfyui_l2p.nodes.hybrid_tasks import Asked, PlannedStage, stages
from comfyui_l2p.nodes.pixels import empty_pixels, image_to_pixels, keep_unmasked, pixels_to_image


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


def sampled(model: Any, prompts: Prompts, latent: dict[str, Any], sigmas: Tensor, seed: int | None) -> Any:
    """What the nodes of the host make of a stage; without a seed they add no noise."""
    guider = CFGGuider.execute(model, prompts.positive, prompts.negative, 2.0).result[0]
    noise = (DisableNoise.execute() if seed is None else RandomNoise.execute(seed)).result[0]
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(
            noise, guider, comfy.samplers.sampler_object("euler"), sigmas, latent
        ).result


def wired(loaded: Loaded, planned: Sequence[PlannedStage], image: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same stages from nodes: each starts from what the sampler before it gave."""
    models, prompts = loaded
    output: dict[str, Any] = {}
    denoised: dict[str, Any] = {}
    sigmas = torch.empty(0)
    for number, stage in enumerate(planned):
        model, (height, width), seed = models.of(stage), stage.size, 5 + number
        to: dict[str, Any] = {"steps": stage.steps, "end": stage.end}
        size: dict[str, Any] = {"width": width, "height": height}
        if stage.begins == "space":
            latent, sigmas = latent_to_pixels(denoised, models.vae, sigmas, model, shift=1.0, **to, **size)
        elif stage.begins == "growth":
            latent, sigmas, late = grow_pixels(output, sigmas, model, **to, **size, seed=seed)
            assert not late
        else:
            sigmas = schedule(model, stage.start, stage.end, stage.steps)
            latent = empty_pixels(width, height, 1)
            if stage.space == "latent":
                latent = {"samples": torch.zeros(1, 16, height // 8, width // 8)}
            elif stage.begins == "image":
                assert image is not None
                latent = image_to_pixels(image, mask, width, height)
        with torch.inference_mode():
            output, denoised = sampled(model, prompts, latent, sigmas, None if stage.begins == "growth" else seed)
    result = pixels_to_image(output)
    return result if image is None or mask is None else keep_unmasked(result, image, mask)


@pytest.mark.parametrize(
    ("task", "given", "spaces", "sizes"),
    [
        ("fast", {}, "latent pixels", [64, 64]),
        ("detail", {"width": 128, "height": 128}, "pixels pixels", [64, 128]),
        ("large", {"width": 150, "height": 150}, "latent pixels pixels pixels", [64, 64, 98, 150]),
        ("edit", {"image": IMAGE, "mask": MASK}, "pixels", [64]),
        ("restore", {"image": IMAGE}, "pixels", [64]),
        ("upscale", {"image": IMAGE, "width": 96}, "pixels", [96]),
    ],
)
def check_hybrid_sampler_is_its_parts_bit_for_bit(
    loaded: Loaded,
    task: str,
    given: dict[str, Any],
    spaces: str,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[PlannedStage] = []

    def noted(given: Asked) -> list[PlannedStage]:
        planned.extend(stages(given))
        return planned

    monkeypatch.setattr(hybrid_sampling, "stages", noted)
    said: list[str] = []
    image = run(loaded, task, said, **given)
    assert said[1] == said[0].replace("Plan", "Done")
    assert [stage.space for stage in planned] == spaces.split() and [stage.size[1] for stage in planned] == sizes
    assert torch.equal(wired(loaded, planned, given.get("image"), given.get("mask")), image)
    if task == "fast":
        assert "latents 64 x 64, noise 1.00 to 0.65, 5 steps; pixels 64 x 64, noise 0.65 to 0.00, 3 steps" in said[0]
        assert "16 evaluations in all" in said[0]


def check_the_core_makes_the_same_image(loaded: Loaded) -> None:
    words = tiny.load_words()
    models, _ = loaded
    stages = [
        Stage(tiny.load_source(), "latent", (64, 64), 5, end=0.65, cfg=2.0),
        Stage(delta.load_model(tiny.DELTA_PATH, tiny.SOURCE_PATH, dtype=torch.float32), "pixels", (64, 64), 3, cfg=2.0),
    ]
    wanted = hybrid.sample(
        stages, [words.encode(CAPTION)], seed=5, negative=[words.encode("")], codec=tiny.load_autoencoder()
    )
    image = run(loaded, "fast").movedim(-1, 1) * 2 - 1
    assert float((image - wanted).abs().mean()) < 0.01
    assert judge.score(image, [CAPTION]).whole == 1


def check_large_images_take_their_layout_at_the_models_size_and_double() -> None:
    planned = stages(asked("auto", latent=True, size=(2160, 3840), large_own=4096, large_steps=50))
    assert [stage.space for stage in planned] == ["latent", "pixels", "pixels", "pixels"]
    assert planned[0].size == planned[1].size and planned[-1].size == (2160, 3840)
    assert abs(planned[0].size[0] * planned[0].size[1] / 1024**2 - 1) < 0.01
    assert [stage.large for stage in planned] == [False, False, False, True]
    for before, stage in zip(planned[1:], planned[2:], strict=False):
        assert stage.size[0] / before.size[0] <= 2.01 and stage.start > before.end
    assert [stage.end for stage in planned][-1] == 0 and planned[0].steps < 8
    assert stages(asked("large"))[-1].size == (2048, 2048)


def check_a_size_is_sampled_by_the_model_that_was_trained_nearer_to_it() -> None:
    planned = stages(asked("large", size=(8192, 8192), large_own=8192, large_steps=50))
    assert [(stage.size[0], stage.large) for stage in planned] == [
        (1024, False),
        (2048, False),
        (4096, True),
        (8192, True),
    ]
    for task in ("restore", "upscale", "edit"):
        image = {"image": (3000, 4000), "mask": task == "edit", "large_own": 4096, "large_steps": 50}
        assert stages(asked(task, **image))[0].large
        assert not stages(asked(task, **image | {"large_own": 0}))[0].large


def check_without_a_model_for_them_images_grow_later() -> None:
    """As above its own size a model decides shapes badly."""
    alone, with_large = stages(asked("large")), stages(asked("large", large_own=4096, large_steps=50))
    assert alone[0].end == pytest.approx(0.206, abs=1e-3) and with_large[0].end == pytest.approx(0.371, abs=1e-3)


def check_a_side_that_is_not_typed_keeps_the_aspect_ratio() -> None:
    image = {"image": (576, 1024)}
    assert stages(asked("auto", size=(0, 2048), **image))[0].size == (1152, 2048)
    assert stages(asked("upscale", size=(1152, 0), **image))[0].size == (1152, 2048)
    assert stages(asked("upscale", **image))[0].size == (2304, 4096)
    assert stages(asked("restore", size=(576, 0), **image))[0].size == (576, 1024)


def check_a_10k_image_is_planned_from_the_1k_layout() -> None:
    planned = stages(asked("large", size=(10240, 10240)))
    assert [stage.size[0] for stage in planned] == [1024, 1821, 3238, 5758, 10240]


def check_pixels_go_back_to_latents(loaded: Loaded) -> None:
    models, prompts = loaded
    sigmas = schedule(models.pixels, 1.0, 0.6, 5)
    _, denoised = sampled(models.pixels, prompts, empty_pixels(64, 64, 1), sigmas, 5)
    latent, sigmas = pixels_to_latent(denoised, models.vae, sigmas, models.latent, shift=1.0, steps=4, end=0.0)
    assert latent["samples"].shape == (1, 16, 8, 8) and float(sigmas[0]) == pytest.approx(0.6)
    output, _ = sampled(models.latent, prompts, latent, sigmas, 6)
    with torch.inference_mode():
        image = models.vae.decode(output["samples"]).movedim(-1, 1) * 2 - 1
    assert judge.score(image, [CAPTION]).whole == 1


def check_edit_keeps_what_is_not_painted_exactly(loaded: Loaded) -> None:
    image, mask = torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:40] = 1
    said: list[str] = []
    edited = run(loaded, "auto", said, image=image, mask=mask)
    keep = mask[0] == 0
    assert torch.equal(edited[0][keep], image[0][keep]) and not torch.equal(edited, image)
    assert said[0].startswith("Plan: pixels 64 x 64, noise 1.00 to 0.00")


def check_finished_images_are_restored_and_enlarged(loaded: Loaded) -> None:
    said: list[str] = []
    image = run(loaded, "fast")
    restored = run(loaded, "auto", said, image=image)
    assert restored.shape == image.shape and "noise 0.30 to 0.00" in said[0]
    larger = run(loaded, "auto", said, image=image, width=96, height=96)
    assert larger.shape == (1, 96, 96, 3) and "noise 0.50 to 0.00" in said[-1]


@pytest.mark.parametrize(("task", "side"), [("restore", 64), ("upscale", 96)])
def check_levels_between_those_of_8_bits_are_sampled(
    loaded: Loaded, task: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing between the image and the sampler, or behind it, rounds to 8 or 16 bits."""
    taken: list[Tensor] = []
    sample = comfy.samplers.CFGGuider.sample

    def watched(self: Any, noise: Tensor, latent: Tensor, *given: Any, **named: Any) -> Tensor:
        taken.append(latent)
        return sample(self, noise, latent, *given, **named)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", watched)
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)).mul(0.8).add(0.1)
    result = run(loaded, task, image=image, width=side, height=side)
    pixels = image.movedim(-1, 1) * 2 - 1
    (latent,) = taken
    assert latent.dtype == torch.float32
    assert torch.equal(latent, pixels if side == 64 else hybrid.resized(pixels, (side, side)))
    assert result.dtype == torch.float32 and result.shape == (1, side, side, 3)
    for top in (255, 65535):
        assert ((result * top - (result * top).round()).abs() > 0.05).float().mean() > 0.5, f"levels of {top}"


def check_either_model_may_be_left_out(loaded: Loaded) -> None:
    models, _ = loaded
    latents = run(loaded, "auto", models=Models(models.latent, models.vae), width=60, height=50)
    pixels = run(loaded, "fast", models=Models(pixels=models.pixels), width=60, height=50)
    said: list[str] = []
    both = run(loaded, "fast", said, width=60, height=50)
    assert latents.shape == pixels.shape == both.shape == (1, 50, 60, 3)
    assert "latents 64 x 56, noise" in said[-1] and "pixels 60 x 50, noise" in said[-1]
