"""Additions to the host's ModelPatcher for an L2P model, whichever loader created it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ...l2p_core.files.metadata import KIND, PIXEL_INIT
from ...l2p_core.files.safetensors_header import CheckpointError, read_header
from ...l2p_core.ops.finite import cause, check_finite, weights_of
from ..messages.progress import warn_where_running
from ..options import UNTRAINED
from ..sizes import far_from_trained
from .limits import check_memory, check_pixels
from .lora import FittingPatches
from .lora_names import PREFIX
from .whole_file import WholeFile

KEY = "l2p"
_LAYOUT = 0.95
"""Sigma above which a sampling lays the image out."""

AREA_UNIT = 8
"""Pixels per unit of conditioning areas, for every model."""


def adopt(patcher: Any) -> None:
    """Make a patcher skip LoRA weights that do not fit, refuse invalid samplings, and convert areas to pixels."""
    if not isinstance(patcher, FittingPatches):
        # Clones have the patcher's own class.
        kind: Any = type(patcher)
        patcher.__class__ = _fitting(kind)
    if not patcher.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY):
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, before_sampling)


@functools.cache
def _fitting(base: Any) -> type:
    """A subclass of the host's patcher (chosen when the host starts) that skips patches that do not fit."""
    return type("L2PModelPatcher", (FittingPatches, WholeFile, base), {})


def patchers_of(model: torch.nn.Module) -> list[Any]:
    """The host's patchers of a model.

    The host's loaders create a patcher before they load the weights and pass it to nobody, and a patcher does not
    register with its model before it samples: it keeps callbacks, wrappers and injections itself, and the model's
    `current_patcher` is set only after LoRAs have been added and the sampling's wrappers chosen. Only Python's garbage
    collector knows what holds the model.
    """
    holders = gc.get_referrers(model)
    # Depending on Python's version, an instance's attributes are a separate dict or stored inline.
    holders += gc.get_referrers(*[holder for holder in holders if type(holder) is dict])
    patchers = {id(held): held for held in holders if issubclass(type(held), comfy.model_patcher.ModelPatcher)}
    return [patcher for patcher in patchers.values() if patcher.model is model]


def before_sampling(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps the host's sampling: refuses invalid or non-finite samplings, and converts areas to pixels."""
    guider = executor.class_obj
    check_pixels(noise.shape)
    for warning in _warnings(guider.model_patcher, noise.shape, _first_sigma(*args, **kwargs)):
        warn_where_running(warning)
    check_memory(guider.model_patcher, noise.shape[0], *noise.shape[2:])
    for conds in guider.conds.values():
        for cond in conds:
            area = cond.get("area")
            if area is not None and area[0] != "percentage":
                cond["area"] = tuple(AREA_UNIT * value for value in area)
    return finite_samples(executor, noise, *args, **kwargs)


def _warnings(patcher: Any, shape: Sequence[int], sigma: float) -> list[str]:
    """What the user should know of a sampling of pixels (B, 3, H, W) that starts at this sigma; usually nothing."""
    untrained = UNTRAINED if _is_untrained(patcher) else ""
    # An image that is sampled again, enlarged or not, has its layout already.
    far = far_from_trained(patcher.model.l2p, shape[3], shape[2]) if sigma > _LAYOUT else ""
    return [warning for warning in (untrained, far) if warning]


def _first_sigma(latent: Any, sampler: Any, sigmas: Tensor, *_: Any, **__: Any) -> float:
    """The noise level at which the host's `outer_sample` starts, from its arguments after the noise."""
    return float(sigmas[0]) if len(sigmas) else 0.0


def _is_untrained(patcher: Any) -> bool:
    """Whether the model is a pixel initialisation. The host's loaders keep what a file says of itself from the model,
    and leave the file's path for those who load it again."""
    model = patcher.model
    if model.untrained is None:
        _, arguments, *_ = patcher.cached_patcher_init or (None, ())
        path = next(iter(arguments), None)
        model.untrained = isinstance(path, str) and Path(path).is_file() and _is_initialisation(path)
    return bool(model.untrained)


def _is_initialisation(path: str) -> bool:
    try:
        return read_header(Path(path)).metadata.get(KIND) == PIXEL_INIT
    except CheckpointError:  # the host reads other kinds of files too
        return False


def finite_samples(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps the host's sampling: refuses what came out broken, with the weight, LoRA or prompt that is at fault."""
    guider, latent = executor.class_obj, args[0] if args else kwargs.get("latent_image")
    conds = {name: [dict(cond) for cond in of_name] for name, of_name in guider.conds.items()}
    samples = executor(noise, *args, **kwargs)
    check_finite(samples, lambda: _cause(guider.model_patcher, conds, latent))
    return samples


def _cause(patcher: Any, conds: dict[str, list[dict[str, Any]]], latent: Tensor | None) -> str:
    inputs = [
        (f"the {name} prompt's conditioning", cond["cross_attn"])
        for name, of_name in conds.items()
        for cond in of_name
        if isinstance(cond.get("cross_attn"), Tensor)
    ]
    if latent is not None:
        inputs.append(("the image or latent to start from", latent))
    adapters = ((_name(key), tensor) for key, patches in patcher.patches.items() for tensor in _tensors(patches))
    return cause(weights_of(patcher.model.diffusion_model), inputs, adapters, adapted=bool(patcher.patches))


def _name(key: Any) -> str:
    return (key if isinstance(key, str) else key[0]).removeprefix(PREFIX)


def _tensors(patches: Any) -> Iterator[Tensor]:
    """The tensors in patches of the host's kinds: tuples, lists, and adapters with their weights in one."""
    if isinstance(patches, Tensor):
        yield patches
    elif isinstance(patches, tuple | list):
        for part in patches:
            yield from _tensors(part)
    elif hasattr(patches, "weights"):
        yield from _tensors(patches.weights)
