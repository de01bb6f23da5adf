"""Key names as data: the ComfyUI layout, which is the one in memory, and the diffusers layout of published files.

A table of pairs of patterns reads both ways. "{}" stands for any text, "{patch}" for the patch size, which the
diffusers layout may name. The first pair that matches a whole key renames it; a key that no pair matches has the same
name in both layouts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_PATCH = "{patch}"


@dataclass(frozen=True)
class Stacked:
    """A weight of the ComfyUI layout whose rows are stored as several weights in the diffusers layout.

    Attributes:
        comfy: the pattern of its key.
        parts: those of the rows' keys, in order. The first takes as many rows as the weight has columns (queries are as
            wide as the model), the others share the rest evenly.
    """

    comfy: str
    parts: tuple[str, ...]

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many rows of a weight of this shape each part has."""
        rest, over = divmod(shape[0] - shape[1], len(self.parts) - 1)
        assert rest > 0 and not over, f"a weight of the shape {shape} is not queries, keys and values"
        return shape[1], *[rest] * (len(self.parts) - 1)


@dataclass(frozen=True)
class KeyLayout:
    """A source's keys in both layouts.

    Attributes:
        pairs: (ComfyUI pattern, diffusers pattern).
        stacked: weights that are one tensor in the first and several in the second.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()

    def to_comfy(self, key: str) -> tuple[str, int | None]:
        """The ComfyUI key of a key of either layout, and which part of it the tensor is, None for the whole."""
        for stack in self.stacked:
            for part, template in enumerate(stack.parts):
                found = _pattern(template).fullmatch(key)
                if found:
                    return stack.comfy.format(*found.groups()), part
        return self.renamed(key), None

    def renamed(self, key: str) -> str:
        """A key's name in the ComfyUI layout; keys of parts, which are rows of a tensor there, do not change."""
        for comfy, diffusers in self.pairs:
            found = _pattern(diffusers).fullmatch(key)
            if found:
                return comfy.format(*found.groups())
        return key

    def to_diffusers(self, key: str, patch_size: int) -> tuple[str, ...]:
        """The diffusers keys of a ComfyUI key: one, or those of its parts; `patch_size` is the model's."""
        stacked = [(stack.comfy, stack.parts) for stack in self.stacked]
        for comfy, parts in (*stacked, *((comfy, (diffusers,)) for comfy, diffusers in self.pairs)):
            found = _pattern(comfy).fullmatch(key)
            if found:
                return tuple(part.format(*found.groups(), patch=patch_size) for part in parts)
        return (key,)

    def stack_of(self, key: str) -> Stacked | None:
        """How a ComfyUI key's rows are divided in the diffusers layout; None if they are not."""
        return next((stack for stack in self.stacked if _pattern(stack.comfy).fullmatch(key)), None)


@lru_cache(maxsize=512)
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(re.escape(_PATCH), r"\d+").replace(re.escape("{}"), "(.+)")
    return re.compile(escaped)
