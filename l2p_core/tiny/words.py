"""The tiny model's caption encoder: each word is a fixed vector, a caption the sequence of its words' vectors.

The vectors are orthogonal, so every word is as unlike every other as possible, and no language has to be learned. A
start token comes first, so that the empty caption, which guidance needs, is one token long.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..files.metadata import KIND as KIND_KEY
from ..files.tensor_file import load_tensors, save
from . import shapes

CAPTION_DIM = 64
START = "<start>"

Loaded = TypeVar("Loaded", bound="Words")


class Words:
    """A vocabulary with a vector for each word: text -> (L, 64) float32 of unit RMS.

    Args:
        vocabulary: the known words in lower case, the start token first.
        table: (words, 64), one row per word.
    """

    KIND = "words"
    """Names its files."""

    def __init__(self, vocabulary: list[str], table: Tensor):
        if vocabulary[:1] != [START] or table.shape != (len(vocabulary), CAPTION_DIM):
            raise ValueError(
                f"A table of words is {START!r} and other words with one row of {CAPTION_DIM} values each, not "
                f"{len(vocabulary)} words with a table of shape {tuple(table.shape)}."
            )
        self.vocabulary = vocabulary
        self.table = table.float()
        self._index = {word: i for i, word in enumerate(vocabulary)}

    @classmethod
    def make(cls, seed: int = 0) -> Words:
        """The words of the image set's captions with orthogonal vectors drawn from `seed`."""
        found = {word for text in shapes.all_captions() for word in _split(text)}
        return cls.of([START, *sorted(found)], seed)

    @classmethod
    def of(cls: type[Loaded], vocabulary: list[str], seed: int = 0) -> Loaded:
        """A vocabulary, START first, with orthogonal vectors drawn from `seed`."""
        table = torch.empty(len(vocabulary), CAPTION_DIM)
        nn.init.orthogonal_(table, gain=CAPTION_DIM**0.5, generator=torch.Generator().manual_seed(seed))
        return cls(vocabulary, table)

    def encode(self, text: str) -> Tensor:
        """Features of a caption, (1 + number of words, 64).

        Raises:
            ValueError: for a word that is not in the vocabulary.
        """
        return self.table[[0, *(self._index[word] for word in self._known(text))]]

    def _known(self, text: str) -> list[str]:
        """The words of a text, all of which must be in the vocabulary."""
        words = _split(text)
        unknown = [word for word in words if word not in self._index]
        if unknown:
            known = ", ".join(word for word in self.vocabulary if word.isalnum())
            raise ValueError(f"The tiny model does not know the word {unknown[0]!r}; use only: {known}.")
        return words

    def knows(self, text: str) -> bool:
        """Whether every word of a caption is in the vocabulary."""
        return all(word in self._index for word in _split(text))

    def save(self, path: Path) -> None:
        """Write a safetensors file with the vocabulary in its metadata, replacing an existing one."""
        save({"table": self.table}, path, {KIND_KEY: self.KIND, "words": json.dumps(self.vocabulary)}, overwrite=True)

    @classmethod
    def load(cls: type[Loaded], path: Path) -> Loaded:
        """Read a file written by `save`.

        Raises:
            ValueError: if the file is not such a table.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get(KIND_KEY) != cls.KIND or "table" not in tensors:
            raise ValueError(f"{path} is not a table of words: use the words.safetensors that comes with this package.")
        return cls(json.loads(metadata["words"]), tensors["table"])


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
