"""The bundled latent source in the host: the core's network, sampler and autoencoder, by the host's interfaces."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import golden_vectors as golden
import kit
import pytest
import torch

from comfyui_l2p.l2p_core import tiny
from comfyui_l2p.l2p_core.tiny import judge
from comfyui_l2p.l2p_core.tiny.image_set import rendered
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions
from comfyui_l2p.nodes.model.demo_source import load_demo_source
from comfyui_l2p.nodes.synthesis import TextToImage, model_name

SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    return load_demo_source()


def source(parts: tuple[Any, Any, Any], **changed: Any) -> TextToImage:
    settings = {"width": 64, "height": 64, "steps": 20, "cfg": 2.0, "sampler": "euler", "scheduler": "simple"}
    return TextToImage(*parts, **{**settings, "negative": "", "batch": 4, **changed})


def check_network_agrees_with_the_core(parts: tuple[Any, Any, Any]) -> None:
    latent, features = golden.array("x", (1, 16, 8, 12), 0), tiny.load_words().encode("a red circle")[None]
    with torch.no_grad():
        wanted = tiny.load_source()(latent, torch.tensor([0.7]), [features[0]])
    assert golden.relative_error(kit.velocity(parts[0], latent, 0.7, features), wanted) < 1e-5


def check_images_are_those_of_the_core(parts: tuple[Any, Any, Any]) -> None:
    """From the same seeds, where the host's schedule is the published one: at 50 steps."""
    caption = evaluation_captions(1)[0]
    of_core = tiny.generate(
        tiny.load_source(), tiny.load_autoencoder(), tiny.load_words(), [caption] * 2, SEEDS[:2], steps=50
    )
    here = source(parts, steps=50)
    with torch.inference_mode():
        positive, negative = here.conditioning(caption), here.conditioning("")
        images = here.images(SEEDS[:2], positive, negative, lambda step, x0: None)
    assert images.shape == (2, 64, 64, 3) and float(images.min()) >= 0 and float(images.max()) <= 1
    error = (images.movedim(-1, 1) * 2 - 1 - of_core).abs()
    assert float(error.mean()) < 0.005 and float(error.max()) < 0.2


def check_images_show_their_captions(parts: tuple[Any, Any, Any]) -> None:
    here, captions = source(parts, steps=10), evaluation_captions(6)
    with torch.inference_mode():
        negative = here.conditioning("")
        images = [here.images([9], here.conditioning(text), negative, lambda step, x0: None) for text in captions]
    score = judge.score(torch.cat(images).movedim(-1, 1) * 2 - 1, captions)
    assert score.colour > 0.8 and score.background > 0.8 and score.whole >= 0.5


def check_an_image_does_not_depend_on_its_batch(parts: tuple[Any, Any, Any]) -> None:
    here, caption = source(parts, steps=4), evaluation_captions(1)[0]
    with torch.inference_mode():
        conditioning = here.conditioning(caption), here.conditioning("")
        together = here.images(SEEDS, *conditioning, lambda step, x0: None)
        alone = here.images(SEEDS[2:3], *conditioning, lambda step, x0: None)
    assert float((together[2] - alone[0]).abs().max()) < 1e-3


def check_sizes_that_latents_do_not_divide_are_cut(parts: tuple[Any, Any, Any]) -> None:
    here = source(parts, width=60, height=75, steps=2)
    with torch.inference_mode():
        conditioning = here.conditioning("a red circle"), here.conditioning("")
        assert here.images([1], *conditioning, lambda step, x0: None).shape == (1, 75, 60, 3)


def check_an_image_of_no_numbers_is_refused(parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    here = source(parts, steps=1)
    monkeypatch.setattr(parts[2], "decode", lambda samples: torch.full((1, 64, 64, 3), float("nan")))
    with torch.inference_mode(), pytest.raises(ValueError, match="overflows in its number type"):
        here.images([1], here.conditioning(""), here.conditioning(""), lambda step, x0: None)


def check_a_broken_lora_on_the_source_is_named(parts: tuple[Any, Any, Any]) -> None:
    patched = parts[0].clone()
    weight = parts[0].model.diffusion_model.x_embedder.weight
    patched.add_patches({"diffusion_model.x_embedder.weight": ("diff", (torch.full_like(weight, float("nan")),))})
    here = source((patched, *parts[1:]), steps=1)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="is broken: its part for the weight 'x_embedder.weight'"),
    ):
        here.images([1], here.conditioning(""), here.conditioning(""), lambda step, x0: None)


def check_what_is_not_finite_is_refused_where_it_arises() -> None:
    """In a weight of the source's model, by KSampler; in one of its autoencoder, by VAE Decode, tiled or not."""
    model, clip, vae = load_demo_source()
    conditioning = [[clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0][0], {}]]
    weight = model.model.diffusion_model.layers[0].ffn_norm1.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    settings = {"positive": conditioning, "negative": conditioning, "cfg": 1.0, "steps": 1}
    with pytest.raises(ValueError, match="not finite numbers.*its weight 'layers.0.ffn_norm1.weight'"):
        kit.ksample(model, torch.zeros(1, 16, 8, 8), **settings)
    weight.data.copy_(kept)
    latent = kit.ksample(model, torch.zeros(1, 16, 8, 8), **settings)
    name, weight = next(iter(vae.first_stage_model.inverse.named_parameters()))
    weight.data.fill_(float("nan"))
    for decode in (vae.decode, vae.decode_tiled):
        with (
            torch.inference_mode(),
            pytest.raises(ValueError, match=f"not finite numbers.*its weight 'inverse.{name}'"),
        ):
            decode(latent)


def check_vae_goes_there_and_back(parts: tuple[Any, Any, Any]) -> None:
    _, _, vae = parts
    pixels = (rendered(evaluation_captions(2), [1, 2]).movedim(1, -1) + 1) / 2
    with torch.inference_mode():
        latent = vae.encode(pixels)
        back = vae.decode(latent)
        tiled = vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2)
    assert latent.shape == (2, 16, 8, 8) and back.shape == pixels.shape == tiled.shape
    assert float((back - pixels).abs().mean()) < 0.03
    assert torch.equal(vae.encode(pixels), tiny.load_autoencoder().encode(pixels.movedim(-1, 1) * 2 - 1))
    assert vae.spacial_compression_decode() == 8
    comfy.model_management.unload_all_models()


def check_the_name_of_a_model_tells_its_file_and_its_patches(parts: tuple[Any, Any, Any], tmp_path: Any) -> None:
    assert model_name(parts[0]) == "SourceModel"
    model = kit.model(tmp_path)
    assert model_name(model) == "dit_16-comfy-None.safetensors"
    names, bias = [], model.model.diffusion_model.x_embedder.bias
    for strength in (1.0, 0.5, 1.0):
        patched = model.clone()
        patched.add_patches({"diffusion_model.x_embedder.bias": ("diff", (torch.ones(bias.shape),))}, strength)
        names.append(model_name(patched))
    assert names[0] == names[2] != names[1] and names[0].startswith("dit_16-comfy-None.safetensors, patched ")
