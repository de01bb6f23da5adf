"""The model takes any size, any mix of captions and any precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
from golden_vectors import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.backbone import Linear, RefinedCaptions
from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.model import L2PModel, LatentModel, key_shapes
from comfyui_l2p.l2p_core.ops import precision


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(50, 70), (90, 160), (1, 1)])
def test_any_size_gives_an_image_of_that_size(variant: str, height: int, width: int) -> None:
    model = tiny_models.pixel_model(variant)
    with torch.no_grad():
        velocity = model(torch.randn(1, 3, height, width), torch.tensor([0.5]), tiny_models.captions(4))
    assert velocity.shape == (1, 3, height, width)
    assert velocity.isfinite().all()


@pytest.mark.parametrize(("width", "height"), [(832, 1216), (1280, 720)])
def test_common_sizes(width: int, height: int) -> None:
    model = tiny_models.pixel_model()
    with torch.no_grad():
        velocity = model(torch.randn(1, 3, height, width), torch.tensor([0.5]), tiny_models.captions(4))
    assert velocity.shape == (1, 3, height, width)


def test_padding_does_not_reach_an_image_that_needs_none() -> None:
    """The rows that were there before padding see the same tokens, so the crop is of a real larger image."""
    model = tiny_models.pixel_model()
    odd = torch.randn(1, 3, 40, 64)
    mirrored = torch.cat([odd, odd[:, :, 31:39].flip(-2)], dim=-2)
    sigma, caption = torch.tensor([0.3]), tiny_models.captions(4)
    with torch.no_grad():
        assert torch.equal(model(odd, sigma, caption), model(mirrored, sigma, caption)[:, :, :40])


def test_mixed_captions_equal_running_alone() -> None:
    model = tiny_models.pixel_model()
    pixels, sigma = torch.randn(4, 3, 48, 64), torch.tensor([0.9, 0.1, 0.5, 0.7])
    mixed = tiny_models.captions(1, 33, 32, 70)
    with torch.no_grad():
        together = model(pixels, sigma, mixed)
        for i in range(4):
            alone = model(pixels[i : i + 1], sigma[i : i + 1], mixed[i : i + 1])
            assert relative_error(together[i : i + 1], alone) < 1e-5


def test_mixed_captions_in_the_latent_source() -> None:
    torch.manual_seed(0)
    model = LatentModel(tiny_models.SOURCE)
    latents, sigma, mixed = torch.randn(2, 16, 7, 10), torch.tensor([0.9, 0.1]), tiny_models.captions(3, 50)
    with torch.no_grad():
        together = model(latents, sigma, mixed)
        alone = model(latents[1:], sigma[1:], mixed[1:])
    assert together.shape == latents.shape
    assert relative_error(together[1:], alone) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_agrees_with_float32(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_models.pixel_model()
    pixels, sigma, caption = torch.randn(1, 3, 32, 48), torch.tensor([0.6]), tiny_models.captions(9)
    with torch.no_grad():
        exact = model(pixels, sigma, caption)
        rough = model.to(dtype)(pixels, sigma, caption)
    assert rough.dtype == torch.float32
    assert relative_error(rough, exact) < tolerance


def test_timesteps_keep_float32_resolution_in_a_bfloat16_model() -> None:
    """In bfloat16 0.500 and 0.501 would be one number."""
    model = tiny_models.pixel_model().bfloat16()
    near = model.t_embedder(torch.tensor([0.5, 0.501]))
    assert not torch.equal(near[0], near[1])


def test_float16_survives_activations_beyond_its_range() -> None:
    model = tiny_models.pixel_model().half()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "feed_forward.w1" in name or "feed_forward.w3" in name:
                parameter.mul_(3000)
        velocity = model(torch.randn(1, 3, 32, 32), torch.tensor([0.6]), tiny_models.captions(9))
    assert velocity.isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients_from_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = []

    def counting(function: Any, *args: Any, **kwargs: Any) -> Any:
        segments.append(function)
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("comfyui_l2p.l2p_core.ops.memory_saving.checkpoint", counting)
    model = tiny_models.pixel_model()
    pixels, sigma, caption = torch.randn(1, 3, 32, 48), torch.tensor([0.6]), tiny_models.captions(9)
    gradients = []
    for checkpointing, kept in ((False, frozenset()), (True, frozenset()), (True, frozenset({1, 2}))):
        model.zero_grad()
        model.gradient_checkpointing, model.kept_blocks = checkpointing, kept
        model(pixels, sigma, caption).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    config = model.config
    assert config.head is not None
    blocks = config.n_layers + 2 * config.n_refiner_layers
    everything = blocks + 2 * len(config.head.stages) + 1
    assert len(segments) == everything + everything - 2
    for name, gradient in gradients[0].items():
        for again in (gradients[1][name], gradients[2][name]):
            assert gradient is not None and again is not None
            assert torch.allclose(gradient, again, rtol=1e-4, atol=1e-6), name


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    model = tiny_models.pixel_model()
    arguments = torch.randn(1, 3, 64, 80), torch.tensor([0.6]), tiny_models.captions(11)
    with torch.inference_mode():
        model(*arguments)
    model(*arguments).sum().backward()


@pytest.mark.parametrize("lengths", [(9, 9), (3, 40)], ids=["equal", "mixed"])
@pytest.mark.parametrize("latent", [False, True])
def test_sampling_with_refined_captions_equals_sampling_without(latent: bool, lengths: tuple[int, int]) -> None:
    model = LatentModel(tiny_models.SOURCE) if latent else tiny_models.pixel_model()
    given = torch.randn(2, 16 if latent else 3, 8 if latent else 32, 8 if latent else 32)
    captions, negative = tiny_models.captions(*lengths), tiny_models.captions(5, 33, seed=1)

    def plain(x: Tensor, sigma: Tensor, captions: Sequence[Tensor]) -> Tensor:
        assert not isinstance(captions, RefinedCaptions)
        return model(x, sigma, captions)

    refined = []
    model.context_refiner[0].register_forward_hook(lambda *_: refined.append(1))
    settings: dict[str, Any] = {"sigmas": flow.sigmas(3), "cfg": 2.5, "negative": negative}
    ours, _ = flow.integrate(model, given, captions, **settings)
    assert len(refined) == 2, "once for each of the two captions, not for each step"
    assert torch.equal(ours, flow.integrate(plain, given, captions, **settings)[0])
    assert len(refined) == 2 + 2 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_cpu_lacks_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision.LACKED, dtype, True)
    layer, x = Linear(24, 40), torch.randn(2, 7, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        under_autocast = layer(x)
    layer, x = layer.to(dtype), x.to(dtype)
    assert layer.bias is not None
    exact = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), exact) and torch.equal(under_autocast, exact)
        monkeypatch.setitem(precision.LACKED, dtype, False)
        assert layer(x).dtype == dtype
    assert layer(x).requires_grad


def test_wrong_captions_are_explained() -> None:
    model = tiny_models.pixel_model()
    pixels, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="2 images came with 1 captions"):
        model(pixels, sigma, tiny_models.captions(4))
    with pytest.raises(ValueError, match="text encoder that belongs to it"):
        model(pixels, sigma, tiny_models.captions(4, 4, width=25))


def test_each_model_refuses_the_other_ones_configuration() -> None:
    with pytest.raises(ValueError, match="convert it"):
        L2PModel(tiny_models.SOURCE)
    with pytest.raises(ValueError, match="pixel model"):
        LatentModel(tiny_models.SOURCE.with_head("1k"))


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_configuration_is_read_off_shapes(variant: str | None) -> None:
    for backbone in (tiny_models.SOURCE, ModelConfig()):
        config = backbone.with_head(variant) if variant else backbone
        assert ModelConfig.from_shapes(key_shapes(config)) == config
        prefixed = {f"model.diffusion_model.{key}": shape for key, shape in key_shapes(config).items()}
        assert ModelConfig.from_shapes(prefixed) == config


def test_real_size_has_the_published_number_of_parameters() -> None:
    """6.166B parameters, a head of 10.1M."""
    shapes = key_shapes(ModelConfig().with_head("1k"))
    counts = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    assert round(sum(counts.values()) / 1e9, 3) == 6.166
    assert round(sum(n for key, n in counts.items() if key.startswith("local_decoder.")) / 1e6, 1) == 10.1
