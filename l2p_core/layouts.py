"""Key names of whole files: to the ComfyUI layout, which is the one in memory, and to the diffusers layout.

Which names differ is in the sources' rows (`sources.key_layout`). The mappings are functions of key names alone, so
that a 12 GB file can be converted key by key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .config import COMFY_PREFIX, HEAD, PIXEL_CHANNELS, ModelConfig
from .ranges import check_known
from .sources import source_of
from .sources.recognition import nearest_source

LAYOUTS = ("comfy", "diffusers")


def comfy_sources(keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map to the ComfyUI layout: {output key: the input keys to stack along the first dimension}.

    `keys` are of either layout, with the prefix ``model.diffusion_model.`` or without; the prefix is removed.

    Raises:
        ValueError: if one of q, k and v is missing, or two inputs claim the same output.
    """
    plan: dict[str, tuple[str, ...]] = {}
    parts: dict[str, dict[int, str]] = {}
    plain = {key: key.removeprefix(COMFY_PREFIX) for key in keys}
    layout = nearest_source(plain.values()).layout
    for key, without_prefix in plain.items():
        name, part = layout.to_comfy(without_prefix)
        if part is not None:
            if part in parts.setdefault(name, {}):
                raise ValueError(f"This model mixes two key layouts: two of its tensors stand for '{name}'.")
            parts[name][part] = key
            plan.setdefault(name, ())
        elif name in plan:
            raise ValueError(f"This model mixes two key layouts: two of its tensors stand for '{name}'.")
        else:
            plan[name] = (key,)
    for name, found in parts.items():
        if plan[name]:
            raise ValueError(f"The model is damaged: it has the q, k and v of '{name}' twice.")
        wanted = layout.to_diffusers(name, 0)
        missing = next((key for part, key in enumerate(wanted) if part not in found), None)
        if missing:
            raise ValueError(f"The model is damaged: '{missing}' is missing.")
        plan[name] = tuple(found[part] for part in range(len(wanted)))
    return plan


def target_shapes(key: str, shape: tuple[int, ...], layout: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map a tensor of the ComfyUI layout to `layout`: the keys and shapes of one tensor, or of its parts.

    Raises:
        ValueError: for a layout other than those in `LAYOUTS`.
    """
    check_known("key layout", layout, LAYOUTS)
    if layout == "comfy":
        return {key: shape}
    names = source_of(config).layout
    targets, stack = names.to_diffusers(key, config.patch_size), names.stack_of(key)
    if stack is None:
        return {targets[0]: shape}
    return {target: (rows, *shape[1:]) for target, rows in zip(targets, stack.rows(shape), strict=True)}


def to_comfy(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of either layout, prefixed or not, in ComfyUI layout.

    Raises:
        ValueError: as `comfy_sources`.
    """
    return {
        key: state_dict[sources[0]] if len(sources) == 1 else torch.cat([state_dict[source] for source in sources])
        for key, sources in comfy_sources(state_dict).items()
    }


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of either layout in diffusers layout: the inverse of `to_comfy`. Splits are views.

    Raises:
        ValueError: as `comfy_sources`.
    """
    comfy = to_comfy(state_dict)
    source = nearest_source(comfy)
    patch_size = source.latent.patch_size
    if source.embedder_weight in comfy and any(key.startswith(f"{HEAD}.") for key in comfy):
        patch_size = math.isqrt(comfy[source.embedder_weight].shape[1] // PIXEL_CHANNELS)
    result: dict[str, Tensor] = {}
    for key, tensor in comfy.items():
        targets, stack = source.layout.to_diffusers(key, patch_size), source.layout.stack_of(key)
        parts = (tensor,) if stack is None else tensor.split(stack.rows(tuple(tensor.shape)))
        result.update(zip(targets, parts, strict=True))
    return result
