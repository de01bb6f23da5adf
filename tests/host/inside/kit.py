"""Small L2P models made of the golden vectors, and the calls that the host's nodes make with a MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import golden_vectors as golden
import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_l2p.l2p_core.layouts import to_comfy
from comfyui_l2p.nodes.model.loading import load_model

__all__ = ["load_model", "save_file"]

CAPTION_DIM = golden.load("dit_16")[0]["cap_feat_dim"]


def write(folder: Path, name: str = "dit_16", layout: str = "comfy", seed: int | None = None) -> str:
    """A golden model as a file; its path."""
    weights = golden.diffusers_weights(name, seed)
    path = folder / f"{name}-{layout}-{seed}.safetensors"
    save_file({k: v.contiguous() for k, v in (to_comfy(weights) if layout == "comfy" else weights).items()}, path)
    return str(path)


def model(folder: Path, name: str = "dit_16", **settings: Any) -> Any:
    """A golden model as the MODEL that L2P Loader gives, float32 unless told otherwise."""
    return load_model(write(folder, name), **{"weight_dtype": "fp32", **settings})


def caption(text: str = "positive", tokens: int = 7) -> list[Any]:
    """A CONDITIONING of numbers that follow from the text."""
    return [[golden.array(text, (1, tokens, CAPTION_DIM), 0), {"pooled_output": None}]]


def latent(width: int = 64, height: int = 48, batch: int = 1) -> Tensor:
    """An empty LATENT's samples."""
    return torch.zeros(batch, 3, height, width)


def ksample(patcher: Any, pixels: Tensor | None = None, **settings: Any) -> Tensor:
    """What the KSampler node does; its samples (B, 3, H, W)."""
    pixels = latent() if pixels is None else pixels
    call: dict[str, Any] = {
        "steps": 3,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": caption(),
        "negative": caption("negative", 5),
        "seed": 1,
        "disable_pbar": True,
        **settings,
    }
    noise = comfy.sample.prepare_noise(pixels, call["seed"])
    steps, cfg = call.pop("steps"), call.pop("cfg")
    names = call.pop("sampler_name"), call.pop("scheduler")
    conds = call.pop("positive"), call.pop("negative")
    with torch.inference_mode():
        return comfy.sample.sample(patcher, noise, steps, cfg, *names, *conds, pixels, **call)


def velocity(patcher: Any, pixels: Tensor, sigma: float, features: Tensor) -> Tensor:
    """One forward pass of the loaded network."""
    comfy.model_management.load_models_gpu([patcher])
    dtype = patcher.model.get_dtype_inference()
    pixels, sigmas, features = (x.to(patcher.load_device, dtype) for x in (pixels, torch.tensor([sigma]), features))
    with torch.inference_mode():
        network = patcher.model.diffusion_model
        result = network(pixels, sigmas, context=features, num_tokens=features.shape[1], transformer_options={})
    return result.float().cpu()
