"""What a checkpoint is that is not Z-Image or L2P, by its keys: every other file is called by its name."""

from __future__ import annotations

from collections.abc import Collection

_NUNCHAKU = "a nunchaku file (SVDQuant), which only nunchaku's own loader reads"

RELATIVES = (
    ("siglip_", "a Z-Image Omni or Edit model, which reads images beside the text"),
    ("dec_net.", "another kind of pixel-space Z-Image (with a 'dec_net' in place of a Detailer Head)"),
    ("control_layers.", "a ControlNet for Z-Image"),
    ("control_noise_refiner.", "a ControlNet for Z-Image"),
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
)
"""Files with Z-Image's own key names, or most of them: (a piece of a key, what to call the file)."""

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
"""Files that have nothing of Z-Image."""

ALL_IN_ONE = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "clip_vision.",
    "model_ema.",
)
"""What the keys begin with that an all-in-one file has beside its diffusion model (comfy/supported_models_base.py)."""

UNUSED_KEYS = ("norm_final.weight",)
"""Keys that Z-Image files may carry and that its network does not have."""

ATTENTION_SETTING = ".comfy_attention.config"
"""Which attention kernel a layer prefers: read by newer hosts, and of no weight anywhere."""

_LANDMARKS = ("x_embedder.weight", "cap_embedder.1.weight", "t_embedder.mlp.0.weight", "cap_pad_token")


def is_unused(key: str) -> bool:
    """Whether a key of the diffusion model may be there and is not needed."""
    return key in UNUSED_KEYS or key.endswith(ATTENTION_SETTING)


def is_beside(key: str) -> bool:
    """Whether a key outside the diffusion model is one that all-in-one files have."""
    return key.startswith(ALL_IN_ONE)


def other_kind(inside: Collection[str], outside: Collection[str] = (), model_class: str = "") -> str | None:
    """What to call a file of another kind; None for Z-Image, L2P, and what has no name here.

    Args:
        inside: the keys of its diffusion model, or all keys.
        outside: those beside it.
        model_class: the class that its header names, as nunchaku's do.
    """
    if model_class.startswith("Nunchaku"):
        return _NUNCHAKU
    found = _marked(RELATIVES, inside)
    return found if found or "x_pad_token" in inside else _marked(STRANGERS, (*inside, *outside))


def _marked(table: tuple[tuple[str, str], ...], keys: Collection[str]) -> str | None:
    return next((kind for marker, kind in table if any(marker in key for key in keys)), None)


def unknown_prefix(keys: Collection[str]) -> str | None:
    """What stands before the names that Z-Image's keys have, where something does that is not known."""
    for key in keys:
        for landmark in _LANDMARKS:
            if key.endswith(f".{landmark}"):
                return key.removesuffix(landmark)
    return None
