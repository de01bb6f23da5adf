"""The source of a run's caption features: a cache on disk, filled before anything else is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import tiny
from ..dataset.caption_cache import CaptionCache, TextEncoder, bytes_of_features
from ..tiny.word_encoder import WordEncoder

MAX_WORDS = 512
"""The length at which captions of the tiny model's words are cut."""


@dataclass(frozen=True)
class CaptionSource:
    """A cache and the encoder that fills it.

    Attributes:
        folder: of the cache, shared by encoders, data sets and runs.
        identity: the encoder's, see `dataset.caption_cache.TextEncoder`.
        make_encoder: loads it; called only if something is missing; released before training.
        max_tokens: at which captions are cut.
        itemsize: bytes of an element of its features.
    """

    folder: Path
    identity: str
    make_encoder: Callable[[], TextEncoder]
    max_tokens: int = field(kw_only=True)
    itemsize: int = field(default=torch.float32.itemsize, kw_only=True)

    def bytes_to_encode(self, captions: Iterable[str], width: int) -> int:
        """Estimate the bytes on disk that `fill` will need for these captions."""
        missing = self._cache().missing(captions)
        return bytes_of_features(missing, self.max_tokens, width, self.itemsize)

    def fill(self, captions: Iterable[str], progress: Callable[[int, int], None] | None = None) -> CaptionCache:
        """The cache, filled with these captions and the empty one; errors as for `CaptionCache.fill`."""
        cache = self._cache()
        cache.fill(captions, self.make_encoder, progress=progress)
        return cache

    def _cache(self) -> CaptionCache:
        return CaptionCache(self.folder, self.identity, self.max_tokens)


def of_words(folder: Path) -> CaptionSource:
    """The tiny model's words as the text encoder."""
    encoder = WordEncoder(tiny.load_words())
    return CaptionSource(folder, encoder.identity, lambda: encoder, max_tokens=MAX_WORDS)
