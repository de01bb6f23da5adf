"""What Hybrid Sampler refuses, and what it says of its work."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import pytest
import torch
from hybrid_runs import IMAGE, MASK, Loaded, asked, load, run

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.nodes.hybrid import grow_pixels, latent_to_pixels, schedule
from comfyui_l2p.nodes.hybrid_checks import Models, Prompts
from comfyui_l2p.nodes.hybrid_tasks import stages
from comfyui_l2p.nodes.model.dual_loading import load_dual
from comfyui_l2p.nodes.pixels import empty_pixels


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


@pytest.mark.parametrize(
    ("task", "changed", "words"),
    [
        ("restore", {}, "needs an image"),
        ("fast", {"image": torch.ones(1, 64, 64, 3)}, "starts from noise"),
        ("edit", {"image": torch.ones(1, 64, 64, 3)}, "needs a mask"),
        ("restore", {"image": torch.ones(1, 64, 64, 3), "mask": torch.ones(1, 64, 64)}, "cannot keep a mask"),
        ("upscale", {"image": torch.ones(1, 64, 64, 3), "width": 32, "height": 32}, "smaller than the image"),
        ("upscale", {"image": torch.ones(1, 64, 64, 3), "width": 96, "height": 128}, "would stretch the image"),
        ("restore", {"image": torch.ones(1, 64, 64, 3), "width": 96}, "keeps the image's size, 64 x 64"),
        ("fast", {"switch": 1.0}, "switch is 1: use a noise level above 0 and below 1, or -1"),
        ("large", {"switch": 0.0}, "switch is 0: use a noise level above 0 and below 1, or -1"),
        (
            "restore",
            {"image": torch.ones(1, 64, 64, 3), "switch": 0.0},
            "switch is 0: use a noise level above 0 and up",
        ),
        ("fast", {"steps": 0}, "^steps is 0"),
        ("fast", {"latent_steps": 0}, "^latent_steps is 0"),
        ("fast", {"cfg": -0.5}, "^cfg is -0.5: use 0 or more"),
        ("detail", {"latent_cfg": -0.5}, "^latent_cfg is -0.5: use 0 or more"),
        ("fast", {"width": 15}, "The width is 15: use 16 pixels or more"),
        ("fast", {"mask": torch.ones(1, 64, 64)}, "A mask needs the image to repaint"),
    ],
)
def check_what_does_not_fit_is_a_sentence(loaded: Loaded, task: str, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(loaded, task, **changed)


def check_a_model_is_named_where_it_helps(loaded: Loaded) -> None:
    latents = Models(loaded[0].latent, loaded[0].vae)
    with pytest.raises(ValueError, match="connect one, or choose fast"):
        run(loaded, "detail", models=latents)
    with pytest.raises(ValueError, match=r"restore needs an L2P pixel model: connect one\.$"):
        run(loaded, "restore", models=latents, image=IMAGE)


def check_nothing_is_sampled_before_all_prompts_are_checked(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    models, prompts = loaded
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", None)
    other = [[torch.zeros(1, 4, 7), {}]]
    for_latents = replace(prompts, positive=other, latent_positive=prompts.positive)
    with pytest.raises(ValueError, match="another text encoder than this model's: it has 7"):
        run((models, for_latents), "fast")
    pair = load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH))
    for latent in (models.latent, pair[0]):
        with pytest.raises(ValueError, match="latent model takes 64: .* as latent_positive"):
            run((replace(models, latent=latent), replace(prompts, latent_positive=other)), "fast")


@pytest.mark.parametrize("task", ["detail", "edit", "restore", "upscale"])
def check_pixels_alone_need_no_vae(loaded: Loaded, task: str) -> None:
    """With L2P Dual Loader a latent model is connected in any case."""
    given: dict[str, Any] = {} if task == "detail" else {"image": IMAGE, "mask": MASK if task == "edit" else None}
    given |= {"width": 80, "height": 80} if task == "upscale" else {}
    alone = run(loaded, task, models=Models(pixels=loaded[0].pixels), **given)
    assert torch.equal(run(loaded, task, models=replace(loaded[0], vae=None), **given), alone)


@pytest.mark.parametrize(("cfg", "sampler", "evaluations"), [(2.0, "heun", 30), (1.0, "heun", 15), (2.0, "euler", 16)])
def check_evaluations_are_those_of_the_sampler(loaded: Loaded, cfg: float, sampler: str, evaluations: int) -> None:
    """Heun's method evaluates the model twice a step, but for a last step to noise 0."""
    said: list[str] = []
    run(loaded, "fast", said, cfg=cfg, latent_cfg=cfg, sampler=sampler)
    assert said[-1].endswith(f"{evaluations} evaluations in all.")


