"""The host's own loaders, Load Diffusion Model and Load Checkpoint, with L2P files.

They ask the rows of `comfy.supported_models.models` in turn, and would take L2P for the latent Z-Image: a wrong image
of 129 GB. A row of ours at the head of that list answers for files with a Detailer Head, and for no others. Where a
host knows L2P itself, its row is left to answer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import torch
from torch import Tensor

from ..l2p_core.checkpoint import check_tensors
from ..l2p_core.config import ModelConfig
from ..l2p_core.layouts import comfy_sources
from ..l2p_core.model import key_shapes
from ..l2p_core.quantised import unpacked
from .quantised import check_known, described, is_for_the_host, settings_of

HEAD_KEY = "{}local_decoder.out_conv.weight"
"""In every L2P file; the braces stand for the prefix of its keys."""

_OTHER_PIXEL_MODEL = "{}dec_net.cond_embed.weight"
"""In files of another pixel model on the same backbone, which the host knows."""

BACKBONE = "lumina2"
"""What the host calls the backbone that L2P shares with latent models."""


def register(row: type) -> None:
    """Put our row at the head of the host's list, once."""
    if row not in comfy.supported_models.models:
        comfy.supported_models.models.insert(0, row)


def is_l2p(state: Mapping[str, Any] | None, prefix: str) -> bool:
    """Whether the keys of a state dict are those of an L2P model, or of a part of one."""
    return state is not None and HEAD_KEY.format(prefix) in state and _OTHER_PIXEL_MODEL.format(prefix) not in state


def is_native(row: type, unet_config: Mapping[str, Any], state: Mapping[str, Any] | None, prefix: str) -> bool:
    """Whether this host knows an L2P file itself, by a row of its own beside ours (`row`); said in the log.

    It does if it detects another kind of model than that of the latent backbone, or if the row that answers would not
    without the head.
    """
    without_head = dict.fromkeys(key for key in state or () if not key.startswith(f"{prefix}local_decoder."))
    known = unet_config.get("image_model") != BACKBONE or any(
        other.matches(unet_config, state, prefix) and not other.matches(unet_config, without_head, prefix)
        for other in comfy.supported_models.models
        if not issubclass(other, row)
    )
    if known:
        logging.info("L2P: this ComfyUI knows L2P itself and loads the file its own way; L2P Loader loads it ours")
    return known


def taken_out(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose keys have the prefix, in ComfyUI layout; `state` is left without them.

    Raises:
        ValueError: if the keys mix two layouts.
    """
    plan = comfy_sources(key.removeprefix(prefix) for key in state if key.startswith(prefix))
    weights: dict[str, Tensor] = {}
    for name, keys in plan.items():
        tensors = [state.pop(prefix + key) for key in keys]
        if is_for_the_host(name):
            weights[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return weights


def sizes(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The sizes of the model that these weights are of, and of which none is missing or left over.

    Raises:
        ValueError: if that is not so: the host would only log it, and sample noise.
    """
    tensors = described(weights)
    settings = settings_of(weights)
    try:
        config = ModelConfig.from_shapes(unpacked({name: stored.shape for name, stored in tensors.items()}, settings))
    except ValueError as error:
        raise ValueError(_incomplete(str(error))) from error
    expected = key_shapes(config)
    missing = next((name for name in expected if name not in weights), None)
    if missing:
        raise ValueError(_incomplete(f"'{missing}' is missing."))
    check_known(settings)
    check_tensors("This file", tensors, settings, expected)
    return config


def _incomplete(reason: str) -> str:
    return (
        f"This file holds a part of an L2P model only: {reason} If it is a delta, load it with L2P Loader, as the "
        "delta beside the base that it was made for; otherwise download it again."
    )


def disk_speed(patcher: type, state: dict[str, Tensor]) -> dict[str, Any]:
    """The argument with which a newer host tells its patchers whether weights come from a fast disk."""
    if "fast_disk" not in inspect.signature(patcher).parameters:
        return {}
    import comfy.storage

    return {"fast_disk": comfy.storage.state_dict_fast_disk(state)}
