"""Pixel Sampler, KSampler and SamplerCustomAdvanced on an L2P MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import golden_vectors as golden
import kit
import pytest
import torch
from comfy_extras import nodes_custom_sampler, nodes_differential_diffusion, nodes_model_advanced

import nodes
from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.checkpoint import load_model
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.l2p_core.tiny import SOURCE_PATH
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.model.loading import load_model as load_for_the_host
from comfyui_l2p.nodes.options import PUBLISHED
from comfyui_l2p.nodes.pixels import empty_pixels, image_to_pixels, pixels_to_image
from comfyui_l2p.nodes.sampling import SamplerSettings, sample_image

SIZE = {"width": 64, "height": 48, "batch": 1}


def sample(model: Any, scheduler: str = PUBLISHED, sampler: str = "euler", **changes: Any) -> torch.Tensor:
    settings = SamplerSettings(1, 3, changes.pop("cfg", 2.0), sampler, scheduler, changes.pop("denoise", 1.0))
    with torch.inference_mode():
        return sample_image(model, kit.caption(), kit.caption("negative", 5), settings, **{**SIZE, **changes})


def picture(name: str = "picture", width: int = 64, height: int = 48) -> torch.Tensor:
    return golden.array(name, (1, height, width, 3), 0).sigmoid()


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("euler", "simple"), ("dpmpp_2m", "beta"), ("euler_ancestral", "normal")]
)
def check_pixel_sampler_and_ksampler_agree(tmp_path: Path, sampler: str, scheduler: str) -> None:
    model = kit.model(tmp_path)
    theirs = kit.ksample(model, sampler_name=sampler, scheduler=scheduler)
    assert torch.equal(sample(model, scheduler, sampler), pixels_to_image({"samples": theirs}))


def check_image_to_image_and_ksampler_agree(tmp_path: Path) -> None:
    model, image = kit.model(tmp_path), picture()
    theirs = kit.ksample(model, image_to_pixels(image)["samples"], denoise=0.6)
    ours = sample(model, "simple", image=image, denoise=0.6)
    assert torch.equal(ours, pixels_to_image({"samples": theirs}))
    assert not torch.equal(ours, sample(model, "simple", image=image, denoise=0.9))


def sample_advanced(guider: Any, seed: int = 1) -> torch.Tensor:
    """What SamplerCustomAdvanced gives for a guider on the published sigmas, as an image."""
    with torch.inference_mode():
        output = nodes_custom_sampler.SamplerCustomAdvanced.execute(
            nodes_custom_sampler.Noise_RandomNoise(seed),
            guider,
            comfy.samplers.sampler_object("euler"),
            flow.sigmas(3, 3.0),
            {"samples": kit.latent()},
        )
    return pixels_to_image(output.args[0])


def check_sampler_custom_advanced_agrees_on_published_sigmas(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    positive, negative = kit.caption(), kit.caption("negative", 5)
    cfg = nodes_custom_sampler.CFGGuider.execute(model, positive, negative, 2.0).args[0]
    assert torch.equal(sample(model), sample_advanced(cfg))
    basic = nodes_custom_sampler.BasicGuider.execute(model, positive).args[0]
    assert torch.equal(sample(model, cfg=1.0), sample_advanced(basic))
    # Guiding by the same caption twice with cfg 2 and 1 is guiding by it once.
    dual = nodes_custom_sampler.DualCFGGuider.execute(model, positive, negative, negative, 2.0, 1.0, "regular").args[0]
    assert golden.relative_error(sample_advanced(dual), sample(model)) < 1e-5


def check_host_samples_what_the_core_samples(tmp_path: Path) -> None:
    path = kit.write(tmp_path)
    noise = comfy.sample.prepare_noise(kit.latent(), 1)
    core = flow.sample(
        load_model(path),
        noise,
        [kit.caption()[0][0][0]],
        sigmas=flow.sigmas(3, 3.0),
        cfg=2.0,
        negative=[kit.caption("negative", 5)[0][0][0]],
    )
    image = sample(kit.load_model(path, weight_dtype="fp32"))
    assert golden.relative_error(image, pixels_to_image({"samples": core})) < 1e-5


def check_a_batch_is_its_images_one_by_one(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    noise = torch.cat([golden.array(name, (1, 3, 48, 64), 0) for name in "ab"])
    features = kit.caption()[0][0].expand(2, -1, -1)
    both = kit.velocity(model, noise, 0.8, features)
    one = torch.cat([kit.velocity(model, noise[i : i + 1], 0.8, features[:1]) for i in range(2)])
    assert golden.relative_error(both, one) < 1e-5
    assert kit.ksample(model, kit.latent(batch=2)).shape == (2, 3, 48, 64)


def check_a_batch_may_have_a_caption_for_each_image(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    captions = [kit.caption(text)[0][0] for text in ("first", "second")]
    noise = golden.array("noise", (1, 3, 48, 64), 0).expand(2, -1, -1, -1)
    both = kit.velocity(model, noise, 0.8, torch.cat(captions))
    one = torch.cat([kit.velocity(model, noise[:1], 0.8, caption) for caption in captions])
    assert golden.relative_error(both, one) < 1e-5
    assert golden.relative_error(one[0], one[1]) > 1e-3


@pytest.mark.parametrize("tokens", [7, 40])
def check_combined_captions_of_any_lengths_are_averaged(tmp_path: Path, tokens: int) -> None:
    model = kit.model(tmp_path)
    first, second = kit.caption("first", 7), kit.caption("second", tokens)
    settings: dict[str, Any] = {"steps": 1, "cfg": 1.0}
    alone = [kit.ksample(model, positive=caption, **settings) for caption in (first, second)]
    both = kit.ksample(model, positive=first + second, **settings)
    assert golden.relative_error(both, (alone[0] + alone[1]) / 2) < 1e-5


def check_a_noise_mask_keeps_pixels_with_ksampler_too(tmp_path: Path) -> None:
    image, mask = picture(), torch.zeros(1, 48, 64)
    mask[:, 7:31, 13:42] = 1.0
    latent = image_to_pixels(image, mask)
    result = kit.ksample(kit.model(tmp_path), latent["samples"], noise_mask=latent["noise_mask"])
    kept = (latent["noise_mask"] == 0).expand_as(result)
    # The sampler's last sum rounds; Pixel Sampler puts the very pixels back.
    assert torch.allclose(result[kept], latent["samples"][kept], atol=1e-6)
    assert (result[~kept] != latent["samples"][~kept]).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 3, 2, 48, 64)])
def check_latents_of_other_models_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Empty Pixels or Image to Pixels, not with a VAE"):
        kit.ksample(kit.model(tmp_path), torch.ones(shape))


def check_an_empty_latent_of_the_hosts_becomes_pixels(tmp_path: Path) -> None:
    """Empty Latent Image in place of Empty Pixels: the host itself brings it to the model's size."""
    model, size = kit.model(tmp_path), {"width": 64, "height": 48, "batch_size": 1}
    (latent,) = nodes.EmptyLatentImage().generate(**size)
    settings: dict[str, Any] = {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
    conds = kit.caption(), kit.caption("negative", 5)
    with torch.inference_mode():
        (result,) = nodes.KSampler().sample(model, *settings.values(), *conds, latent)
    assert torch.equal(result["samples"], kit.ksample(model))


def check_little_memory_is_said_to_every_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.model(tmp_path)
    noise = torch.zeros(1, 3, 48, 64)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(kit.caption(), kit.caption("negative", 5))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device=None, torch_free_too=False: 1000)
    with pytest.raises(ValueError, match="choose a smaller size or batch"):
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), flow.sigmas(3))
    with pytest.raises(ValueError, match="GiB of RAM, but"):
        empty_pixels(64, 64, 1)