def check_after_the_largest_seed_comes_0(loaded: Loaded) -> None:
    assert not torch.equal(run(loaded, "fast", seed=2**64 - 1), run(loaded, "fast", seed=2**64 - 2))


def check_levels_of_growth_can_be_typed_as_they_are_said(loaded: Loaded) -> None:
    """With the decimals of the parts' inputs."""
    said: list[str] = []
    run(loaded, "large", said, width=150, height=150)
    for level in re.findall(r" to (0\.\d+)", said[0]):
        assert len(level) <= 6
    for task in (asked("large", size=(5000, 3000)), asked("large", latent=True, switch=0.01)):
        for stage in stages(task)[:-1]:
            assert stage.end == float(f"{stage.end:.4f}") and stage.end < stage.start


def check_growth_that_comes_too_late_is_said(loaded: Loaded) -> None:
    said: list[str] = []
    run(loaded, "large", said, switch=0.2)
    assert "Growing to 128 x 128 at noise level 0.20: below 0.33 the image may lack fine detail." in said[-1]


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("detail", {"width": 64, "height": 64}, ""),
        ("detail", {"width": 120, "height": 136}, ""),
        ("detail", {"width": 256, "height": 280}, "256 x 280 is much larger than the 64 x 64 pixels .* as large_model"),
        ("fast", {"width": 130, "height": 130}, ""),
        ("restore", {"image": torch.ones(1, 140, 140, 3)}, ""),
        ("large", {}, ""),
        ("large", {"width": 150, "height": 150}, "150 x 150 is much larger .* as large_model"),
    ],
)
def check_sizes_far_from_the_models_own_are_said(loaded: Loaded, task: str, given: dict[str, Any], words: str) -> None:
    """By the node for growth; by the model itself where it decides the layout, see `before_sampling`."""
    said: list[str] = []
    run(loaded, task, said, steps=1, latent_steps=1, **given)
    for text in said:
        assert re.search(words, text) if words else text.endswith("in all.")


def check_models_that_do_not_fit_are_named(loaded: Loaded) -> None:
    models, prompts = loaded
    wrong = [
        (Models(), "No model is connected"),
        (Models(models.latent), "needs its VAE"),
        (Models(models.pixels, models.vae), "connect it as pixel_model"),
        (Models(pixels=models.latent), "This model works on latents"),
    ]
    for given, words in wrong:
        with pytest.raises(ValueError, match=words):
            run((given, prompts), "fast")
    with pytest.raises(ValueError, match="ran to its end"):
        grow_pixels(
            empty_pixels(64, 64, 1),
            torch.tensor([1.0, 0.0]),
            models.pixels,
            width=0,
            height=0,
            steps=2,
            end=0.0,
            seed=1,
        )
    half = {**empty_pixels(64, 64, 1), "noise_mask": MASK}
    with pytest.raises(ValueError, match="cannot keep what its mask leaves unpainted"):
        grow_pixels(half, torch.tensor([1.0, 0.4]), models.pixels, width=0, height=0, steps=2, end=0.0, seed=1)
    with pytest.raises(ValueError, match="This VAE's latents have 4 channels and the model's 16"):
        run((Models(models.latent, SimpleNamespace(latent_channels=4), models.pixels), prompts), "fast")
    with pytest.raises(ValueError, match="These are pixels already, not latents"):
        latent_to_pixels(
            empty_pixels(64, 64, 1),
            models.vae,
            torch.tensor([1.0, 0.5]),
            models.pixels,
            shift=1.0,
            steps=2,
            end=0.0,
            width=0,
            height=0,
        )
    with pytest.raises(ValueError, match=r"starts at noise level 0\.3 and cannot stop at 0\.5: type a lower stop_at"):
        schedule(models.pixels, 0.3, 0.5, 5)
    other = Prompts([[torch.zeros(1, 4, 7), {}]], prompts.negative)
    with pytest.raises(ValueError, match="text encoder"):
        run((models, other), "fast")
