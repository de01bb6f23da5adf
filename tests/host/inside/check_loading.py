"""What L2P Loader says to files that are not what it wants."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import golden_vectors as golden
import kit
import pytest
import torch
from safetensors.torch import save_file

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.deltas import delta_on_base as merged
from comfyui_l2p.l2p_core.deltas import unchanged_tensors as kept
from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.nodes.messages.jobs import convert_file, extract_delta, merge_delta
from comfyui_l2p.nodes.model.loading import load_model, parse_head_tile


def write(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    path = folder / "file.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return str(path)


def latent_source() -> dict[str, torch.Tensor]:
    weights = to_comfy(golden.diffusers_weights())
    dim = weights["x_embedder.weight"].shape[0]
    weights = {key: value for key, value in weights.items() if not key.startswith("local_decoder.")}
    return weights | {"x_embedder.weight": torch.zeros(dim, 64), "final_layer.linear.weight": torch.zeros(64, dim)}


def check_a_latent_file_says_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latent Z-Image model.*Convert to L2P"):
        load_model(write(tmp_path, latent_source()))


def check_a_missing_weight_is_an_error_and_not_noise(tmp_path: Path) -> None:
    weights = to_comfy(golden.diffusers_weights())
    del weights["local_decoder.out_conv.bias"]
    with pytest.raises(ValueError, match="incomplete.*local_decoder.out_conv.bias"):
        load_model(write(tmp_path, weights))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"conditioner.embedders.0.weight": torch.zeros(2)}, "SDXL"),
        ({"lora_unet_layers_0.lora_up.weight": torch.zeros(2, 2)}, "LoRA"),
        ({"anything": torch.zeros(2)}, "not a Z-Image, Lumina-2 or L2P model"),
    ],
)
def check_other_models_are_called_by_name(tmp_path: Path, weights: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_model(write(tmp_path, weights))


def check_sentences_name_files_as_the_host_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda folder: [str(tmp_path / "models")])
    (tmp_path / "models" / "deep").mkdir(parents=True)
    path = write(tmp_path / "models" / "deep", {"conditioner.embedders.0.weight": torch.zeros(2)})
    target = tmp_path / "models" / "new.safetensors"
    for work in (
        lambda: load_model(path),
        lambda: convert_file(path, target, "1k", 0, False),
        lambda: extract_delta(path, path, target, False),
        lambda: merge_delta(path, path, target, False),
    ):
        with pytest.raises(ValueError, match="^deep.file.safetensors ") as caught:
            work()
        assert str(tmp_path) not in str(caught.value)


def check_damaged_files(tmp_path: Path) -> None:
    path = Path(kit.write(tmp_path))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a model", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            load_model(str(path))


def check_all_in_one_files_and_prefixes(tmp_path: Path) -> None:
    weights = {f"model.diffusion_model.{key}": value for key, value in golden.diffusers_weights().items()}
    weights["vae.decoder.conv_in.weight"] = torch.zeros(2, 2)
    x, features = golden.array("x", (1, 3, 48, 64), 0), kit.caption()[0][0]
    result = kit.velocity(load_model(write(tmp_path, weights), weight_dtype="fp32"), x, 0.5, features)
    assert torch.equal(result, kit.velocity(kit.model(tmp_path), x, 0.5, features))


def check_head_tile_words_and_numbers(tmp_path: Path) -> None:
    assert [parse_head_tile(text) for text in ("auto", "whole", "64", "1024")] == [None, 0, 64, 1024]
    for text in ("", "63", "-1", "large", "1.5"):
        with pytest.raises(ValueError, match="choose auto, whole, or"):
            parse_head_tile(text)


@pytest.mark.parametrize("name", ["dit_16", "dit_64"])
def check_head_tiles_do_not_change_the_image(tmp_path: Path, name: str) -> None:
    size = (256, 192)
    x, features = golden.array("x", (1, 3, *size), 0), kit.caption()[0][0]
    whole, tiled = (
        kit.velocity(kit.model(tmp_path, name, head_tile=tile), x, 0.5, features) for tile in ("whole", "80")
    )
    assert golden.relative_error(tiled, whole) < 1e-5


def check_a_base_is_hashed_once_and_again_when_it_changes(
    tmp_path: Path, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = kit.write(tmp_path, seed=3)
    weights = to_comfy(golden.diffusers_weights(seed=3))
    head = {key: value + 1 for key, value in weights.items() if key.startswith(("local_decoder.", "x_embedder."))}
    change = tmp_path / "delta.safetensors"
    delta.save(head, base, change)
    os.utime(base, (1e9, 1e9))
    kept._digest_of.cache_clear()
    load_model(base, str(change))
    assert (user_folder / "__l2p" / "verified.json").is_file()

    kept._digest_of.cache_clear()
    monkeypatch.setattr(merged, "digest_of", lambda stored: pytest.fail("hashed again"))
    x, features = golden.array("x", (1, 3, 48, 64), 0), kit.caption()[0][0]
    result = kit.velocity(load_model(base, str(change), weight_dtype="fp32"), x, 0.5, features)
    save_file(weights | head, tmp_path / "whole.safetensors")
    whole = load_model(str(tmp_path / "whole.safetensors"), weight_dtype="fp32")
    assert torch.equal(result, kit.velocity(whole, x, 0.5, features))

    monkeypatch.undo()
    save_file(to_comfy(golden.diffusers_weights(seed=4)), base)
    with pytest.raises(ValueError, match="was made for another base"):
        load_model(base, str(change))
