"""Recognises the source of a file by its keys, and reads its configuration off its shapes."""

from __future__ import annotations

from collections.abc import Iterable

from ..config import COMFY_PREFIX, ModelConfig, PixelConfig, Shapes
from . import SOURCES
from .shape_reader import ShapeReader, variant_of
from .source import Source


def known_models() -> str:
    """The kinds of models that are known, in words: "Z-Image or L2P"."""
    return f"{', '.join(row.title for row in SOURCES.values())} or L2P"


def recognised(keys: Iterable[str]) -> Source | None:
    """The source whose complete files, pixel or latent, have these keys (either layout, no prefix)."""
    found = _most_marked(list(keys))
    return found[0] if found[1] == len(found[0].marks) else None


def nearest_source(keys: Iterable[str]) -> Source:
    """The source with the most marks among these keys (either layout, no prefix); the first source if there are
    none."""
    return _most_marked(list(keys))[0]


def _most_marked(keys: list[str]) -> tuple[Source, int]:
    rows = list(SOURCES.values())
    counts = [len({row.layout.to_comfy(key)[0] for key in keys}.intersection(row.marks)) for row in rows]
    shares = [count / len(row.marks) for count, row in zip(counts, rows, strict=True)]
    best = shares.index(max(shares))
    return rows[best], counts[best]


def read_config(shapes: Shapes) -> ModelConfig:
    """See `ModelConfig.from_shapes`."""
    prefix = COMFY_PREFIX if any(key.startswith(COMFY_PREFIX) for key in shapes) else ""
    plain = {key.removeprefix(prefix): tuple(shape) for key, shape in shapes.items()}
    row = nearest_source(plain)
    read = ShapeReader(_joined(plain, row), known_models())
    head = read.head()
    dim, patch_numel = read.patch_embedder(row.embedder_weight)
    patch_size = row.latent.patch_size
    config = row.config(patch_size=patch_size, in_channels=patch_numel // patch_size**2, dim=dim, **row.sizes(read))
    if head:
        config = config.of_pixels(variant_of(head), head)
    taken = config.patch_size**2 * config.in_channels
    if taken != patch_numel:
        kind = config.variant if isinstance(config, PixelConfig) else "latent"
        raise ValueError(
            f"The patch embedder takes {patch_numel} values a patch, but a {kind} model takes {taken}: this is not a "
            f"{known_models()} file."
        )
    if config.head_dim == 0 or config.dim % config.head_dim or config.head_dim % 16:
        raise ValueError(
            f"Width {config.dim} with attention heads of {config.head_dim} is not a {row.title} backbone: "
            "heads must divide the width and be a multiple of 16."
        )
    return config


def _joined(shapes: dict[str, tuple[int, ...]], row: Source) -> dict[str, tuple[int, ...]]:
    """Shapes by their ComfyUI keys; those of parts are stacked along the first dimension."""
    result: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        name, part = row.layout.to_comfy(key)
        before = result.get(name) if part is not None else None
        result[name] = (before[0] + shape[0], *shape[1:]) if before and shape else shape
    return result
