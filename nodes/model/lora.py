"""LoRA files made for the latent source on an L2P model: patches that fit are applied, and one line lists the skipped
ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from comfy.weight_adapter.bypass import BypassForwardHook
from torch import Tensor
from torch.nn import Module

from .lora_names import PREFIX, SOURCE, L2PParts

NOT_OF_WEIGHTS = ("config",)
"""Kinds of patches by which files configure how a layer computes (newer hosts); the host applies them to no weight."""


class FittingPatches:
    """A mixin for the host's ModelPatcher that skips weight patches whose shape does not match.

    The latent source's patch embedder and final layer do not exist in a pixel model; the host would try to apply the
    former at every load of the model and fail with an error each time. The skipped keys are returned as well, so that
    the host does not report them again.
    """

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As the host's."""
        fitting, skipped = self._fitting(patches)
        applied: list[Any] = super().add_patches(fitting, strength_patch, strength_model)  # type: ignore[misc]
        return [*applied, *skipped]

    def add_hook_patches(
        self, hook: Any, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As the host's, whose conditioning can switch patches on and off."""
        fitting, skipped = self._fitting(patches)
        applied: list[Any] = super().add_hook_patches(hook, fitting, strength_patch, strength_model)  # type: ignore[misc]
        return [*applied, *skipped]

    def inject_model(self) -> None:
        """As the host's, whose bypass nodes add a LoRA's output to a layer's own and leave the weights as they are."""
        super().inject_model()  # type: ignore[misc]
        modules: Iterable[tuple[str, Module]] = self.model.named_modules()  # type: ignore[attr-defined]
        injected = {f"{name}.weight": getattr(module.forward, "__self__", None) for name, module in modules}
        hooks = {key: hook for key, hook in injected.items() if isinstance(hook, BypassForwardHook)}
        weights: dict[str, Tensor] = self.model.state_dict() if hooks else {}  # type: ignore[attr-defined]
        skipped = {key: hook.adapter for key, hook in hooks.items() if not fits(key, hook.adapter, weights)}
        for key in skipped:
            hooks[key].eject()
        if skipped:
            _report(len(hooks) - len(skipped), skipped)

    def _fitting(self, patches: dict[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
        """The patches that fit, and the keys of the others."""
        weights: dict[str, Tensor] = self.model.state_dict()  # type: ignore[attr-defined]
        found = dict(patches)
        for patch in patches.values():
            if isinstance(patch, L2PParts):
                found |= patch.patches
        fitting = {key: patch for key, patch in found.items() if fits(key, patch, weights)}
        skipped = {key: patch for key, patch in found.items() if key not in fitting and _name(key).startswith(PREFIX)}
        if skipped:
            _report(len(fitting), skipped)
        return fitting, [key for key in patches if key not in fitting and key in skipped]


def _report(patched: int, skipped: dict[Any, Any]) -> None:
    parts: set[str] = set()
    whole = 0
    for key, patch in skipped.items():
        if isinstance(patch, L2PParts):
            parts |= patch.parts
            whole += patch.whole
        else:
            name = _name(key).removeprefix(PREFIX).removeprefix(SOURCE).removesuffix(".weight")
            parts.add("final_layer" if name.startswith("final_layer.") else name)
    reasons = ["not being made for this model: " + ", ".join(sorted(parts))] if parts else []
    if whole:
        reasons.append(f"{whole} whole tensors of a delta, which belongs in L2P Loader's delta input")
    if reasons:
        logging.info("L2P: %d weights patched; skipped, %s", patched, "; ".join(reasons))


def fits(key: Any, patch: Any, weights: dict[str, Tensor]) -> bool:
    """Whether one of the host's patches can be applied to its weight; patches without a weight always can."""
    name = _name(key)
    if isinstance(patch, tuple) and patch[0] in NOT_OF_WEIGHTS:
        return True
    if name not in weights or isinstance(patch, L2PParts):
        return False
    shape = tuple(weights[name].shape)
    made_for = _shape_made_for(patch)
    if made_for is None or not isinstance(key, str):
        # A key with an offset (q, k or v of the stacked qkv) exists only if the width matches.
        return True
    return made_for[0] == shape[0] and made_for[1] == _numel(shape[1:])


def _shape_made_for(patch: Any) -> tuple[int, int] | None:
    """(rows, columns) of the weight that a low-rank pair or a difference was made for, None for other patches."""
    if isinstance(patch, tuple) and patch[0] == "diff" and len(patch[1]) == 1:
        return patch[1][0].shape[0], _numel(patch[1][0].shape[1:])
    weights = getattr(patch, "weights", None)
    if getattr(patch, "name", "") != "lora" or not weights or weights[3] is not None:
        return None
    up, down = weights[0], weights[1]
    return up.shape[0], _numel(down.shape[1:])


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _numel(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
