"""Names in LoRA files that the host does not know: a format added to its list of those (comfy/weight_adapter).

The host asks every format in that list for an adapter by the names that the weights of the model at hand may have in
files. Of L2P's own parts it knows one spelling only, so this format answers to the others. It also takes note of what
cannot be patched into any pixel model, which the host would report key by key; `lora.FittingPatches` says it in a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.weight_adapter
from torch import Tensor

from ..l2p_core.config import LATENT_PATCH, VARIANTS

PREFIX = "diffusion_model."

_HEAD = f"{PREFIX}local_decoder."
_EMBEDDER = f"{PREFIX}x_embedder"
_ONCE_A_MODEL = f"{_HEAD}out_conv.bias"
"""A name that the host asks for once a file, of L2P models only."""

_FINAL_LAYER = re.compile(r"(?:^|[._])(?:all_)?final_layer[._]")
_WHOLE_TENSOR = re.compile(
    r"(?:layers|noise_refiner|context_refiner|x_embedder|t_embedder|cap_embedder|local_decoder)\..*(?<=\.)(?:weight|bias)"
    r"|x_pad_token|cap_pad_token"
)


class LeftOut:
    """Stands among a file's patches for what is in the file and cannot be patched into a pixel model.

    Args:
        parts: of the latent source.
        whole: how many tensors are a delta's, beside its adapters.
        keys: all of them.
    """

    def __init__(self, parts: set[str], whole: int, keys: set[str]):
        self.parts, self.whole = parts, whole
        self.loaded_keys = keys


class L2PNames:
    """In the host's list of formats: any of the others, under names of the diffusers layout."""

    @classmethod
    def load(
        cls,
        x: str,
        lora: Mapping[str, Tensor],
        alpha: float | None,
        dora_scale: Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> Any:
        """What the file has for the weight that the host calls `x`, None if nothing."""
        if x == _ONCE_A_MODEL:
            return _useless(lora)
        for name in _other_names(x):
            if not any(key.startswith(name) for key in lora):
                continue
            beside = {end: lora[name + end] for end in (".alpha", ".dora_scale") if name + end in lora}
            alpha = beside[".alpha"].item() if ".alpha" in beside else None
            for kind in comfy.weight_adapter.adapters:
                if kind is cls:
                    continue
                adapter = kind.load(name, lora, alpha, beside.get(".dora_scale"), loaded_keys)
                if adapter is not None:
                    adapter.loaded_keys.update(name + end for end in beside)
                    return adapter
        return None


def make_known() -> None:
    """Add the format to the host's list, once."""
    if L2PNames not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(L2PNames)


def _other_names(x: str) -> list[str]:
    """What the weight of an L2P model that the host calls `x` may be called in files besides."""
    names = [x.removeprefix(PREFIX)] if x.startswith(_HEAD) else []
    if x == _EMBEDDER:
        # The latent source's is found too, so that it is left out for its shape and not reported as unknown.
        patches = [LATENT_PATCH, *(row.patch_size for row in VARIANTS.values())]
        names = ["x_embedder", *(f"all_x_embedder.{patch}-1" for patch in patches)]
    return [form for name in names for form in _spellings(name) if form != x]


def _spellings(name: str) -> list[str]:
    """As comfy/lora.py spells the names of Z-Image's other weights."""
    flat = name.replace(".", "_")
    return [f"{PREFIX}{name}", f"transformer.{name}", f"lycoris_{flat}", f"lora_unet_{flat}", name]


def _useless(lora: Mapping[str, Tensor]) -> LeftOut | None:
    """What is for the latent source's output projection, and, in a delta, the tensors beside its adapters."""
    projection = {key for key in lora if _FINAL_LAYER.search(key)}
    whole = {key for key in lora if _WHOLE_TENSOR.fullmatch(key) and "lora" not in key}
    if not projection and not whole:
        return None
    return LeftOut({"final_layer"} if projection else set(), len(whole), projection | whole)
