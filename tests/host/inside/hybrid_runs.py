"""What the checks of Hybrid Sampler run it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nodes
from comfyui_l2p.l2p_core.tiny.shapes import evaluation_captions
from comfyui_l2p.nodes.hybrid_checks import HybridSettings, Models, Prompts
from comfyui_l2p.nodes.hybrid_sampling import sample_hybrid
from comfyui_l2p.nodes.hybrid_tasks import Asked
from comfyui_l2p.nodes.model.demo import load_demo
from comfyui_l2p.nodes.model.demo_source import load_demo_source

CAPTION = evaluation_captions(1)[0]
SETTINGS = HybridSettings(seed=5, steps=8, cfg=2.0, latent_steps=8, latent_cfg=2.0)

Loaded = tuple[Models, Prompts]


def load() -> Loaded:
    """The bundled models, with prompts."""
    source, clip, vae = load_demo_source()
    pixels, _ = load_demo()
    encode = nodes.CLIPTextEncode().encode
    with torch.inference_mode():
        return Models(source, vae, pixels), Prompts(encode(clip, CAPTION)[0], encode(clip, "")[0])


def run(loaded: Loaded, task: str, said: list[str] | None = None, **changed: Any) -> Tensor:
    """Hybrid Sampler's image; `said` takes what it tells."""
    models, prompts = loaded
    size = {name: changed.pop(name, 0) for name in ("width", "height")}
    models = changed.pop("models", models)
    given = {name: changed.pop(name, None) for name in ("image", "mask")}
    settings = HybridSettings(**{**vars(SETTINGS), **changed})
    tell = (said if said is not None else []).append
    with torch.inference_mode():
        return sample_hybrid(task, models, prompts, settings, **size, **given, tell=tell)


IMAGE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 64, 64)
MASK[:, 20:40, 20:40] = 1


def asked(task: str, **changed: Any) -> Asked:
    """The inputs of a plan with the 1k model."""
    given = {"latent": False, "pixels": True, "own": 1024, "size": (0, 0), "image": None, "mask": False}
    given |= {"steps": 30, "latent_steps": 8, "switch": None, "shift": 1.0}
    return Asked(task=task, **{**given, **changed})
