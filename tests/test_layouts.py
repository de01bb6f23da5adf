"""Key layouts: names both ways, nothing lost, and the published key sets."""

from __future__ import annotations

import golden_vectors as golden
import pytest
import torch
from tiny_checkpoints import SOURCE, pixel_config, prefixed, same, weights

from comfyui_l2p.l2p_core.config import VARIANTS, ModelConfig
from comfyui_l2p.l2p_core.layouts import comfy_sources, to_comfy, to_diffusers
from comfyui_l2p.l2p_core.model import key_shapes


@pytest.mark.parametrize("config", [SOURCE, *map(pixel_config, VARIANTS)], ids=["source", *VARIANTS])
def test_round_trip_is_lossless(config: ModelConfig) -> None:
    state = weights(config)
    diffusers = to_diffusers(state)
    assert same(to_comfy(diffusers), state)
    assert same(to_diffusers(to_comfy(diffusers)), diffusers)


def test_both_layouts_are_fixed_points_and_the_prefix_is_taken_off() -> None:
    state = weights()
    assert same(to_comfy(state), state)
    assert same(to_comfy(prefixed(state)), state)
    assert same(to_diffusers(to_diffusers(state)), to_diffusers(state))


def test_source_names_are_the_published_ones() -> None:
    names = set(to_diffusers(weights()))
    assert {"all_x_embedder.2-1.weight", "all_final_layer.2-1.linear.bias"} <= names
    block = {name.removeprefix("layers.2.") for name in names if name.startswith("layers.2.")}
    assert block == {
        *(f"attention.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
        *(f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
        *(f"{name}.weight" for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")),
        "adaLN_modulation.0.weight",
        "adaLN_modulation.0.bias",
    }


@pytest.mark.parametrize("name", ["dit_16", "dit_64", "dit_128", "dit_160"])
def test_keys_of_the_published_model_code(name: str) -> None:
    published = golden.diffusers_weights(name)
    config = ModelConfig.from_shapes({key: tuple(tensor.shape) for key, tensor in published.items()})
    comfy = to_comfy(published)
    assert {key: tuple(tensor.shape) for key, tensor in comfy.items()} == key_shapes(config)
    assert same(to_diffusers(comfy), published)


def test_qkv_is_stacked_in_that_order() -> None:
    parts = {f"layers.0.attention.to_{part}.weight": torch.full((2, 2), i) for i, part in enumerate("qkv")}
    stacked = to_comfy(dict(reversed(parts.items())))["layers.0.attention.qkv.weight"]
    assert stacked[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_plan_covers_every_input_once() -> None:
    keys = list(to_diffusers(weights(pixel_config())))
    plan = comfy_sources(keys)
    assert sorted(key for sources in plan.values() for key in sources) == sorted(keys)


@pytest.mark.parametrize(
    "keys",
    [
        ["layers.0.attention.to_q.weight", "layers.0.attention.to_k.weight"],
        [*(f"layers.0.attention.to_{part}.weight" for part in "qkv"), "layers.0.attention.qkv.weight"],
        ["layers.0.attention.qkv.weight", *(f"layers.0.attention.to_{part}.weight" for part in "qkv")],
        ["x_embedder.weight", "all_x_embedder.2-1.weight"],
        ["all_x_embedder.2-1.weight", "all_x_embedder.16-1.weight"],
    ],
)
def test_a_mixture_of_layouts_is_refused(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="two key layouts|to_v.weight' is missing|' twice"):
        comfy_sources(keys)
