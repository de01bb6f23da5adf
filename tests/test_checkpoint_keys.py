"""No key of a checkpoint is passed over: each is a weight, a scale of one, or on a list of what may be there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_files as quantised
import torch
from tiny_checkpoints import SOURCE, load_any, prefixed, same, weights, write, write_shards
from torch import Tensor

from comfyui_l2p.l2p_core import delta
from comfyui_l2p.l2p_core.checkpoint import CheckpointError, check_exact, open_checkpoint
from comfyui_l2p.l2p_core.config import COMFY_PREFIX
from comfyui_l2p.l2p_core.convert import convert
from comfyui_l2p.l2p_core.deltas.delta_on_base import open_merged
from comfyui_l2p.l2p_core.files import metadata, recognise
from comfyui_l2p.l2p_core.layouts import to_diffusers
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.l2p_core.training import state as training_state
from comfyui_l2p.l2p_core.training_config import TrainingConfig
from comfyui_l2p.train.cli import main

State = dict[str, Tensor]

SMALL = dataclasses.replace(SOURCE, n_layers=1)
LATENT = weights(SMALL)
PIXELS = weights(SMALL.with_head("1k", 0.125))


def _float8(state: State) -> State:
    return {key: tensor.to(torch.float8_e4m3fn) if ".attention.qkv" in key else tensor for key, tensor in state.items()}


PLAIN: dict[str, State] = {
    "latent": LATENT,
    "latent, diffusers": to_diffusers(LATENT),
    "pixel": PIXELS,
    "pixel, diffusers": to_diffusers(PIXELS),
    "prefixed": prefixed(PIXELS),
    "all in one": {**prefixed(LATENT), "vae.decoder.conv_in.weight": torch.zeros(2)},
}
QUANTISED: dict[str, tuple[State, str]] = {
    "float8": (_float8(PIXELS), "float8_e4m3fn without scales"),
    "scaled_fp8": (quantised.scaled_fp8(PIXELS), "float8_e4m3fn"),
    "scaled_fp8, prefixed": (prefixed(quantised.scaled_fp8(PIXELS)), "float8_e4m3fn"),
    "unmarked": (quantised.unmarked_fp8(PIXELS), "float8_e4m3fn"),
    "float8_e5m2": (quantised.fp8(PIXELS, torch.float8_e5m2), "float8_e5m2"),
    "int8": (quantised.int8(PIXELS), "int8_tensorwise"),
    "nvfp4": (quantised.nvfp4(LATENT), "nvfp4"),
    "w4a8": (quantised.w4a8(PIXELS), "asym_w4a8_int8"),
}

MAY_GO = ("scaled_fp8", ".scale_input", ".input_scale", ".pre_quant_scale")
"""Keys without which a file still says all that its weights mean; float8 layers also do without their marker."""


def opened(path: Path) -> str | None:
    """What both loaders ask of a file before they read it; its format if it is quantised."""
    checkpoint = open_checkpoint(path)
    check_exact(checkpoint, key_shapes(checkpoint.config()))
    return checkpoint.quantisation


def mutations(state: State, key: str) -> dict[str, State]:
    """The state without a key, with the key under other names, and with more of it."""
    rest = {name: tensor for name, tensor in state.items() if name != key}
    return {
        "removed": rest,
        "renamed": {**rest, f"{key}_": state[key]},
        "moved": {**rest, f"other.{key}": state[key]},
        "doubled": {**state, f"{key}_": state[key].clone()},
    }


def one_of_each_sort(state: State) -> list[str]:
    """Keys of every part of the model and of everything that a layer has: layers are alike."""
    return list(
        {(key.removeprefix(COMFY_PREFIX).partition(".")[0], key.rpartition(".")[2]): key for key in state}.values()
    )


@pytest.mark.parametrize("kind", PLAIN)
def test_a_key_more_or_less_in_a_plain_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    load_any(write(PLAIN[kind], path))
    # What all-in-one files hold beside the model is not read, whatever its name.
    keys = list(PLAIN[kind]) if kind == "pixel" else one_of_each_sort(PLAIN[kind])
    for key in [key for key in keys if not key.startswith("vae.")]:
        for how, state in mutations(PLAIN[kind], key).items():
            with pytest.raises(CheckpointError):
                load_any(write(state, path))
                pytest.fail(f"{key} {how} loads")


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_key_more_or_less_in_a_quantised_file(kind: str, tmp_path: Path) -> None:
    path, (whole, name) = tmp_path / "model.safetensors", QUANTISED[kind]
    assert opened(write(whole, path)) == name
    for key in one_of_each_sort(whole):
        for how, state in mutations(whole, key).items():
            may_go = (*MAY_GO, ".comfy_quant") if "float8" in name else MAY_GO
            if how == "removed" and key.endswith(may_go):
                assert opened(write(state, path)) == name
            else:
                with pytest.raises(CheckpointError):
                    opened(write(state, path))
                    pytest.fail(f"{key} {how} loads")


def test_a_key_more_or_less_in_a_shard(tmp_path: Path) -> None:
    folder = write_shards(LATENT, tmp_path / "model")
    first = min(folder.glob("*.safetensors"))
    whole = dict(list(to_diffusers(LATENT).items())[0::3])
    load_any(folder)
    for key in one_of_each_sort(whole):
        for state in mutations(whole, key).values():
            write(state, first)
            with pytest.raises(CheckpointError):
                load_any(folder)


def test_a_key_more_or_less_in_a_delta_and_its_base(tmp_path: Path) -> None:
    base, change = write(LATENT, tmp_path / "base.safetensors"), tmp_path / "delta.safetensors"
    delta.save({key: PIXELS[key] for key in PIXELS if key not in LATENT or "x_embedder" in key}, base, change)
    open_merged(change, base)
    opened_delta = open_checkpoint(change)
    trained = {key: PIXELS[key] for key in opened_delta.tensors}
    for key in one_of_each_sort(trained):
        for state in mutations(trained, key).values():
            with pytest.raises(CheckpointError):
                open_merged(write(state, tmp_path / "changed.safetensors", opened_delta.metadata), base)
    for key in one_of_each_sort(LATENT):
        for state in mutations(LATENT, key).values():
            with pytest.raises(CheckpointError):
                open_merged(change, write(state, tmp_path / "changed.safetensors"))


def test_a_key_more_or_less_in_a_training_state(tmp_path: Path) -> None:
    state, config = {"model.a": torch.ones(2), "exp_avg.a": torch.zeros(2)}, TrainingConfig(steps=1)
    path = tmp_path / "state.safetensors"
    training_state.save(path, state, step=1, config=config)
    assert training_state.load(path, state, config=config) == 1
    for key in state:
        for changed in mutations(state, key).values():
            training_state.save(path, changed, step=1, config=config)
            with pytest.raises(CheckpointError):
                training_state.load(path, state, config=config)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("norm_final.weight", torch.float32), ("layers.0.attention.comfy_attention.config", torch.uint8)],
)
def test_what_may_be_there_is_on_a_list(key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert recognise.is_unused(key)
    path = write({**LATENT, key: torch.zeros(64, dtype=dtype)}, tmp_path / "model.safetensors")
    assert open_checkpoint(path).quantisation is None
    assert same(load_any(path).state_dict(), LATENT)
    assert key in convert(path, tmp_path / "pixels.safetensors", head_width=0.125).keys("dropped")


def test_markers_may_be_in_the_header(tmp_path: Path) -> None:
    """By either layout's names, with the prefix or without."""
    for prefix in ("", "model.diffusion_model."):
        state, about = quantised.metadata_of(quantised.int8(PIXELS), prefix)
        about = {name: text.replace("attention.out", "attention.to_out.0") for name, text in about.items()}
        assert opened(write(state, tmp_path / "model.safetensors", about)) == "int8_tensorwise"
    del state["layers.0.attention.out.weight_scale"]
    with pytest.raises(CheckpointError, match=r"is incomplete: 'layers.0.attention.out.weight_scale' is missing"):
        opened(write(state, tmp_path / "model.safetensors", about))


