"""An L2P MODEL in the hands of the host's other nodes: LoRA, merging, saving, patches, weight types."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import golden_vectors as golden
import kit
import pytest
import torch
from comfy_extras import nodes_model_merging
from safetensors.torch import load_file
from torch import Tensor

from comfyui_l2p.l2p_core.layouts import to_comfy

X = golden.array("x", (1, 3, 48, 64), 0)


def output(model: Any) -> Tensor:
    return kit.velocity(model, X, 0.7, kit.caption()[0][0])


def with_weights(folder: Path, weights: dict[str, Tensor]) -> Any:
    """A model of these weights, ComfyUI layout."""
    path = folder / f"changed{len(os.listdir(folder))}.safetensors"
    kit.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return kit.load_model(str(path), weight_dtype="fp32")


def low_rank(name: str, shape: tuple[int, ...], rank: int = 2) -> tuple[Tensor, Tensor]:
    up = golden.array(f"{name}.up", (shape[0], rank), 0, 0.1)
    return up, golden.array(f"{name}.down", (rank, *shape[1:]), 0, 0.1)


def check_z_image_lora_applies_to_what_it_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kit.model(tmp_path)
    weights = to_comfy(golden.diffusers_weights())
    dim = weights["x_embedder.weight"].shape[0]
    shapes = {
        "layers.0.attention.to_k": (dim, dim),
        "layers.1.feed_forward.w1": tuple(weights["layers.1.feed_forward.w1.weight"].shape),
        "all_x_embedder.2-1": (dim, 64),
        "all_final_layer.2-1.linear": (64, dim),
    }
    lora: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        up, down = low_rank(name, shape)
        lora |= {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
    with caplog.at_level(logging.INFO):
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0.0)
        result = output(patched)
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert lines == ["L2P: 2 weights patched; skipped, not being made for this model: final_layer, x_embedder"]
    assert not any("ERROR" in record.getMessage() or "NOT LOADED" in record.getMessage() for record in caplog.records)

    up, down = low_rank("layers.0.attention.to_k", (dim, dim))
    weights["layers.0.attention.qkv.weight"][dim : 2 * dim] += 0.8 * up @ down
    up, down = low_rank("layers.1.feed_forward.w1", shapes["layers.1.feed_forward.w1"])
    weights["layers.1.feed_forward.w1.weight"] += 0.8 * up @ down
    assert golden.relative_error(result, output(with_weights(tmp_path, weights))) < 1e-5


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def check_l2p_lora_applies_in_full(tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    weights = to_comfy(golden.diffusers_weights())
    head = ["local_decoder.enc2.0", "local_decoder.out_conv"]
    names = ["x_embedder", "layers.0.attention.qkv", "t_embedder.mlp.0", *head]
    lora: dict[str, torch.Tensor] = {}
    for name in names:
        up, down = low_rank(name, tuple(weights[f"{name}.weight"].shape))
        if down.ndim == 4:
            up = up[..., None, None]
        key = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        lora |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        weights[f"{name}.weight"] += (up.flatten(1) @ down.flatten(1)).reshape(weights[f"{name}.weight"].shape)
    with caplog.at_level(logging.INFO):
        patched, _ = comfy.sd.load_lora_for_models(kit.model(tmp_path), None, lora, 1.0, 0.0)
        result = output(patched)
    assert golden.relative_error(result, output(with_weights(tmp_path, weights))) < 1e-5
    messages = [record.getMessage() for record in caplog.records]
    assert not any("skipped" in message or "not loaded" in message for message in messages)


def check_lora_leaves_the_model_itself_alone(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    before = output(model)
    dim = model.model.l2p.dim
    lora = {"diffusion_model.layers.0.attention.out.lora_up.weight": golden.array("u", (dim, 2), 0)}
    lora["diffusion_model.layers.0.attention.out.lora_down.weight"] = golden.array("d", (2, dim), 0)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert golden.relative_error(output(patched), before) > 1e-3
    assert torch.equal(output(model), before)


def check_merging(tmp_path: Path) -> None:
    first, second = (kit.load_model(kit.write(tmp_path, seed=seed), weight_dtype="fp32") for seed in (1, 2))
    (merged,) = nodes_model_merging.ModelMergeSimple().merge(first, second, 0.25)
    one, two = (to_comfy(golden.diffusers_weights(seed=seed)) for seed in (1, 2))
    average = {key: 0.25 * one[key] + 0.75 * two[key] for key in one}
    # The host patches weights of leaf modules only; the pad tokens, as in Z-Image, stay the first model's.
    average |= {key: one[key] for key in ("x_pad_token", "cap_pad_token")}
    expected = with_weights(tmp_path, average)
    assert golden.relative_error(output(merged), output(expected)) < 1e-5


@pytest.mark.parametrize("weight_dtype", ["fp32", "fp8_e4m3fn"])
def check_model_save_and_loading_back(tmp_path: Path, weight_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model = kit.load_model(kit.write(tmp_path), weight_dtype=weight_dtype)
    nodes_model_merging.ModelSave().save(model, "saved")
    (saved,) = tmp_path.glob("saved*.safetensors")
    assert all(key.startswith("model.diffusion_model.") for key in load_file(saved))
    assert golden.relative_error(output(kit.load_model(str(saved))), output(model)) < 1e-6


def check_fp8_concerns_only_the_blocks_linears(tmp_path: Path) -> None:
    whole, small = kit.model(tmp_path), kit.model(tmp_path, weight_dtype="fp8_e4m3fn")
    state = small.model.diffusion_model.state_dict()
    quantised = {key.removesuffix(".comfy_quant") for key in state if key.endswith(".comfy_quant")}
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    assert quantised and all(layer.startswith(blocks) for layer in quantised)
    linears = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    depth = len(whole.model.diffusion_model.layers) + 2 * len(whole.model.diffusion_model.noise_refiner)
    assert len(quantised) == depth * len(linears) and all(layer.endswith(linears) for layer in quantised)
    head = whole.model.diffusion_model.local_decoder.state_dict()
    for key, value in small.model.diffusion_model.local_decoder.state_dict().items():
        assert torch.equal(value, head[key])
    assert 0 < golden.relative_error(output(small), output(whole)) < 0.05


@pytest.mark.parametrize("raw", [False, True])
def check_the_hosts_own_fp8_leaves_the_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    """The flag --fp8_e4m3fn-unet, with a whole file and with one whose weights were cast to 8 bits without scales."""
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    weights = to_comfy(golden.diffusers_weights())
    stored = {
        key: value.to(torch.float8_e4m3fn) if raw and key.startswith("layers.") and value.ndim == 2 else value
        for key, value in weights.items()
    }
    kit.save_file(stored, tmp_path / "file.safetensors")
    model = kit.load_model(str(tmp_path / "file.safetensors"))
    state = model.model.diffusion_model.state_dict()
    assert state["layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn
    for key in [key for key in weights if key.startswith(("local_decoder.", "x_embedder."))]:
        # bfloat16 at the worst; 8 bits would be off by 0.03.
        assert golden.relative_error(state[key].float(), weights[key]) < 0.003, key
    assert 0 < golden.relative_error(output(model), output(kit.model(tmp_path))) < 0.1


@pytest.mark.parametrize("weight_dtype", ["bf16", "default"])
def check_weight_types(tmp_path: Path, weight_dtype: str) -> None:
    model = kit.model(tmp_path, weight_dtype=weight_dtype)
    tolerance = 0.05 if weight_dtype == "bf16" else 1e-5
    assert golden.relative_error(output(model), output(kit.model(tmp_path))) < tolerance


def check_mixed_precision_files_load(tmp_path: Path) -> None:
    weights = to_comfy(golden.diffusers_weights())
    mixed = {key: value if key.startswith("layers.1.") else value.bfloat16() for key, value in weights.items()}
    rounded = {key: value.float() for key, value in mixed.items()}
    assert golden.relative_error(output(with_weights(tmp_path, mixed)), output(with_weights(tmp_path, rounded))) < 1e-5


def check_patches_see_a_latent_and_change_the_image(tmp_path: Path) -> None:
    model = kit.model(tmp_path, "dit_64").clone()
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        seen.append((args.get("block_type", "double"), tuple(args["x"].shape), tuple(args["img"].shape)))
        return {"img": args["img"] * 1.1}

    plain = kit.ksample(model, kit.latent(192, 128), steps=1, cfg=1.0)
    model.set_model_double_block_patch(patch)
    model.set_model_noise_refiner_patch(patch)
    changed = kit.ksample(model, kit.latent(192, 128), steps=1, cfg=1.0)
    network = model.model.diffusion_model
    kinds = [kind for kind, *_ in seen]
    assert kinds.count("noise_refiner") == len(network.noise_refiner) and kinds.count("double") == len(network.layers)
    # 192x128 pixels in patches of 64 are 3x2 tokens, as a latent of 6x4 cells in patches of 2 would be.
    assert {shape for _, shape, _ in seen} == {(1, 16, 4, 6)}
    assert golden.relative_error(changed, plain) > 1e-4


def check_the_host_can_load_the_model_anew(tmp_path: Path) -> None:
    model = kit.model(tmp_path)
    load, arguments = model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    assert torch.equal(output(again), output(model))


def check_previews_are_small_and_not_enlarged(tmp_path: Path) -> None:
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod
    from PIL import Image

    from comfyui_l2p.nodes.model.demo_source import load_demo_source
    from comfyui_l2p.nodes.previews import LARGEST, Previews

    model = kit.model(tmp_path)
    latent_preview.set_preview_method("latent2rgb")
    try:
        previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
        previews, of_source = Previews(model), Previews(load_demo_source()[0])
    finally:
        latent_preview.set_preview_method(LatentPreviewMethod.NoPreviews.value)
    for side, limit in {64: 64, 1024: 512}.items():
        preview = previews.of_samples(torch.zeros(1, 3, side, 16))
        assert preview is not None and preview[2] == limit
    latent = of_source.of_samples(torch.zeros(1, 16, 8, 12))
    assert latent is not None and latent[2] == 96, "as large as the image that it becomes"
    for side, limit in {64: 64, LARGEST: LARGEST, LARGEST + 1: latent_preview.MAX_PREVIEW_RESOLUTION}.items():
        preview = previews.of_image(Image.new("L", (side, 16)))
        assert preview is not None and preview[2] == limit
    assert Previews(model).of_image(Image.new("L", (1, 1))) is None, "its user has switched previews off"
    pixels = torch.full((2, 3, 2048, 1024), 0.5)
    pixels[:, 0] = -1.0
    image = previewer.decode_latent_to_preview(pixels)
    assert image.size == (256, 512)
    assert image.getpixel((100, 100)) == (0, 191, 191)


def check_a_timestep_embedding_that_the_hosts_blocks_cannot_take_is_named(tmp_path: Path) -> None:
    weights = load_file(kit.write(tmp_path))
    kept = len(weights["t_embedder.mlp.2.bias"]) // 2
    for name, tensor in weights.items():
        if name.startswith("t_embedder.mlp.2."):
            weights[name] = tensor[:kept].clone()
        elif name.endswith("adaLN_modulation.0.weight"):
            weights[name] = tensor[:, :kept].contiguous()
    kit.save_file(weights, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=f"timestep embedding has {kept} values, but in ComfyUI, blocks of"):
        kit.load_model(str(tmp_path / "narrow.safetensors"))