@pytest.mark.parametrize("size", [(50, 70), (17, 33), (104, 76)])
def check_any_size_samples(tmp_path: Path, size: tuple[int, int]) -> None:
    image = sample(kit.model(tmp_path), width=size[0], height=size[1])
    assert image.shape == (1, size[1], size[0], 3) and image.isfinite().all()


@pytest.mark.parametrize("scheduler", [PUBLISHED, "simple"])
def check_inpainting_keeps_unmasked_pixels_bit_for_bit(tmp_path: Path, scheduler: str) -> None:
    image, mask = picture(), torch.zeros(1, 48, 64)
    mask[:, 7:31, 13:42] = 1.0  # Aligned with no patch.
    result = sample(kit.model(tmp_path), scheduler, image=image, mask=mask)
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert (result[mask == 1] != image[mask == 1]).float().mean() > 0.9


def check_soft_masks_and_differential_diffusion(tmp_path: Path) -> None:
    image, mask = picture(), torch.linspace(0, 1, 64).expand(1, 48, 64)
    model = nodes_differential_diffusion.DifferentialDiffusion.execute(kit.model(tmp_path)).args[0]
    result = sample(model, image=image, mask=mask)
    assert torch.equal(result[:, :, 0], image[:, :, 0])
    change = (result - image).abs().mean((0, 1, 3))
    assert change[48:].mean() > change[:16].mean()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": picture(), "mask": torch.ones(1, 32, 64)}, "The mask is 64x32, but the image is 64x48"),
        ({"image": picture(), "mask": torch.ones(3, 48, 64)}, "There are 3 masks for 1 image:"),
        ({"mask": torch.ones(1, 48, 64)}, "A mask needs an image"),
        ({"denoise": 0.5}, "which needs an image to start from"),
        ({"width": 16384, "height": 16384, "batch": 64}, "choose a smaller size or batch"),
    ],
)
def check_mistakes_get_their_own_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample(kit.model(tmp_path), **changes)