def _with(**changed: Tensor) -> State:
    layer = "layers.0.feed_forward.w1"
    return {**quantised.fp8(PIXELS), **{f"{layer}.{leaf}": tensor for leaf, tensor in changed.items()}}


def _parts_in_old_spelling() -> State:
    state: State = {**to_diffusers(PIXELS), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for part in ("to_q", "to_k", "to_v"):
        layer = f"layers.0.attention.{part}"
        state[f"{layer}.weight"], state[f"{layer}.scale_weight"] = quantised.float8(state[f"{layer}.weight"])
    return state


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (_with(comfy_quant=quantised.marker(format="fp3")), "quantised as 'fp3', an unknown format"),
        (_with(comfy_quant=quantised.marker(kind="fp8")), "does not say how its layer is quantised"),
        (_with(comfy_quant=torch.zeros(9, dtype=torch.uint8)), "does not say how its layer is quantised"),
        (_with(weight_scale=torch.ones(80)), "has 80 elements, not 1"),
        (_with(weight=torch.zeros(80, 64, dtype=torch.int8)), "is I8 of the shape"),
        (_with(weight=torch.zeros(80, 32).to(torch.float8_e4m3fn)), r"shape \(80, 32\)"),
        (_with(weight_zeros=torch.ones(())), "does not belong to float8_e4m3fn weights"),
        (_with(scale_weight=torch.ones(())), "does not belong"),
        (_with(weight_scale_inv=torch.ones(())), "does not belong to a layer"),
        ({**PIXELS, "local_decoder.enc1.0.weight": PIXELS["local_decoder.enc1.0.weight"].char()}, "has no scale"),
        (
            {**PIXELS, "local_decoder.enc1.0.comfy_quant": quantised.marker(format="int8_tensorwise")},
            "has no such linear layer",
        ),
        (
            {**to_diffusers(PIXELS), "layers.0.attention.to_q.comfy_quant": quantised.marker(format="nvfp4")},
            "q, k and v of its attention quantised separately",
        ),
        (_parts_in_old_spelling(), "q, k and v of its attention quantised separately"),
    ],
)
def test_scales_that_make_no_sense(state: State, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        opened(write(state, tmp_path / "model.safetensors"))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "omni": ({**LATENT, "siglip_embedder.1.weight": torch.zeros(2)}, "a Z-Image Omni or Edit model"),
    "controlnet": ({"control_layers.0.attention_norm1.weight": torch.zeros(2)}, "a ControlNet for Z-Image"),
    "zeta": ({**LATENT, "dec_net.cond_embed.weight": torch.zeros(2)}, "another kind of pixel-space Z-Image"),
    "nunchaku": ({**LATENT, "layers.0.attention.to_qkv.smooth_factor": torch.zeros(2)}, "a nunchaku file"),
    "bitsandbytes": ({**LATENT, "layers.0.x.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}, "bitsandbytes"),
    "lora": ({"diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.zeros(2)}, "a LoRA"),
    "training state": ({f"parameter.{key}": tensor for key, tensor in PIXELS.items()}, "state of a training run"),
    "prefix": ({f"transformer.{key}": tensor for key, tensor in LATENT.items()}, "the unknown prefix 'transformer.'"),
    "prefix, diffusers": (
        {f"net.model.{key}": tensor for key, tensor in to_diffusers(LATENT).items()},
        "the unknown prefix 'net.model.'",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_relatives_are_called_by_name(kind: str, tmp_path: Path) -> None:
    path = write(OTHERS[kind][0], tmp_path / "model.safetensors")
    for reads in (load_any, lambda path: convert(path, tmp_path / "pixels.safetensors")):
        with pytest.raises(CheckpointError, match=OTHERS[kind][1]):
            reads(path)


def test_a_nunchaku_file_is_told_by_its_header_too(tmp_path: Path) -> None:
    about = {"model_class": "NunchakuZImageTransformer2DModel"}
    with pytest.raises(CheckpointError, match="a nunchaku file"):
        load_any(write(LATENT, tmp_path / "model.safetensors", about))


@pytest.mark.parametrize("kind", QUANTISED)
def test_inspect_and_convert_name_the_format(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, name = QUANTISED[kind]
    path = write(state, tmp_path / "model.safetensors")
    assert main(["inspect", str(path)]) == 0
    assert f"quantised   {name}:" in capsys.readouterr().out
    assert main(["inspect", "--json", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = open_checkpoint(path).config()
    assert facts["quantised"] == name
    assert facts["parameters"] == sum(torch.Size(shape).numel() for shape in key_shapes(config).values())
    assert main(["convert", str(path), str(tmp_path / "pixels.safetensors")]) == 2
    assert f"is quantised ({name})" in capsys.readouterr().err


def test_stated_sizes_are_believed_where_the_shapes_agree(tmp_path: Path) -> None:
    """Blocks of 16 hide a width of 72 in nvfp4; the header knows it."""
    narrow = dataclasses.replace(SMALL, ffn_dim=72)
    path = tmp_path / "model.safetensors"
    state = quantised.nvfp4(weights(narrow))
    assert open_checkpoint(write(state, path)).config().ffn_dim == 80
    assert open_checkpoint(write(state, path, {metadata.CONFIG: narrow.to_json()})).config() == narrow
    for wrong in (
        dataclasses.replace(narrow, ffn_dim=48).to_json(),
        dataclasses.replace(narrow, n_layers=1000).to_json(),
        narrow.with_head("1k").to_json(),
        narrow.to_json().replace("72", "7.2"),
        narrow.to_json().replace("72", "-72"),
        narrow.to_json().replace('"dim"', '"width"'),
        "[]",
        "",
    ):
        assert open_checkpoint(write(state, path, {metadata.CONFIG: wrong})).config().ffn_dim == 80
        assert open_checkpoint(write(LATENT, path, {metadata.CONFIG: wrong})).config() == SMALL


def test_inspect_tells_what_a_delta_says_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, change = write(LATENT, tmp_path / "base.safetensors"), tmp_path / "delta.safetensors"
    delta.save({key: PIXELS[key] for key in PIXELS if key not in LATENT or "x_embedder" in key}, base, change)
    assert main(["inspect", str(change)]) == 0
    assert "1k delta" in (text := capsys.readouterr().out) and "width 64, 1 blocks" in text
    shown = open_checkpoint(change)
    other = {**shown.metadata, metadata.CONFIG: dataclasses.replace(SMALL, dim=32).with_head("1k").to_json()}
    write({key: PIXELS[key] for key in shown.tensors}, change, other)
    assert main(["inspect", str(change)]) == 0
    assert "backbone" not in capsys.readouterr().out


LINKS: list[Callable[[Path], Path]] = [
    lambda snapshot: snapshot,
    lambda snapshot: snapshot / "transformer",
    lambda snapshot: snapshot / "transformer" / "model.safetensors.index.json",
]


@pytest.mark.parametrize("chosen", LINKS)
def test_a_hubs_snapshot_is_read_through_its_links(chosen: Callable[[Path], Path], tmp_path: Path) -> None:
    """models--x/snapshots/<commit>/transformer/*, each a link into ../../../blobs."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "transformer"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(write_shards(LATENT, tmp_path / "real", stem="model").iterdir())):
        file.rename(blobs / f"{number:040x}")
        try:
            (folder / file.name).symlink_to(Path("../../../blobs") / f"{number:040x}")
        except OSError:
            pytest.skip("this system makes no links for everyone")
    path = chosen(folder.parent)
    assert same(load_any(path).state_dict(), LATENT)
    (blobs / f"{0:040x}").unlink()
    with pytest.raises(CheckpointError, match="is missing beside"):
        load_any(path)
    (blobs / f"{3:040x}").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_any(path)


@pytest.mark.parametrize("size", ["123.0", "1e10", "null", '"12 GB"'])
def test_an_index_may_state_any_size(size: str, tmp_path: Path) -> None:
    folder = write_shards(LATENT, tmp_path / "model")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text(encoding="utf-8").replace('"total_size": 1', f'"total_size": {size}')
    assert size in text
    index.write_text(text, encoding="utf-8-sig")
    assert same(load_any(folder).state_dict(), LATENT)
