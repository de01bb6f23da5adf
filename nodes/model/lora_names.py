"""Names in LoRA files that the host does not know: a format added to its list of those (comfy/weight_adapter).

The host asks every format in that list for an adapter by the names that the weights of the model at hand may have in
files. Ours answers to names of the Detailer Head alone, which no other model has, so that it is in nobody else's way:
to the head's under the spellings that the host does not know; and once a file, under the name of one bias, for all
else that only an L2P model makes something of. `lora.FittingPatches` applies that, and says in a line what it skips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import comfy.weight_adapter
from torch import Tensor

from ...l2p_core.config import LATENT_PATCH, VARIANTS

PREFIX = "diffusion_model."

_HEAD = f"{PREFIX}local_decoder."
_EMBEDDER = f"{PREFIX}x_embedder"
_ONCE_A_FILE = f"{_HEAD}out_conv.bias"
"""A name that the host asks for once a file, and of L2P models only."""

_FINAL_LAYER = re.compile(r"(?:^|[._])(?:all_)?final_layer[._]")
_WHOLE_TENSOR = re.compile(
    r"(?:layers|noise_refiner|context_refiner|x_embedder|t_embedder|cap_embedder|local_decoder)\..*(?<=\.)(?:weight|bias)"
    r"|x_pad_token|cap_pad_token"
)


class L2PParts:
    """Stands among a file's patches for what the host does not look for in it.

    Args:
        patches: of the patch embedder, under names that the host does not know.
        parts: of the latent source, which a pixel model does not have.
        whole: how many tensors are a delta's, beside its adapters.
        keys: all of the file's that this is.
    """

    def __init__(self, patches: dict[str, Any], parts: set[str], whole: int, keys: set[str]):
        self.patches, self.parts, self.whole = patches, parts, whole
        self.loaded_keys = keys


class L2PNames:
    """In the host's list of formats: any of the others, under names of L2P's own parts."""

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
        if not x.startswith(_HEAD):
            return None
        if x == _ONCE_A_FILE:
            return _parts(lora)
        return _adapter([name for name in _spellings(x.removeprefix(PREFIX)) if name != x], lora)


def make_known() -> None:
    """Add the format to the host's list, once."""
    if L2PNames not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(L2PNames)


def _parts(lora: Mapping[str, Tensor]) -> L2PParts | None:
    """The patch embedder, the latent source's output projection, and in a delta the tensors beside its adapters."""
    # The latent source's embedder is found too, so that it is skipped for its shape and not reported as unknown.
    patches = [LATENT_PATCH, *(row.patch_size for row in VARIANTS.values())]
    names = [form for patch in patches for form in _spellings(f"all_x_embedder.{patch}-1")]
    # As x_embedder the host finds it under the first and third spelling itself.
    names += [name for name in _spellings("x_embedder") if name not in (_EMBEDDER, "lora_unet_x_embedder")]
    embedder = _adapter(names, lora)
    projection = {key for key in lora if _FINAL_LAYER.search(key)}
    whole = {key for key in lora if _WHOLE_TENSOR.fullmatch(key) and "lora" not in key}
    if embedder is None and not projection and not whole:
        return None
    return L2PParts(
        {} if embedder is None else {f"{_EMBEDDER}.weight": embedder},
        {"final_layer"} if projection else set(),
        len(whole),
        projection | whole | (set() if embedder is None else embedder.loaded_keys),
    )


def _adapter(names: list[str], lora: Mapping[str, Tensor]) -> Any:
    """What the file has under one of some names, by any of the host's formats; None if nothing."""
    for name in names:
        if not any(key.startswith(name) for key in lora):
            continue
        beside = {end: lora[name + end] for end in (".alpha", ".dora_scale") if name + end in lora}
        alpha = beside[".alpha"].item() if ".alpha" in beside else None
        for kind in comfy.weight_adapter.adapters:
            if kind is L2PNames:
                continue
            adapter = kind.load(name, lora, alpha, beside.get(".dora_scale"), set())
            if adapter is not None:
                adapter.loaded_keys.update(name + end for end in beside)
                return adapter
    return None


def _spellings(name: str) -> list[str]:
    """As comfy/lora.py spells the names of Z-Image's other weights."""
    flat = name.replace(".", "_")
    return [f"{PREFIX}{name}", f"transformer.{name}", f"lora_unet_{flat}", f"lycoris_{flat}", name]
