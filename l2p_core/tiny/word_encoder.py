"""The tiny model's words as the text encoder of a caption cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor

from .words import Words


class WordEncoder:
    """The tiny model's words as a `dataset.caption_cache.TextEncoder`."""

    def __init__(self, words: Words):
        self._words = words
        digest = hashlib.sha256(json.dumps(words.vocabulary).encode())
        digest.update(words.table.contiguous().numpy().tobytes())
        self.identity = f"words {digest.hexdigest()[:32]}"

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, (1 + number of words, 64).

        Raises:
            ValueError: for a word that is not in the vocabulary.
        """
        return [self._words.encode(caption) for caption in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(features) for features in self.encode(captions)]
