"""Names in LoRA files that the host does not know: a format added to its list of those (comfy/weight_adapter).

The host asks every format in that list for an adapter by the names that the weights of the model at hand may have in
files. Our format answers only to names of the Detailer Head, which no other model has, so that it affects no other
model: to the head's weights under spellings that the host does not know; and, once per file, under the name of one
bias, for everything else that only an L2P model can use. `lora.FittingPatches` applies this, and reports in one line
what it skips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.weight_adapter
from torch import Tensor

from ...l2p_core.config import HEAD, VARIANTS
from ...l2p_core.sources import SOURCES
from ...l2p_core.sources.source import Source

PREFIX = "diffusion_model."
SOURCE = "source."
"""Prefix of the names of the source's own weights inside the network of a pair of models."""

_HEAD = f"{PREFIX}{HEAD}."
_ONCE_A_FILE = f"{_HEAD}out_conv.bias"
"""A name that the host looks up once per file, for L2P models only."""


@dataclass(frozen=True)
class L2PParts:
    """Stands among a file's patches for tensors that the host does not look for.

    Attributes:
        patches: of the patch embedder, under names that the host does not know.
        output: of the latent source's output projection, which a pixel model does not have.
        parts: of the latent source, which a pixel model does not have.
        unread: those of them that `output` does not hold in full.
        whole: how many tensors are a delta's, beside its adapters.
        loaded_keys: all keys of the file that this covers.
    """

    patches: dict[str, Any]
    output: dict[str, Any]
    parts: set[str]
    unread: set[str]
    whole: int
    loaded_keys: set[str]

    def of_source(self) -> L2PParts:
        """The same for a model that has the latent source's output projection."""
        return replace(self, patches=self.patches | self.output, output={}, parts=self.unread)


class L2PNames:
    """An entry in the host's list of formats: any of the others, under names of L2P's own parts."""

    @classmethod
    def load(
        cls,
        x: str,
        lora: Mapping[str, Tensor],
        alpha: float | None,
        dora_scale: Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> Any:
        """The file's adapter for the weight that the host calls `x`, None without one."""
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
    patches: dict[str, Any] = {}
    output: dict[str, Any] = {}
    parts, projection, whole = set[str](), set[str](), set[str]()
    for source in SOURCES.values():
        embedder = _adapter(_unknown_to_the_host(source), lora)
        if embedder is not None:
            patches[f"{PREFIX}{source.embedder_weight}"] = embedder
        of_output = {key for key in lora if _output_pattern(source).search(key)}
        if of_output:
            output |= _output_adapters(source, lora)
            parts.add(source.output)
        projection |= of_output
        whole |= {key for key in lora if _whole_tensor(source).fullmatch(key) and "lora" not in key}
    if not patches and not projection and not whole:
        return None
    unread = parts if projection - _loaded(output) else set[str]()
    return L2PParts(patches, output, parts, unread, len(whole), projection | whole | _loaded(patches))


def _loaded(adapters: Mapping[str, Any]) -> set[str]:
    return {key for adapter in adapters.values() for key in adapter.loaded_keys}


def _output_adapters(source: Source, lora: Mapping[str, Tensor]) -> dict[str, Any]:
    """A file's adapters for a source's output projection, by the weights that they are for."""
    found = {f"{PREFIX}{weight}": _adapter(names, lora) for weight, names in _output_names(source).items()}
    return {weight: adapter for weight, adapter in found.items() if adapter is not None}


def _unknown_to_the_host(source: Source) -> list[str]:
    """The file names of a source's patch embedder that the host does not look for."""
    # The latent source's embedder is found too, so that it is skipped for its shape and not reported as unknown.
    sizes = [source.latent.patch_size, *(row.patch_size for row in VARIANTS.values())]
    published = {
        source.layout.to_diffusers(source.embedder_weight, size)[0].removesuffix(".weight"): 0 for size in sizes
    }
    names = [form for name in published if name != source.embedder for form in _spellings(name)]
    # The host itself finds its own name in the first and third spelling.
    known = (f"{PREFIX}{source.embedder}", f"lora_unet_{source.embedder}")
    return names + [name for name in _spellings(source.embedder) if name not in known]


@cache
def _output_pattern(source: Source) -> re.Pattern[str]:
    """Substrings of the names of a source's output projection, in any layout and spelling."""
    layer = next(iter(source.projection(source.config()).state_dict()))
    published = source.layout.to_diffusers(f"{source.output}.{layer}", source.latent.patch_size)[0]
    names = "|".join(re.escape(name) for name in dict.fromkeys((source.output, published.partition(".")[0])))
    return re.compile(rf"(?:^|[._])(?:{names})[._]")


@cache
def _output_names(source: Source) -> dict[str, list[str]]:
    """The weights of a source's output projection, and what files call each of them."""
    found = {}
    for layer in source.projection(source.config()).state_dict():
        weight = f"{source.output}.{layer}"
        if layer.endswith(".weight"):
            names = (weight, *source.layout.to_diffusers(weight, source.latent.patch_size))
            found[weight] = [form for name in names for form in _spellings(name.removesuffix(".weight"))]
    return found


@cache
def _whole_tensor(source: Source) -> re.Pattern[str]:
    """The keys that tensors of a delta have beside its adapters."""
    modules = "|".join(re.escape(name) for name in (*(stack.name for stack in source.stacks), *source.trained, HEAD))
    pads = "|".join(re.escape(name) for name in source.pads)
    return re.compile(rf"(?:{modules})\..*(?<=\.)(?:weight|bias)" + (rf"|{pads}" if pads else ""))


def _adapter(names: list[str], lora: Mapping[str, Tensor]) -> Any:
    """The file's adapter under one of these names, in any of the host's formats; None without one."""
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
    """The spellings that comfy/lora.py accepts of the names of Z-Image's other weights."""
    flat = name.replace(".", "_")
    return [f"{PREFIX}{name}", f"transformer.{name}", f"lora_unet_{flat}", f"lycoris_{flat}", name]