def check_numbers_that_are_none_end_in_a_sentence(tmp_path: Path) -> None:
    """NaN in a weight, or in a LoRA: through KSampler, whatever decodes what it makes, and Pixel Sampler."""
    weights = to_comfy(golden.diffusers_weights())
    norm = weights["layers.0.ffn_norm1.weight"]
    kit.save_file({**weights, "layers.0.ffn_norm1.weight": norm * float("nan")}, tmp_path / "nan.safetensors")
    layer, dim = "diffusion_model.layers.0.attention.out", len(norm)
    lora = {f"{layer}.lora_A.weight": torch.full((2, dim), float("nan")), f"{layer}.lora_B.weight": torch.ones(dim, 2)}
    adapted, _ = comfy.sd.load_lora_for_models(kit.model(tmp_path), None, lora, 1.0, 0.0)
    broken = kit.load_model(str(tmp_path / "nan.safetensors"), weight_dtype="fp32")
    for model, at_fault in (
        (broken, "its weight 'layers.0.ffn_norm1.weight'"),
        (adapted, "is broken: its part for the weight 'layers.0.attention.out.weight'"),
    ):
        with pytest.raises(ValueError, match=f"values that are not finite numbers.*{at_fault}") as caught:
            kit.ksample(model)
        # The host shows the class of an error by its module: of one of ours, a path of this machine.
        assert caught.type is ValueError
        with pytest.raises(ValueError, match=f"values that are not finite numbers.*{at_fault}"):
            sample(model, "simple")
    with pytest.raises(ValueError, match="values that are not finite numbers"):
        pixels_to_image({"samples": torch.full((1, 3, 8, 8), float("nan"))})


def check_another_model_is_refused() -> None:
    class Patcher:
        model = object()

    with pytest.raises(ValueError, match="works on latents, not on pixels"):
        sample(Patcher())


