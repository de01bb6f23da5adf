"""The exact trainable set."""

from __future__ import annotations

import math

import pytest
import tiny_models

from comfyui_l2p.l2p_core.config import ModelConfig
from comfyui_l2p.l2p_core.freeze import freeze_all_but, is_new, trainable_names
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.l2p_core.sources import SOURCES


def blocks_of(names: set[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in names if name.startswith("layers.")}


def test_shallow_is_everything_but_the_middle_blocks() -> None:
    config = ModelConfig().with_head("1k")
    names, every = trainable_names(config), set(key_shapes(config))
    assert blocks_of(names) == {0, 1, 2, 3, 4, 25, 26, 27, 28, 29}
    assert {name for name in every - names if not name.startswith("layers.")} == set()
    assert {name.split(".")[0] for name in names} == {
        "x_embedder",
        "t_embedder",
        "cap_embedder",
        "x_pad_token",
        "cap_pad_token",
        "noise_refiner",
        "context_refiner",
        "layers",
        "local_decoder",
    }


def test_trained_share_of_the_real_model_is_the_published_one() -> None:
    """2.548B of 6.166B parameters."""
    config = ModelConfig().with_head("1k")
    shapes = key_shapes(config)
    trained = sum(math.prod(shapes[name]) for name in trainable_names(config))
    assert round(trained / 1e9, 3) == 2.548


@pytest.mark.parametrize(("blocks", "expected"), [(0, set()), (1, {0, 3}), (2, {0, 1, 2, 3}), (9, {0, 1, 2, 3})])
def test_blocks_at_each_end(blocks: int, expected: set[int]) -> None:
    assert blocks_of(trainable_names(tiny_models.SOURCE.with_head("1k"), blocks)) == expected


def test_policy_all_is_all() -> None:
    config = tiny_models.SOURCE.with_head("4k")
    assert trainable_names(config, policy="all") == set(key_shapes(config))


def test_new_parts_are_those_the_source_lacks() -> None:
    pixel, source = key_shapes(tiny_models.SOURCE.with_head("1k")), key_shapes(tiny_models.SOURCE)
    without_counterpart = {name for name, shape in pixel.items() if source.get(name) != shape}
    assert {name for name in pixel if is_new(name, SOURCES["z-image"])} == without_counterpart | {"x_embedder.bias"}


def test_frozen_layers_get_no_gradient() -> None:
    model = tiny_models.pixel_model()
    names = trainable_names(model.config, blocks=1)
    freeze_all_but(model, names)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


def test_mistakes_are_explained() -> None:
    config = tiny_models.SOURCE.with_head("1k")
    with pytest.raises(ValueError, match="shallow, all"):
        trainable_names(config, policy="deep")
    with pytest.raises(ValueError, match="0 or more"):
        trainable_names(config, blocks=-1)
