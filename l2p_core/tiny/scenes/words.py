"""The second tiny world's caption encoder, which knows the phrase that a word is in.

Hidden states of a language model tell of the words before. Here that is a rule: a word's features are its own vector,
those of the phrase so far and that of the phrase's place. So the last word of "a red striped circle" says all of it,
as the first object, and the words of the second object know the relation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..words import START, Words
from .content import COLOURS, FIGURES, LETTERS, RELATIONS, TEXTURES

FIRST, SECOND = "<first>", "<second>"
ARTICLES = ("a", "an")
_RELATED = tuple(dict.fromkeys(word for relation in RELATIONS for word in relation.split()))


class PhraseWords(Words):
    """Captions as sequences of words that know their phrase: text -> (1 + number of words, 64) float32."""

    KIND = "scenes words"

    def __init__(self, vocabulary: list[str], table: Tensor):
        super().__init__(vocabulary, table)
        # The sum of these rows of the table, kept: there are few different ones in all captions.
        self._vector = functools.cache(lambda rows: self.table[list(rows)].sum(0))

    @classmethod
    def make(cls, seed: int = 0) -> PhraseWords:
        """The words of this world's captions with orthogonal vectors drawn from `seed`."""
        letters = [letter.lower() for letter in LETTERS]
        known = [*ARTICLES, *COLOURS, *TEXTURES, *FIGURES, "letter", *letters, *_RELATED]
        return cls.of([START, FIRST, SECOND, *known], seed)

    def encode(self, text: str) -> Tensor:
        """Features of a caption; errors as for `Words.encode`."""
        rows: list[tuple[int, ...]] = [(self._index[START],)]
        phrase: list[int] = []
        place, relation = FIRST, list[int]()
        for word in self._known(text):
            index = self._index[word]
            if word in ARTICLES and relation:
                place, phrase, relation = SECOND, relation, []
            elif word in _RELATED:
                relation.append(index)
            rows.append((index, self._index[place], *phrase))
            if word not in ARTICLES:
                phrase = [*phrase, index]
        return torch.stack([self._vector(row) for row in rows])