def check_shift_nodes_change_the_schedule(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    aura, sd3 = nodes_model_advanced.ModelSamplingAuraFlow(), nodes_model_advanced.ModelSamplingSD3()
    for node in (aura.patch_aura, sd3.patch):
        same, other = node(model, 3.0)[0], node(model, 5.0)[0]
        assert golden.relative_error(sample(same), sample(model)) < 1e-5
        assert golden.relative_error(sample(same, "simple"), sample(model, "simple")) < 1e-5
        assert golden.relative_error(sample(other), sample(model)) > 1e-3


def check_interrupt_in_the_middle_and_run_again(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    whole = kit.ksample(model)
    seen: list[int] = []

    def stop(step: int, *_: Any) -> None:
        seen.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        kit.ksample(model, callback=stop)
    assert seen == [0, 1]
    assert torch.equal(kit.ksample(model), whole)


def check_two_variants_in_turn(tmp_path: Path) -> None:
    small, large = kit.model(tmp_path), kit.model(tmp_path, "dit_64")
    first = kit.ksample(small)
    assert kit.ksample(large, kit.latent(128, 128)).isfinite().all()
    assert torch.equal(kit.ksample(small), first)


def check_areas_are_in_pixels(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    seen: list[tuple[int, ...]] = []

    def watch(call: Any, args: dict[str, Any]) -> torch.Tensor:
        seen.append(tuple(args["input"].shape[-2:]))
        return call(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(watch)
    set_area = nodes.ConditioningSetArea().append
    (part,) = set_area(kit.caption("part"), width=32, height=24, x=16, y=8, strength=1.0)
    kit.ksample(model, positive=kit.caption() + part)
    assert (24, 32) in seen and (48, 64) in seen
    seen.clear()
    (part,) = nodes.ConditioningSetAreaPercentage().append(kit.caption("part"), 0.5, 0.5, 0.25, 0.25, 1.0)
    kit.ksample(model, positive=part)
    assert (24, 32) in seen


def check_conditioning_masks(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    mask = torch.zeros(1, 48, 64)
    mask[..., 32:] = 1
    (left,) = nodes.ConditioningSetMask().append(kit.caption("left"), 1 - mask, "default", 1.0)
    (right,) = nodes.ConditioningSetMask().append(kit.caption("right"), mask, "default", 1.0)
    both = kit.ksample(model, steps=1, cfg=1.0, positive=left + right)
    alone = kit.ksample(model, steps=1, cfg=1.0, positive=kit.caption("left"))
    assert golden.relative_error(both[..., :32], alone[..., :32]) < 1e-5
    assert golden.relative_error(both[..., 32:], alone[..., 32:]) > 1e-4


def check_captions_of_another_encoder_name_the_one_to_use(tmp_path: Path) -> None:
    wrong = [[torch.zeros(1, 5, 2560), {}]]
    with pytest.raises(
        ValueError, match="has 2560 values per token, and the model takes 64. Connect the CLIP of L2P Demo"
    ):
        settings = SamplerSettings(1, 1, 1.0, "euler", "simple")
        sample_image(load_demo()[0], wrong, wrong, settings, width=0, height=0, batch=1)


def check_what_a_user_should_know_of_a_result_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    model, clip = load_demo()
    words = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    settings = SamplerSettings(1, 1, 1.0, "euler", PUBLISHED)
    for side in (0, 100, 128):
        sample_image(model, words, words, settings, width=side, height=side, batch=1, tell=told.append)
    assert told[:2] == ["", ""] and "128 x 128 is much larger than the 64 x 64 pixels" in told[2]
    convert(SOURCE_PATH, tmp_path / "init.safetensors")
    untrained = load_for_the_host(str(tmp_path / "init.safetensors"))
    sample_image(untrained, words, words, settings, width=0, height=0, batch=1, tell=told.append)
    assert "it generates noise" in told[-1] and not model.model.untrained
