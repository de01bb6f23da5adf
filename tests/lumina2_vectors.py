"""Golden vectors of Lumina-2 from diffusers: `python tests/lumina2_vectors.py` writes tests/golden/lumina2.safetensors.

Weights and inputs follow from their names, so the file holds outputs alone.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from comfyui_l2p.train.benchmark.golden_vectors import array, weight

FILE = Path(__file__).parent / "golden" / "lumina2.safetensors"
SEED = 11
SIZES: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "hidden_size": 192,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "ffn_dim_multiplier": 0.5,
    "axes_dim_rope": (16, 16, 16),
    "cap_feat_dim": 24,
}
"""A small model with grouped queries, by diffusers' names."""
LENGTHS = 7, 12
SIGMAS = 0.83, 0.21


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights by their diffusers keys."""
    return {key: weight(key, shape, SEED) for key, shape in shapes.items()}


def latents() -> Tensor:
    """(2, 4, 16, 24)."""
    return array("latents", (2, SIZES["in_channels"], 16, 24), SEED)


def captions() -> list[Tensor]:
    """Two captions of different lengths."""
    return [array(f"caption{i}", (length, SIZES["cap_feat_dim"]), SEED) for i, length in enumerate(LENGTHS)]


def diffusers_model() -> Any:
    """Diffusers' own network with these weights."""
    # By its name: type checkers shall not look for a package that is no dependency.
    model = importlib.import_module("diffusers").Lumina2Transformer2DModel(**SIZES)
    model.load_state_dict(weights({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}))
    return model.eval()


@torch.no_grad()
def diffusers_velocity(model: Any) -> Tensor:
    """noise - x0 of `latents`: diffusers' time runs from noise to image, and its output is x0 - noise."""
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), SIZES["cap_feat_dim"])
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    for i, caption in enumerate(captions()):
        padded[i, : len(caption)], mask[i, : len(caption)] = caption, True
    output: Tensor = -model(latents(), 1 - torch.tensor(SIGMAS), padded, mask, return_dict=False)[0]
    return output


def stored() -> tuple[dict[str, tuple[int, ...]], Tensor]:
    """The shapes of the weights by their diffusers keys, and the velocity."""
    with safe_open(FILE, "pt") as file:
        keys = json.loads(file.metadata()["keys"])
        return {key: tuple(shape) for key, shape in keys.items()}, file.get_tensor("velocity")


if __name__ == "__main__":
    network = diffusers_model()
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    save_file({"velocity": diffusers_velocity(network)}, FILE, metadata={"keys": json.dumps(shapes)})
