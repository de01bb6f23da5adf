"""A latent source and its pixel model as two MODELs on one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import golden_vectors as golden
import latent_preview
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_model_merging
from safetensors.torch import load_file, save_file
from torch import Tensor

import nodes
from comfyui_l2p.l2p_core import convert, delta, tiny
from comfyui_l2p.l2p_core.checkpoint import open_checkpoint
from comfyui_l2p.l2p_core.deltas.delta_on_base import open_merged
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions
from comfyui_l2p.nodes.hybrid_checks import HybridSettings, Models, Prompts
from comfyui_l2p.nodes.hybrid_sampling import sample_hybrid
from comfyui_l2p.nodes.model import patcher
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.model.demo_source import load_demo_source
from comfyui_l2p.nodes.model.dual_loading import load_dual
from comfyui_l2p.nodes.model.loading import load_model
from comfyui_l2p.nodes.options import UNTRAINED

CAPTION = evaluation_captions(1)[0]
Faces = tuple[Any, Any]


@pytest.fixture(scope="module")
def faces() -> Faces:
    return load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    _, clip, _ = load_demo_source()
    encode = nodes.CLIPTextEncode().encode
    with torch.inference_mode():
        return Prompts(encode(clip, CAPTION)[0], encode(clip, "")[0])


def ksample(model: Any, prompts: Prompts, latent: Tensor) -> Tensor:
    """What KSampler does, the fix of empty latents included."""
    with torch.inference_mode():
        settings = (1, 3, 2.0, "euler", "simple", prompts.positive, prompts.negative, {"samples": latent})
        return nodes.common_ksampler(model, *settings)[0]["samples"]


def latents() -> Tensor:
    return torch.zeros(1, 4, 8, 8)  # Empty Latent Image's channels


def pixels() -> Tensor:
    return torch.zeros(1, 3, 64, 64)


def lora(model: Any, layer: int) -> Any:
    """The MODEL with a LoRA on one block."""
    torch.manual_seed(0)
    name, dim = f"diffusion_model.layers.{layer}.attention.out", tiny.load_source().config.dim
    file = {f"{name}.lora_up.weight": torch.randn(dim, 2), f"{name}.lora_down.weight": torch.randn(2, dim)}
    return comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)[0]


def check_both_faces_are_their_models(faces: Faces, prompts: Prompts) -> None:
    source, pixel = load_demo_source()[0], load_demo()[0]
    expected = ksample(source, prompts, latents()), ksample(pixel, prompts, pixels())
    for _ in range(2):  # there and back
        assert golden.relative_error(ksample(faces[0], prompts, latents()), expected[0]) < 1e-6
        assert golden.relative_error(ksample(faces[1], prompts, pixels()), expected[1]) < 1e-6


def check_they_hold_the_source_and_the_trained_part(faces: Faces) -> None:
    latent, pixel = faces
    assert latent.model is pixel.model
    source = sum(t.numel() for t in tiny.load_source().state_dict().values()) * 4
    trained = open_merged(tiny.DELTA_PATH, tiny.SOURCE_PATH)
    own = sum(trained.checkpoint.tensors[name].nbytes for name in trained.trained) * 2  # bfloat16 in the file
    assert pixel.model_size() <= 1.05 * (source + own)
    assert 0 < pixel.model.share < 1
    network = pixel.model.diffusion_model
    held = [id(weight) for weight in network.parameters()]
    assert len(held) == len(set(held)) == len(network.state_dict())


def check_nothing_moves_at_a_switch(faces: Faces, prompts: Prompts) -> None:
    latent, pixel = faces
    ksample(latent, prompts, latents())
    places = {name: weight.data_ptr() for name, weight in pixel.model.named_parameters()}
    ksample(pixel, prompts, pixels())
    assert len([held for held in management.current_loaded_models if held.model.model is pixel.model]) == 1
    assert {name: weight.data_ptr() for name, weight in pixel.model.named_parameters()} == places


@pytest.mark.parametrize("layer", [0, 3])
def check_loras_stay_with_their_face(faces: Faces, prompts: Prompts, layer: int) -> None:
    """Block 0 is each face's own, block 3 is shared."""
    latent, pixel = faces
    alone = lora(load_demo_source()[0], layer), lora(load_demo()[0], layer)
    plain = ksample(latent, prompts, latents()), ksample(pixel, prompts, pixels())
    expected = ksample(alone[0], prompts, latents()), ksample(alone[1], prompts, pixels())
    with_lora = lora(latent, layer), lora(pixel, layer)
    assert not torch.equal(expected[0], plain[0]) and not torch.equal(expected[1], plain[1])
    assert golden.relative_error(ksample(with_lora[0], prompts, latents()), expected[0]) < 1e-5
    assert golden.relative_error(ksample(pixel, prompts, pixels()), plain[1]) < 1e-6
    assert golden.relative_error(ksample(with_lora[1], prompts, pixels()), expected[1]) < 1e-5
    assert golden.relative_error(ksample(latent, prompts, latents()), plain[0]) < 1e-6


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_unet_", "lycoris_", ""])
@pytest.mark.parametrize(
    "names",
    [
        ("x_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"),
        ("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
    ],
)
def check_loras_change_the_ends_of_the_latent_face(
    faces: Faces, prompts: Prompts, prefix: str, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Patch embedder and output projection, which the pixel face does not have and skips."""
    source = load_demo_source()[0]
    torch.manual_seed(0)
    file: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for name, own in zip(names, ("x_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"), strict=True):
        rows, columns = source.model.state_dict()[f"diffusion_model.{own}.weight"].shape
        pair = {"lora_up": 0.1 * torch.randn(rows, 2), "lora_down": torch.randn(2, columns)}
        file |= {f"diffusion_model.{own}.{end}.weight": weight for end, weight in pair.items()}
        key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        written |= {f"{key}.{end}.weight": weight for end, weight in pair.items()}
    plain = ksample(faces[0], prompts, latents())
    expected = ksample(comfy.sd.load_lora_for_models(source, None, file, 1.0, 0.0)[0], prompts, latents())
    assert golden.relative_error(expected, plain) > 0.01
    with caplog.at_level("INFO"):
        on_latents = comfy.sd.load_lora_for_models(faces[0], None, written, 1.0, 0.0)[0]
        assert not caplog.records
        on_pixels = comfy.sd.load_lora_for_models(faces[1], None, written, 1.0, 0.0)[0]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "L2P: 0 weights patched; skipped, not being made for this model: final_layer, x_embedder"
    assert golden.relative_error(ksample(on_latents, prompts, latents()), expected) < 1e-5
    assert torch.equal(ksample(on_pixels, prompts, pixels()), ksample(faces[1], prompts, pixels()))


def check_what_does_not_fit_the_latent_face_is_said(faces: Faces, caplog: pytest.LogCaptureFixture) -> None:
    file = {
        "final_layer.linear.lora_up.weight": torch.ones(5, 2),
        "final_layer.linear.lora_down.weight": torch.ones(2, 7),
    }
    with caplog.at_level("INFO"):
        comfy.sd.load_lora_for_models(faces[0], None, file, 1.0, 0.0)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "L2P: 0 weights patched; skipped, not being made for this model: final_layer"


def check_unloading_one_keeps_the_other(faces: Faces, prompts: Prompts) -> None:
    latent, pixel = faces
    expected = ksample(pixel, prompts, pixels())
    again, _ = load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH))
    ksample(again, prompts, latents())
    del again
    management.cleanup_models_gc()
    management.unload_all_models()
    assert golden.relative_error(ksample(pixel, prompts, pixels()), expected) < 1e-6
    assert torch.isfinite(ksample(latent, prompts, latents())).all()


def check_previews_show_either_space(faces: Faces, prompts: Prompts) -> None:
    for model, x in ((faces[0], torch.randn(1, 16, 8, 8)), (faces[1], torch.rand(1, 3, 64, 64))):
        shown = latent_preview.Latent2RGBPreviewer(
            model.model.latent_format.latent_rgb_factors,
            getattr(model.model.latent_format, "latent_rgb_factors_bias", None),
            model.model.latent_format.latent_rgb_factors_reshape,
        ).decode_latent_to_preview(x)
        assert shown.size == tuple(x.shape[:1:-1])


def check_ksampler_previews_either_face(faces: Faces, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: shown.append(preview))
    latent_preview.set_preview_method("latent2rgb")
    try:
        ksample(faces[0], prompts, latents())
        ksample(faces[1], prompts, pixels())
    finally:
        latent_preview.set_preview_method(latent_preview.LatentPreviewMethod.NoPreviews.value)
    assert [preview[1].size for preview in shown] == [(8, 8)] * 3 + [(64, 64)] * 3


def save_both(pair: Faces) -> None:
    nodes_model_merging.ModelSave().save(lora(pair[0], 3), "latents")
    nodes_model_merging.CheckpointSave().save(pair[1], *load_demo_source()[1:], "pixels")


@pytest.mark.parametrize("weight_dtype", ["fp32", "fp8_e4m3fn"])
def check_each_face_is_saved_as_the_model_it_is(
    tmp_path: Path, prompts: Prompts, weight_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the host's ModelSave and CheckpointSave, with the LoRA that is on it."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():  # as nodes run
        pair = load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH), weight_dtype)
        save_both(pair)
    (latent,), (pixel,) = tmp_path.glob("latents*"), tmp_path.glob("pixels*")
    saved, plain = open_checkpoint(latent), load_file(tiny.SOURCE_PATH)
    assert set(saved.tensors) - {name for name in saved.tensors if "comfy_quant" in name or "_scale" in name} == set(
        plain
    )
    if weight_dtype == "fp32":
        weights = {name.removeprefix("model.diffusion_model."): weight for name, weight in load_file(latent).items()}
        changed = [name for name, weight in plain.items() if not torch.equal(weights[name], weight)]
        assert changed == ["layers.3.attention.out.weight"]
    with torch.inference_mode():
        again = load_model(str(pixel), weight_dtype=weight_dtype)
    expected = ksample(pair[1], prompts, pixels())
    assert golden.relative_error(ksample(again, prompts, pixels()), expected) < 1e-5


def check_a_compiled_face(faces: Faces, prompts: Prompts) -> None:
    """The other stays as it was, and so does the face that was compiled from."""
    torch._dynamo.reset()
    expected, of_pixels = ksample(faces[0], prompts, latents()), ksample(faces[1], prompts, pixels())
    compiled = faces[0].clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert golden.relative_error(ksample(compiled, prompts, latents()), expected) < 1e-5
    assert torch.equal(ksample(faces[0], prompts, latents()), expected)
    assert torch.equal(ksample(faces[1], prompts, pixels()), of_pixels)


def check_hybrid_sampler_takes_both_faces(faces: Faces, prompts: Prompts) -> None:
    source, _, vae = load_demo_source()
    settings = HybridSettings(seed=5, steps=4, cfg=2.0, latent_steps=4, latent_cfg=2.0)

    def image(latent: Any, pixel: Any) -> Tensor:
        with torch.inference_mode():
            models = Models(latent, vae, pixel)
            return sample_hybrid("fast", models, prompts, settings, width=0, height=0, tell=lambda text: None)

    assert golden.relative_error(image(*faces), image(source, load_demo()[0])) < 1e-6
    with pytest.raises(ValueError, match="This model works on latents"):
        image(None, faces[0])


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp8_e4m3fn"])
def check_little_memory(prompts: Prompts, weight_dtype: str) -> None:
    with torch.inference_mode():  # as nodes run
        latent, pixel = load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH), weight_dtype)
    of_source, of_pixels = ksample(latent, prompts, latents()), ksample(pixel, prompts, pixels())
    plain = ksample(load_demo()[0], prompts, pixels())
    assert torch.isfinite(of_source).all() and golden.relative_error(of_pixels, plain) < 0.2
    if weight_dtype.startswith("fp8"):
        layers = pixel.model.diffusion_model
        held = [layers.layers[0], layers.source.layers["0"], layers.layers[3]]
        assert all(type(block.attention.out.weight).__name__ == "QuantizedTensor" for block in held)


def check_a_whole_file_shares_what_is_equal(tmp_path: Path, prompts: Prompts) -> None:
    whole = tmp_path / "whole.safetensors"
    delta.merge(tiny.DELTA_PATH, tiny.SOURCE_PATH, whole)
    latent, pixel = load_dual(str(tiny.SOURCE_PATH), str(whole))
    of_delta = load_dual(str(tiny.SOURCE_PATH), str(tiny.DELTA_PATH))[1]
    assert pixel.model.share == pytest.approx(of_delta.model.share)
    assert (
        golden.relative_error(ksample(latent, prompts, latents()), ksample(load_demo_source()[0], prompts, latents()))
        < 1e-6
    )


def check_an_initialisation_is_said_to_be_untrained(
    tmp_path: Path, faces: Faces, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(patcher, "warn_where_running", said.append)
    started = tmp_path / "start.safetensors"
    convert.convert(tiny.SOURCE_PATH, started, variant="1k")
    latent, pixel = load_dual(str(tiny.SOURCE_PATH), str(started))
    for model, x in ((faces[0], latents()), (faces[1], pixels()), (latent, latents())):
        ksample(model, prompts, x)
    assert not said
    ksample(pixel, prompts, pixels())
    assert said == [UNTRAINED]


def check_files_that_do_not_belong_together_are_a_sentence(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    weights = {name: weight + 0.01 for name, weight in tiny.load_source().state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, other)
    whole = tmp_path / "whole.safetensors"
    delta.merge(tiny.DELTA_PATH, tiny.SOURCE_PATH, whole)
    with pytest.raises(ValueError, match="no block in common"):
        load_dual(str(other), str(whole))
    with pytest.raises(ValueError, match="another base .* Choose the base that it was made for"):
        load_dual(str(other), str(tiny.DELTA_PATH))
    with pytest.raises(ValueError, match="choose the latent model"):
        load_dual(str(whole), str(tiny.DELTA_PATH))
    with pytest.raises(ValueError, match="latent"):
        load_dual(str(tiny.SOURCE_PATH), str(tiny.SOURCE_PATH))
