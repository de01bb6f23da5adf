"""The host's ModelPatcher of an L2P model, whoever made it: what it needs beside what the host gives it."""

from __future__ import annotations

import functools
import gc
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ...l2p_core.ops.finite import check_finite
from .limits import check_memory, check_pixels
from .lora import FittingPatches

KEY = "l2p"
AREA_UNIT = 8
"""Pixels in the unit of conditioning areas, whatever the model."""


def adopt(patcher: Any) -> None:
    """Let a patcher skip LoRA weights that do not fit, refuse what cannot be sampled, and bring areas to pixels."""
    if not isinstance(patcher, FittingPatches):
        # Clones are made of the patcher's own class.
        kind: Any = type(patcher)
        patcher.__class__ = _fitting(kind)
    if not patcher.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY):
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, before_sampling)


@functools.cache
def _fitting(base: Any) -> type:
    """The host's patcher (which one is decided when the host starts) that skips what does not fit."""
    return type("L2PModelPatcher", (FittingPatches, base), {})


def patchers_of(model: torch.nn.Module) -> list[Any]:
    """The host's patchers of a model.

    The host's loaders make one before they load the weights and hand it to nobody who could adopt it, nor does a
    patcher tell its model of itself before it samples. What holds the model is known to Python alone.
    """
    holders = gc.get_referrers(model)
    # An instance's attributes may be a dict of their own, or lie in the instance, by Python's version.
    holders += gc.get_referrers(*[holder for holder in holders if type(holder) is dict])
    patchers = {id(held): held for held in holders if issubclass(type(held), comfy.model_patcher.ModelPatcher)}
    return [patcher for patcher in patchers.values() if patcher.model is model]


def before_sampling(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps the host's sampling: refuses what cannot be sampled or came out broken, and brings areas to pixels."""
    guider = executor.class_obj
    check_pixels(noise.shape)
    check_memory(guider.model_patcher, noise.shape[0], *noise.shape[2:])
    for conds in guider.conds.values():
        for cond in conds:
            area = cond.get("area")
            if area is not None and area[0] != "percentage":
                cond["area"] = tuple(AREA_UNIT * value for value in area)
    samples = executor(noise, *args, **kwargs)
    check_finite(samples)
    return samples
