"""Lumina-2 in the host: the two networks agree, and both our loader and the host's own load its pixel models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.lumina2
import golden_vectors as golden
import kit
import lumina2_vectors as vectors
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import load_model
from comfyui_l2p.l2p_core.config import COMFY_PREFIX, ModelConfig
from comfyui_l2p.l2p_core.layouts import to_comfy, to_diffusers
from comfyui_l2p.l2p_core.model import key_shapes
from comfyui_l2p.nodes.model import stock
from comfyui_l2p.nodes.model.host import L2PBaseModel
from comfyui_l2p.nodes.model.network import SizedNextDiT

PARITY = 1e-5
MODELS = comfy.supported_models.models


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    """Ours in the host's list, as the pack puts it there when the host loads it."""
    before = list(MODELS)
    stock.register()
    yield
    MODELS[:] = before


def pixel_weights() -> dict[str, Tensor]:
    """A small pixel model in ComfyUI layout."""
    config = ModelConfig.from_shapes(vectors.stored()[0]).with_head("1k", 0.125)
    return {key: golden.weight(key, shape, vectors.SEED) for key, shape in key_shapes(config).items()}


def write(folder: Path, prefix: str = "", layout: str = "comfy") -> str:
    weights = to_diffusers(pixel_weights()) if layout == "diffusers" else pixel_weights()
    path = folder / f"lumina2-{prefix}{layout}.safetensors"
    save_file({prefix + key: tensor.contiguous() for key, tensor in weights.items()}, path)
    return str(path)


def features(tokens: int = 9) -> Tensor:
    return golden.array("caption", (1, tokens, vectors.SIZES["cap_feat_dim"]), 0)


def check_the_hosts_network_is_that_of_diffusers_on_latents() -> None:
    shapes, expected = vectors.stored()
    network = SizedNextDiT(
        ModelConfig.from_shapes(shapes), dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    network.load_state_dict(to_comfy(vectors.weights(shapes)))
    for i, caption in enumerate(vectors.captions()):
        with torch.no_grad():
            velocity = network(
                vectors.latents()[i : i + 1], torch.tensor(vectors.SIGMAS[i : i + 1]), caption[None], len(caption)
            )
        assert golden.relative_error(velocity, expected[i : i + 1]) < PARITY


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
@pytest.mark.parametrize("size", [(64, 48), (50, 70)])
def check_host_and_core_agree(tmp_path: Path, layout: str, size: tuple[int, int]) -> None:
    path, x = write(tmp_path, layout=layout), golden.array("x", (1, 3, *size), 0)
    host = kit.velocity(kit.load_model(path, weight_dtype="fp32"), x, 0.7, features())
    with torch.no_grad():
        core = load_model(path)(x, torch.tensor([0.7]), [features()[0]])
    assert golden.relative_error(host, core) < PARITY


@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX])
def check_the_hosts_loaders_make_the_same_image(tmp_path: Path, prefix: str) -> None:
    settings: dict[str, Any] = {"positive": [[features(), {}]], "negative": [[features(4), {}]]}
    path = write(tmp_path, prefix)
    ours = kit.ksample(kit.load_model(path, weight_dtype="fp32"), **settings)
    stock = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
    assert isinstance(stock.model, L2PBaseModel)
    assert ours.isfinite().all() and torch.equal(kit.ksample(stock, **settings), ours)


def check_load_checkpoint_takes_the_text_encoder_of_the_source(tmp_path: Path) -> None:
    model, _, _ = comfy.sd.load_checkpoint_guess_config(
        write(tmp_path, COMFY_PREFIX), output_vae=False, output_clip=False
    )[:3]
    assert isinstance(model.model, L2PBaseModel)
    target = model.model.model_config.clip_target({})
    assert target.tokenizer is comfy.text_encoders.lumina2.LuminaTokenizer


def check_another_encoders_caption_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another text encoder"):
        kit.ksample(kit.load_model(write(tmp_path)), positive=[[torch.zeros(1, 4, 30), {}]])
