"""Small checkpoints of every form, for the tests that read, convert and merge them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_l2p.l2p_core.checkpoint import load_latent, load_model, open_checkpoint
from comfyui_l2p.l2p_core.config import COMFY_PREFIX, ModelConfig, PixelConfig
from comfyui_l2p.l2p_core.layouts import to_diffusers
from comfyui_l2p.l2p_core.model import L2PModel, LatentModel, key_shapes

SOURCE = ModelConfig(
    dim=64,
    head_dim=16,
    n_layers=3,
    n_refiner_layers=1,
    caption_dim=24,
    ffn_dim=80,
    t_freq_dim=16,
    t_hidden_dim=32,
    t_dim=32,
)
HEAD_WIDTH = 0.125


def pixel_config(variant: str = "1k") -> ModelConfig:
    """The pixel model of a variant that `SOURCE` becomes, with a narrow head."""
    return SOURCE.with_head(variant, HEAD_WIDTH)


def weights(config: ModelConfig = SOURCE, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in ComfyUI layout; each follows from its name and the seed."""
    result = {}
    for name, shape in key_shapes(config).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        result[name] = torch.randn(shape, generator=generator).to(dtype)
    return result


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same keys under ``model.diffusion_model.``."""
    return {COMFY_PREFIX + name: tensor for name, tensor in state.items()}


def write(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file as the format's own library writes it."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    return path


def load_any(path: Path) -> L2PModel | LatentModel:
    """A pixel or latent model, whichever it is."""
    checkpoint = open_checkpoint(path)
    return (load_model if isinstance(checkpoint.config(), PixelConfig) else load_latent)(checkpoint)


def write_shards(
    state: Mapping[str, Tensor], folder: Path, stem: str = "diffusion_pytorch_model", count: int = 3
) -> Path:
    """A folder of shards in diffusers layout with their index; neighbours in the model are spread over the shards."""
    folder.mkdir(exist_ok=True)
    diffusers = to_diffusers(state)
    weight_map = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        shard = dict(list(diffusers.items())[i::count])
        write(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal keys, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(bits(left[name]), bits(right[name])) for name in left
    )


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, which compare equal where numbers such as NaN do not."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
