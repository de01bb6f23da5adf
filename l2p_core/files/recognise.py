"""Recognises files of other kinds by their keys, so that a refusal can say what a file is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..sources import SOURCES
from ..sources.recognition import recognised

_NUNCHAKU = "a nunchaku file (SVDQuant), which only nunchaku's own loader reads"

RELATIVES = (
    (".smooth_factor", _NUNCHAKU),
    (".wscales", _NUNCHAKU),
    (".proj_down", _NUNCHAKU),
    (".quant_state.", "quantised with bitsandbytes, which ComfyUI does not read"),
    (".quant_map", "quantised with bitsandbytes, which ComfyUI does not read"),
    (".qzeros", "quantised with GPTQ or AWQ, which ComfyUI does not read"),
    ("clip_text_pooled_proj.", "a NewBie model"),
    (".lora_A.", "a LoRA"),
    (".lora_down.", "a LoRA"),
    ("lora_unet_", "a LoRA"),
    ("parameter.", "the saved state of a training run, whose result is the delta beside it"),
)
"""Files that share most of their key names with sources: (a piece of a key, what to call the file). Those that resemble
one source alone are in its row."""

STRANGERS = (
    ("conditioner.embedders.", "an SDXL checkpoint"),
    ("cond_stage_model.", "a Stable Diffusion checkpoint"),
    ("decoder.conv_in.", "a VAE"),
    ("input_blocks.", "a Stable Diffusion or SDXL model"),
    ("down_blocks.", "a Stable Diffusion or SDXL model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("double_blocks.", "a Flux model"),
    ("transformer_blocks.", "another diffusion transformer"),
    ("lora_", "a LoRA"),
    ("model.embed_tokens.", "a text encoder"),
)
"""Files that share no key names with a source."""

ALL_IN_ONE = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "clip_vision.",
    "model_ema.",
)
"""Prefixes of the keys outside the diffusion model of an all-in-one file (comfy/supported_models_base.py)."""

ATTENTION_SETTING = ".comfy_attention.config"
"""A layer's preferred attention kernel, which newer hosts read. It is not a part of any weight."""


def is_unused(key: str) -> bool:
    """Whether a key of the diffusion model is allowed but not needed."""
    return key.endswith(ATTENTION_SETTING) or is_of_no_network(key)


def is_of_no_network(key: str) -> bool:
    """Whether files of a source may have a key although no network uses it."""
    return any(key in source.unused for source in SOURCES.values())


def is_beside(key: str) -> bool:
    """Whether a key outside the diffusion model is one that all-in-one files have."""
    return key.startswith(ALL_IN_ONE)


def other_kind(inside: Collection[str], outside: Collection[str] = (), model_class: str = "") -> str | None:
    """The description of a file of another kind; None for a known source, for L2P, and for kinds that are not listed
    here.

    Args:
        inside: the keys of its diffusion model, or all keys.
        outside: keys outside it.
        model_class: the class that its header names, as nunchaku's do.
    """
    if model_class.startswith("Nunchaku"):
        return _NUNCHAKU
    relatives = [marked for source in SOURCES.values() for marked in source.relatives]
    found = _marked((*relatives, *RELATIVES), inside)
    return found if found or recognised(inside) else _marked(STRANGERS, (*inside, *outside))


def _marked(table: Iterable[tuple[str, str]], keys: Collection[str]) -> str | None:
    return next((kind for marker, kind in table if any(marker in key for key in keys)), None)


def unknown_prefix(keys: Collection[str]) -> str | None:
    """An unknown prefix before the key names of a source; None if there is none."""
    landmarks = {landmark for source in SOURCES.values() for landmark in source.landmarks}
    found = (key.removesuffix(landmark) for key in keys for landmark in landmarks if key.endswith(f".{landmark}"))
    return next(found, None)
