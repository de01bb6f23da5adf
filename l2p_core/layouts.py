"""Key names: the ComfyUI layout, which is the one in-memory layout, and the diffusers layout of published files.

They differ in the names below, and in that the ComfyUI layout stacks the attention's q, k and v along the first
dimension. Everything else has the same name in both. The mappings are functions of key names alone, so that a
12 GB file can be converted key by key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .config import COMFY_PREFIX, LATENT_PATCH, PIXEL_CHANNELS

LAYOUTS = ("comfy", "diffusers")

# (ComfyUI part, diffusers part) of block keys.
_RENAMED = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
_STACKED = ".attention.qkv."
_SPLIT = (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")
# The diffusers layout names the patch size: all_x_embedder.16-1.weight.
_PATCHED = re.compile(r"all_(x_embedder|final_layer)\.\d+-1\.")


def comfy_sources(keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """How to make the ComfyUI layout: {output key: the input keys to stack along the first dimension}.

    `keys` are of either layout, with the prefix ``model.diffusion_model.`` or without; the prefix is taken off.

    Raises:
        ValueError: if one of q, k and v is missing, or two inputs claim the same output.
    """
    plan: dict[str, tuple[str, ...]] = {}
    parts: dict[str, dict[int, str]] = {}
    for key in keys:
        name, part = _to_comfy_name(key.removeprefix(COMFY_PREFIX))
        if part is not None:
            if part in parts.setdefault(name, {}):
                raise ValueError(f"Two tensors of this model mean the same '{name}': it mixes two layouts.")
            parts[name][part] = key
            plan.setdefault(name, ())
        elif name in plan:
            raise ValueError(f"Two tensors of this model mean the same '{name}': it mixes two layouts.")
        else:
            plan[name] = (key,)
    for name, found in parts.items():
        if plan[name] or len(found) != len(_SPLIT):
            raise ValueError(f"The q, k and v of '{name}' are incomplete or there twice: the model is damaged.")
        plan[name] = tuple(found[part] for part in range(len(_SPLIT)))
    return plan


def diffusers_targets(key: str, patch_size: int) -> tuple[str, ...]:
    """The diffusers keys of a ComfyUI key: one, or three that split its rows evenly; `patch_size` is the model's."""
    if key.startswith("x_embedder."):
        return (f"all_x_embedder.{patch_size}-1.{key.removeprefix('x_embedder.')}",)
    if key.startswith("final_layer."):
        return (f"all_final_layer.{patch_size}-1.{key.removeprefix('final_layer.')}",)
    if key.endswith(f"{_STACKED}weight"):
        return tuple(key.replace(_STACKED, part) for part in _SPLIT)
    for comfy, diffusers in _RENAMED:
        key = key.replace(comfy, diffusers)
    return (key,)


def target_shapes(key: str, shape: tuple[int, ...], layout: str, patch_size: int) -> dict[str, tuple[int, ...]]:
    """What a tensor of the ComfyUI layout is in `layout`: the keys and shapes of one tensor or of its rows' thirds.

    Raises:
        ValueError: for a layout other than those in `LAYOUTS`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no key layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    targets = (key,) if layout == "comfy" else diffusers_targets(key, patch_size)
    if len(targets) == 1:
        return {targets[0]: shape}
    return dict.fromkeys(targets, (shape[0] // len(targets), *shape[1:]))


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
    patch_size = patch_size_of({key: tuple(tensor.shape) for key, tensor in comfy.items()})
    result: dict[str, Tensor] = {}
    for key, tensor in comfy.items():
        targets = diffusers_targets(key, patch_size)
        result.update(zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True))
    return result


def patch_size_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The patch size of a model in ComfyUI layout: a latent one's, unless it has a Detailer Head."""
    if "x_embedder.weight" in shapes and any(key.startswith("local_decoder.") for key in shapes):
        return math.isqrt(shapes["x_embedder.weight"][1] // PIXEL_CHANNELS)
    return LATENT_PATCH


def renamed(key: str) -> str:
    """A key by the names of the ComfyUI layout; those of q, k and v, which are parts of a tensor there, stay."""
    key = _PATCHED.sub(r"\1.", key, count=1) if key.startswith("all_") else key
    for comfy, diffusers in _RENAMED:
        key = key.replace(diffusers, comfy)
    return key


def _to_comfy_name(key: str) -> tuple[str, int | None]:
    """The ComfyUI key, and which of q, k, v (0, 1, 2) the tensor is, None if it is the whole."""
    for part, name in enumerate(_SPLIT):
        # Weights alone are stacked: the scales of quantised ones are not rows of one matrix.
        if key.endswith(f"{name}weight"):
            return key.replace(name, _STACKED), part
    return renamed(key), None
